"""Hubs: whether they can be reached, and each reason for which they give nothing.

Nothing is asked of a hub unless somebody agreed, and no token goes to a mirror: requests that carry one go through
the same hub objects as a download's.
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from sdfleet import compose
from sdfleet.catalog.hubs.hub import CONNECT_TIMEOUT_S, TITLES, Source
from sdfleet.catalog.hubs.hugging_face import OFFICIAL
from sdfleet.catalog.hubs.modelscope import INTERNATIONAL
from sdfleet.catalog.hubs.modelscope import OFFICIAL as MODELSCOPE
from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, ok, warning
from sdfleet.doctor.machine import Machine
from sdfleet.errors import DownloadError, HubRateLimited, SdfleetError

TRUE = frozenset({"1", "ON", "YES", "TRUE"})
READ_WITHIN_S = 15.0
# A clock that is off by more than this makes certificates and signed links fail.
CLOCK_SLACK_S = 300.0


def offline(machine: Machine) -> Finding:
    """Whether downloads are switched off."""
    is_set = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if machine.variables.get(n, "").upper() in TRUE]
    if "HF_HUB_OFFLINE" in is_set:
        return warning("HF_HUB_OFFLINE is set: nothing can be pulled from Hugging Face", "unset HF_HUB_OFFLINE")
    if is_set:
        return ok("TRANSFORMERS_OFFLINE is set; sdfleet downloads by itself and is not stopped by it")
    return ok("downloads are not switched off")


def token_kept_back(machine: Machine) -> Finding:
    """Whether a token is set that does not go to the hub in use."""
    settings = machine.settings
    if settings.hub == "hf":
        token, endpoint, officials = settings.hf_token, settings.hf_endpoint, {OFFICIAL}
    else:
        token, endpoint = settings.modelscope_token, settings.modelscope_endpoint
        officials = {MODELSCOPE, INTERNATIONAL}
    if token is None:
        return not_applicable(f"no token for {TITLES[settings.hub]} is set; public models need none")
    if endpoint in officials:
        return ok(f"the token goes to {endpoint}")
    if settings.token_to_mirror:
        return warning(f"the token is sent to the mirror {endpoint}, which could keep it", "unset SD_TOKEN_TO_MIRROR")
    return warning(f"a token is set, and it is not sent to the mirror {endpoint}: gated models cannot be pulled")


def proxy(machine: Machine) -> Finding:
    """Whether the proxies that are set can be proxies; where a hub may be asked, whether they answer."""
    found = {name: value for name, value in machine.variables.items() if name.endswith("_PROXY") and name != "NO_PROXY"}
    found = {name: value for name, value in found.items() if value}
    if not found:
        return ok("no proxy is set")
    for name, value in found.items():
        parts = urlsplit(value if "://" in value else f"http://{value}")
        try:
            where = (parts.hostname or "", parts.port or {"https": 443}.get(parts.scheme, 80))
        except ValueError:
            where = ("", 0)
        if not where[0]:
            return fault(f"{name} is no address of a proxy", f"unset {name}, or set it like http://proxy:3128")
        if parts.scheme.startswith("socks") and not _has_socks():
            return fault(f"{name} names a SOCKS proxy, and socksio is not installed", "python -m pip install socksio")
        if not machine.may_ask_hub:
            continue
        try:
            socket.create_connection(where, timeout=CONNECT_TIMEOUT_S / 4).close()
        except OSError as exc:
            return fault(f"the proxy of {name}, {where[0]}:{where[1]}, does not answer: {exc.strerror or exc}")
    return ok(f"{', '.join(found)} set; {'they answer' if machine.may_ask_hub else 'looked at with --network only'}")


def reach(machine: Machine) -> Finding:
    """Whether the hub of the settings answers, without a token; and whether its clock agrees with ours."""
    import httpx2

    source, endpoint = _hub_of(machine)
    title = TITLES[source]
    try:
        timeout = httpx2.Timeout(READ_WITHIN_S, connect=CONNECT_TIMEOUT_S)
        # The page of the address itself; of its body nothing is read.
        with httpx2.stream("GET", endpoint, timeout=timeout, follow_redirects=False) as answer:
            status, date = answer.status_code, answer.headers.get("date", "")
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        return fault(f"{title} at {endpoint} cannot be reached: {reason}")
    if status >= 500:
        return fault(f"{title} at {endpoint} answered with status {status}", "try again later, or use the other hub")
    off_s = _clock_off_s(date, machine.clock())
    if abs(off_s) > CLOCK_SLACK_S:
        way = "behind" if off_s > 0 else "ahead"
        return fault(
            f"{title} answers, and this machine's clock is {abs(off_s) / 60:.0f} min {way}",
            "synchronise the clock: sudo timedatectl set-ntp true (Linux), sudo sntp -sS time.apple.com (macOS)",
        )
    return ok(f"{title} answers at {endpoint}")


def access(machine: Machine) -> Finding:
    """Whether the hub would give a model to this account: the one named, or the default, or the first one absent."""
    catalog = machine.catalog()
    source = machine.settings.hub
    if machine.asked_model is not None:
        card = catalog.card(machine.asked_model)
    else:
        absent = {card.name: card for card in catalog.absent() if _repo(card, source) is not None}
        if not absent:
            return not_applicable("every published model is here")
        card = absent.get(machine.settings.model) or next(iter(absent.values()))
    repo_id = _repo(card, source)
    if repo_id is None:
        return not_applicable(f"{card.name} is not on {TITLES[source]}")
    hub = compose.hub(machine.settings)
    try:
        listing = hub.listing(repo_id)
        hub.check_access(repo_id, listing)
    except (DownloadError, HubRateLimited) as exc:
        return fault(exc.message, _cure_of(exc))
    gate = "gated, and open to this account" if listing.is_gated else "open to everybody"
    return ok(f"{repo_id} on {TITLES[source]} is {gate}")


def _cure_of(exc: SdfleetError) -> str:
    entry = next((entry for entry in ENTRIES if exc.code in entry.codes), None)
    return exc.hint or ("" if entry is None else entry.cure)


def _hub_of(machine: Machine) -> tuple[Source, str]:
    settings = machine.settings
    return settings.hub, settings.hf_endpoint if settings.hub == "hf" else settings.modelscope_endpoint


def _repo(card: object, source: Source) -> str | None:
    found: str | None = getattr(card, source)
    return found


def _clock_off_s(date: str, now_s: float) -> float:
    """How far the hub's clock is ahead of ours; 0 where it does not tell."""
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(date).timestamp() - now_s
    except (TypeError, ValueError):
        return 0.0


