"""Who may ask: the host that is named, the page that asks, the key that comes along, and how often.

Without any key the server listens on loopback only, so whoever reaches it sits at this machine; what is left to fear is
a web page in that person's browser. Hence two checks that come before everything else:

- Host: a page whose name was bound to 127.0.0.1 (DNS rebinding) names a host that is not ours
- Origin: a page of another site may send a form or a "simple" POST here without asking first

A browser that has shown its key sends a cookie instead, see sessions.py.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi import Depends
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from sdfleet.api.dialect import Dialect
from sdfleet.api.sessions import PROOF, Sessions, token_of
from sdfleet.domain import Caller, OwnerId, SafetyChecker, Submission
from sdfleet.domain import Scope as Right
from sdfleet.errors import NotAllowed, NotAuthenticated, RateLimited, SdfleetError
from sdfleet.storage.keys import KeyRecord, KeyStore

# What a browser or a load balancer must be able to read before anybody signs in.
PUBLIC_PATHS = frozenset({"/", "/studio", "/dashboard", "/session", "/health", "/api/version", "/favicon.ico"})
# The page's own files; links that carry a signature, see links.py.
PUBLIC_PREFIXES = ("/static/", "/files/")
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOOK_EVERY_S = 1.0
STRICTNESS: Mapping[SafetyChecker, int] = {"off": 0, "flag": 1, "on": 2}
ADMIN = Caller(owner=OwnerId("admin"), name="SD_API_KEY")


class Doorkeeper:
    """Decides who a request comes from. Raises NotAllowed, NotAuthenticated or RateLimited.

    admin_key: the key out of the settings, with every right. home_key: of the person at this machine, see doorplate.py.
    is_public: others than this machine can reach the server,
    so it never goes without a key, also when the last one was revoked.
    hosts, origins: what is allowed beside loopback and the server's own address.
    sessions: None lets nobody in by a cookie.
    """

    def __init__(
        self,
        *,
        keys: KeyStore,
        admin_key: str | None,
        home_key: str | None = None,
        is_public: bool = False,
        hosts: frozenset[str] = frozenset(),
        origins: frozenset[str] = frozenset(),
        sessions: Sessions | None = None,
    ) -> None:
        self._keys = keys
        self._sessions = sessions
        self._admin_key = admin_key
        self._home_key = home_key
        self._is_public = is_public
        self._has_keys = False
        self._looked_s = -math.inf
        self._hosts = hosts
        self._origins = origins

    async def admit(self, *, method: str, path: str, headers: Headers) -> Caller:
        """The caller, who may still lack a right for what the route does."""
        needs_key = await self.needs_key()
        if not needs_key:
            self._check_host(headers.get("host", ""))
        self._check_origin(method, headers)
        if not needs_key:
            return Caller()
        secret = secret_of(headers)
        if secret is not None:
            found = await self._holder(secret)
            if found is not None:
                return found[0]
        elif (caller := await self._signed_in(headers)) is not None:
            if method not in SAFE_METHODS and PROOF not in headers:
                raise NotAllowed(f"a change by a signed-in browser lacks the header {PROOF}", hint="use the page")
            return caller
        if path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES):
            return Caller(owner=OwnerId("nobody"), name="nobody", scopes=frozenset())
        if secret is None:
            raise NotAuthenticated(
                "this server wants a key", hint="send it as 'Authorization: Bearer KEY' or 'X-API-Key'"
            )
        raise NotAuthenticated("the key is not known here", hint="see `sdfleet keys list` on the server")

    async def needs_key(self) -> bool:
        """Whether nobody gets in without a key."""
        return self._is_public or self._admin_key is not None or await self._has_any_key()

    async def sign_in(self, secret: str) -> tuple[Caller, str | None]:
        """Who holds this key, and the token of a session; without one where no key is asked for.

        Raises NotAuthenticated.
        """
        if not await self.needs_key():
            return Caller(), None
        found = await self._holder(secret)
        if found is None or self._sessions is None:
            raise NotAuthenticated("the key is not known here", hint="see `sdfleet keys list` on the server")
        caller, subject = found
        return caller, self._sessions.issue(subject)

    async def _holder(self, secret: str) -> tuple[Caller, str] | None:
        """Who holds this key, and what a session names them by; None for any other text."""
        print_of = "" if self._sessions is None else self._sessions.print_of(secret)
        if self._home_key is not None and hmac.compare_digest(secret.encode(), self._home_key.encode()):
            return Caller(), f"home-{print_of}"
        if self._admin_key is not None and hmac.compare_digest(secret.encode(), self._admin_key.encode()):
            return ADMIN, f"admin-{print_of}"
        found = await self._keys.find(secret)
        return None if found is None else (_caller(found), found.owner)

    async def _signed_in(self, headers: Headers) -> Caller | None:
        """Who a session stands for, while the key behind it is still in force."""
        token = None if self._sessions is None else token_of(headers)
        subject = None if token is None or self._sessions is None else self._sessions.subject(token)
        if subject is None or self._sessions is None:
            return None
        for key, name, caller in ((self._home_key, "home", Caller()), (self._admin_key, "admin", ADMIN)):
            if key is not None and subject == f"{name}-{self._sessions.print_of(key)}":
                return caller
        found = await self._keys.in_force(OwnerId(subject))
        return None if found is None else _caller(found)

    async def _has_any_key(self) -> bool:
        """Whether the store has a key; a new one is noticed within a second."""
        now_s = time.monotonic()
        if now_s - self._looked_s > LOOK_EVERY_S:
            self._looked_s = now_s
            self._has_keys = bool(await self._keys.list())
        return self._has_keys

    def _check_host(self, host: str) -> None:
        name = host_name(host)
        if name in LOOPBACK_NAMES or name in self._hosts or _is_address(name):
            return
        raise NotAllowed(
            f"this server does not answer to the name {name[:80]!r}", hint="add it to SD_ALLOWED_HOSTS on the server"
        )

    def _check_origin(self, method: str, headers: Headers) -> None:
        origin = headers.get("origin")
        if method in SAFE_METHODS or origin in self._origins:
            return
        if origin is None:
            # Browsers that keep the Origin to themselves still say where a request comes from.
            if headers.get("sec-fetch-site") in {"cross-site", "same-site"}:
                raise NotAllowed("a page of another site may not do this", hint="add the site to SD_ALLOWED_ORIGINS")
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise NotAllowed(
                f"the page {origin[:80]!r} may not do this", hint="add it to SD_ALLOWED_ORIGINS on the server"
            )


def _caller(key: KeyRecord) -> Caller:
    return Caller(
        owner=key.owner,
        name=key.name,
        scopes=key.scopes,
        max_queued=key.max_queued,
        rate_per_minute=key.rate_per_minute,
    )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return host in LOOPBACK_NAMES or host.startswith("127.")


def host_name(host: str) -> str:
    """The name in a Host header, small, without its port.

    >>> host_name("LocalHost:7860"), host_name("[::1]:80"), host_name("10.0.0.7"), host_name("::1")
    ('localhost', '::1', '10.0.0.7', '::1')
    """
    found = re.fullmatch(r"\[([^\]]*)\](?::\d*)?", host)
    if found is not None:
        return found[1].lower()
    name = host if host.count(":") > 1 else host.partition(":")[0]
    return name.lower().rstrip(".")


def _is_address(name: str) -> bool:
    """Whether a host is an IP address: nobody can bind such a name to another one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def secret_of(headers: Mapping[str, str]) -> str | None:
    """The key that came along, wherever clients put it: Bearer, X-API-Key, x-key (BFL), or the password of Basic.

    >>> secret_of({"authorization": "Bearer abc"}), secret_of({"x-key": "abc"}), secret_of({"authorization": ""})
    ('abc', 'abc', None)
    >>> secret_of({"authorization": "Basic dXNlcjphYmM="})
    'abc'
    """
    kind, _, value = headers.get("authorization", "").strip().partition(" ")
    value = value.strip()
    if kind.lower() == "bearer" and value:
        return value
    if kind.lower() == "basic" and value:
        try:
            user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return ""
        return password or user
    return headers.get("x-api-key") or headers.get("x-key") or None


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_s: float