def _has_socks() -> bool:
    from importlib.util import find_spec

    return find_spec("socksio") is not None


ENTRIES = (
    Entry(
        id="hub-reachable",
        title="The hub cannot be reached: proxy, mirror, time-out",
        symptoms=(
            "ConnectTimeout", "ReadTimeout", "ProxyError", "Name or service not known", "certificate verify failed",
        ),
        cause="No connection, a proxy or a mirror that does not answer, a network that blocks the hub, or a "
        "certificate of a company's proxy that Python does not know.",
        looks="the hub's address is asked for its page, without a token; its date is compared with our clock",
        cure="set HTTPS_PROXY; name a mirror with SD_HF_ENDPOINT; or sdfleet models pull NAME --from modelscope; a "
        "company's certificate: SSL_CERT_FILE",
        check=reach,
        effort="network",
        limit_s=60.0,
        signs=(
            r"(connect|read|pool)timeout", r"timed out", r"proxyerror", r"maxretryerror", r"max retries exceeded",
            r"name or service not known", r"name resolution", r"getaddrinfo failed", r"nodename nor servname",
            r"connection (reset|aborted)", r"certificate.?verify.?failed", r"sslerror", r"ssl: ", r"errno 10[14]\b",
            r"network is unreachable", r"remotedisconnected", r"connecterror", r"cannot connect to proxy",
            r"we couldn'?t connect to 'https?://", r"\b50[234] (server error|bad gateway|service unavailable|gateway)",
        ),
        codes=("hub_unreachable", "download_error"),
    ),
    Entry(
        id="hub-access",
        title="The hub does not give this model",
        symptoms=("401 Unauthorized", "403 Forbidden", "you need access"),
        cause="One of the eight below; hubs answer them with nearly the same words.",
        looks="the model's listing, and for a gated one whether this account may have it; a few bytes, no weights",
        cure="sdfleet doctor hub-access --model NAME tells which it is",
        check=access,
        effort="network",
        limit_s=120.0,
        signs=(r"\b401 client error", r"\b403 (client error|forbidden)", r"\b401 unauthorized"),
    ),
    Entry(
        id="proxy",
        title="A proxy is set that is none",
        symptoms=("Unknown scheme for proxy URL", "socksio is not installed", "407 Proxy Authentication Required"),
        cause="A variable of the shell names a proxy that is misspelt, gone, or of a kind that needs a package.",
        looks="HTTP_PROXY, HTTPS_PROXY and ALL_PROXY; with --network, whether they answer",
        cure="unset the variable, or set it like http://user:password@proxy:3128",
        check=proxy,
        limit_s=20.0,
        signs=(r"socksio", r"unknown scheme for proxy", r"\b407 proxy", r"invalid proxy"),
    ),
    Entry(
        id="token-needed",
        title="1 of 8: a gated model, and no token was sent",
        symptoms=("GatedRepoError 401", "You must have access to it and be authenticated", "Please log in"),
        cause="The model is given to accounts only, and no token came along.",
        cure="make a token at https://huggingface.co/settings/tokens, set HF_TOKEN, and accept the licence on the "
        "model's page",
        checked_by="hub-access",
        signs=(
            r"gatedrepoerror\W{1,5}401\b", r"\b401 client error.{0,300}(gated|access to model .{0,80} is restricted)",
            r"must (have access to it and )?be authenticated", r"please log in", r"is given only to accounts",
            r"does not give .{0,100} (to callers )?without a token",
        ),
        codes=("hub_token_needed",),
    ),
    Entry(
        id="licence-not-accepted",
        title="2 of 8: the licence has not been accepted, or its owner has not answered",
        symptoms=("GatedRepoError 403", "you are not in the authorized list", "awaiting a review"),
        cause="The token is good, and its account has not accepted the model's licence on the hub.",
        cure="open the model's page while logged in, accept the licence, then sdfleet models pull NAME again",
        checked_by="hub-access",
        signs=(
            r"not in the authorized list", r"awaiting (a )?review", r"gatedrepoerror\W{1,5}403\b", r"ask for access",
            r"\b403 client error.{0,300}(gated|access to model .{0,80} is restricted)", r"has not accepted the licence",
            r"its licence is not accepted", r"licence_not_accepted",
        ),
        codes=("licence_not_accepted",),
    ),
    Entry(
        id="token-refused",
        title="3 of 8: the token is wrong, revoked or expired",
        symptoms=("Invalid credentials in Authorization header", "Invalid user token"),
        cause="The hub does not know the token. It is refused for public models too.",
        cure="make a new one at https://huggingface.co/settings/tokens and set HF_TOKEN to it, or unset HF_TOKEN",
        checked_by="hub-access",
        signs=(
            r"invalid (credentials|user token|username or password)", r"does not know the token",
            r"token.{0,20}expired", r"authenticationerror.{0,60}e3001", r"hub_token_refused",
        ),
        codes=("hub_token_refused",),
    ),
    Entry(
        id="token-too-narrow",
        title="4 of 8: the token may not read gated models",
        symptoms=("403 with a fine-grained token", "enable access to public gated repositories"),
        cause="Fine-grained tokens read gated models only where that right was ticked.",
        cure="edit the token at https://huggingface.co/settings/tokens: read access to public gated repositories",
        checked_by="hub-access",
        signs=(r"fine-grained", r"public gated repositories", r"token may not read", r"hub_token_too_narrow"),
        codes=("hub_token_too_narrow",),
    ),
    Entry(
        id="repository-not-found",
        title="5 of 8: misspelt, or private",
        symptoms=("RepositoryNotFoundError", "Repository Not Found for url", "does not exist or is not accessible"),
        cause="There is no model of that name that this account can see; a hub does not tell which of the two it is.",
        cure="check the name on the hub; a private model needs a token of an account that may see it",
        checked_by="hub-access",
        signs=(
            r"repositorynotfounderror", r"repository not found", r"does not exist or is not accessible",
            r"is not a local folder and is not a valid model identifier",
            r"there is no model \S+ on (hugging|modelscope)",
            r"hfvalidationerror", r"repo id must", r"which may not exist or may be private",
        ),
        codes=("hub_repository_not_found",),
    ),
    Entry(
        id="repository-gone",
        title="6 of 8: the hub has taken the model down",
        symptoms=("DisabledRepoError", "Access to this resource is disabled"),
        cause="Its owner or the hub removed it.",
        cure="see whether the other hub has it: sdfleet models pull NAME --from modelscope",
        checked_by="hub-access",
        signs=(r"disabledrepoerror", r"access to this resource is disabled", r"has taken down"),
        codes=("hub_repository_gone",),
    ),
    Entry(
        id="hub-file-not-found",
        title="7 of 8: the revision or a file is not on the hub",
        symptoms=("EntryNotFoundError", "RevisionNotFoundError", "does not appear to have a file named"),
        cause="The repository was changed, or lacks a variant (fp16) that was asked for.",
        cure="try again; sdfleet models plan NAME shows the files that are there now",
        checked_by="hub-access",
        signs=(
            r"(?<!local)entrynotfounderror", r"revisionnotfounderror", r"entry not found for url",
            r"revision not found", r"does not appear to have a file named", r"no such modeling files are available",
        ),
        codes=("hub_file_not_found",),
    ),
    Entry(
        id="hub-offline",
        title="8 of 8: downloads are switched off, and the files are not here",
        symptoms=("OfflineModeIsEnabled", "LocalEntryNotFoundError", "outgoing traffic has been disabled"),
        cause="HF_HUB_OFFLINE is set, or another program looks for files in a cache that does not have them.",
        looks="HF_HUB_OFFLINE",
        cure="unset HF_HUB_OFFLINE; or copy the folder from another machine and sdfleet models import FOLDER",
        check=offline,
        signs=(
            r"offlinemodeisenabled", r"localentrynotfounderror", r"outgoing traffic has been disabled",
            r"hf_hub_offline", r"cannot find the requested files in the (local|disk) cache", r"local_files_only",
        ),
        codes=("hub_offline",),
    ),
    Entry(
        id="token-kept-back",
        title="A token is set and not sent to the mirror",
        symptoms=("tokens are not sent to the mirror", "gated models fail with a mirror"),
        cause="Who runs a mirror could keep the token, so it goes to the official address alone.",
        looks="the token and the address of the hub",
        cure="use the official address for gated models; or SD_TOKEN_TO_MIRROR=true if you trust the mirror",
        check=token_kept_back,
        signs=(r"not sent to the mirror",),
    ),
    Entry(
        id="hub-rate-limit",
        title="The hub wants fewer requests",
        symptoms=("429 Client Error: Too Many Requests",),
        cause="Addresses without a token may ask less often; offices and data centres share one address.",
        cure="wait for the seconds it names; set HF_TOKEN: accounts may ask more often",
        checked_by="hub-access",
        signs=(r"\b429\b.{0,60}(client error|too many)", r"too many requests", r"wants fewer requests"),
        codes=("hub_rate_limited",),
    ),
    Entry(
        id="download-damaged",
        title="What arrived is not what the hub announced",
        symptoms=("Consistency check failed", "file should be of size", "hash does not match"),
        cause="A proxy or a mirror changed the file, cut it off, or serves an older one.",
        cure="sdfleet models pull NAME again; without the proxy or the mirror if it comes back",
        checked_by="hub-access",
        signs=(r"consistency check failed", r"file should be of size", r"hash mismatch", r"fileintegrityerror"),
        codes=("download_damaged",),
    ),
)  # fmt: skip