@dataclass(slots=True)
class RateLimit:
    """A token bucket for each owner: `per_minute` requests, all of them at once if they come so. None: no limit."""

    per_minute: int | None
    _buckets: OrderedDict[OwnerId, _Bucket] = field(default_factory=OrderedDict)

    def take(self, owner: OwnerId, *, now_s: float, per_minute: int | None = None) -> None:
        """Count one request. per_minute: the key's own limit. Raises RateLimited.

        >>> limit = RateLimit(per_minute=1)
        >>> limit.take(OwnerId("a"), now_s=0.0)
        >>> limit.take(OwnerId("a"), now_s=1.0)
        Traceback (most recent call last):
        sdfleet.errors.RateLimited: more than 1 requests a minute; try again in 59 s
        """
        most = per_minute or self.per_minute
        if most is None:
            return
        bucket = self._buckets.setdefault(owner, _Bucket(tokens=most, filled_s=now_s))
        bucket.tokens = min(most, bucket.tokens + (now_s - bucket.filled_s) * most / 60)
        bucket.filled_s = now_s
        self._buckets.move_to_end(owner)
        while len(self._buckets) > 10_000:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            wait_s = (1 - bucket.tokens) * 60 / most
            raise RateLimited(
                f"more than {most} requests a minute", retry_after_s=wait_s, hint=f"try again in {wait_s:.0f} s"
            )
        bucket.tokens -= 1


def caller_of(request: Request) -> Caller:
    """Who asks; set by `Access` for every request."""
    caller: Caller = request.state.caller
    return caller


def needs(right: Right) -> Any:
    """For a route's `dependencies`: its caller has this right, which is looked at before its body is read."""

    async def check(request: Request) -> None:
        check_right(caller_of(request), right)

    return Depends(check)


def check_right(caller: Caller, right: Right) -> None:
    """Raise NotAllowed unless the caller may do this."""
    if right not in caller.scopes:
        raise NotAllowed(
            f"the key {caller.name!r} may not {right}",
            hint=f"make one that may: sdfleet keys create NAME --scope {right}",
        )


def check_filter(submission: Submission, *, of_server: SafetyChecker) -> None:
    """Raise NotAllowed unless the caller may have pictures checked less than the server does by itself."""
    asked = submission.request.safety_checker
    if asked is not None and STRICTNESS[asked] < STRICTNESS[of_server]:
        check_right(submission.caller, "unfiltered")


class Access:
    """ASGI: no request passes without a caller. Faults are answered in the dialect of the path."""

    def __init__(self, app: ASGIApp, *, dialect_of: DialectOf) -> None:
        self._app = app
        self._dialect_of = dialect_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            doorkeeper: Doorkeeper = scope["app"].state.doorkeeper
            caller = await doorkeeper.admit(method=scope["method"], path=scope["path"], headers=headers)
        except SdfleetError as exc:
            response = self._dialect_of(scope["path"]).error(exc)
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


class DialectOf(Protocol):
    """Finds the dialect of a path."""

    def __call__(self, path: str, /) -> Dialect: ...


def now_s() -> float:
    """The clock that rate limits count by."""
    return time.monotonic()
