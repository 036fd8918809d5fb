"""What Hugging Face refuses, told apart: each cause with its own next action, and never the library's words."""

from __future__ import annotations

import pytest

from sdfleet.catalog.download import fetch, plan_download
from sdfleet.catalog.hubs.hub import Access
from sdfleet.catalog.hubs.hugging_face import HuggingFace
from sdfleet.catalog.pulled import PulledWeights
from sdfleet.errors import (
    HubFileNotFound,
    HubOffline,
    HubRateLimited,
    HubUnreachable,
    LicenceNotAccepted,
    RepositoryGone,
    RepositoryNotFound,
    SdfleetError,
    TokenNeeded,
    TokenRefused,
    TokenTooNarrow,
)
from tests.catalog.hub_server import HubServer, Refusal, gated
from tests.catalog.hubs import CARD, LARGE, TOKEN, yes

INVALID = Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"})


def _client(hub: HubServer, *, token: str | None = TOKEN, sends_token: bool = True) -> HuggingFace:
    return HuggingFace(Access(endpoint=hub.url, token=token, sends_token=sends_token))


@pytest.mark.parametrize(
    ("refusal", "token", "error", "action"),
    [
        (gated(401), None, TokenNeeded, "set HF_TOKEN, accept the licence at https://huggingface.co/Maker/Toy-1"),
        (gated(401), TOKEN, TokenRefused, "make a new one at https://huggingface.co/settings/tokens"),
        (gated(403), TOKEN, LicenceNotAccepted, "accept it at https://huggingface.co/Maker/Toy-1, then run"),
        (INVALID, TOKEN, TokenRefused, "make a new one at https://huggingface.co/settings/tokens"),
        (Refusal(403), TOKEN, TokenTooNarrow, "edit it at https://huggingface.co/settings/tokens"),
        (Refusal(403), None, TokenNeeded, "set HF_TOKEN"),
        (Refusal(404, {"X-Error-Code": "RepoNotFound"}), TOKEN, RepositoryNotFound, "check the name"),
        (Refusal(401), None, RepositoryNotFound, "check the name"),
        (Refusal(403, {"X-Error-Message": "Access to this resource is disabled."}), TOKEN, RepositoryGone, "--from"),
        (Refusal(404, {"X-Error-Code": "RevisionNotFound"}), TOKEN, HubFileNotFound, "try again"),
        (Refusal(429, {"Retry-After": "9"}), TOKEN, HubRateLimited, "try again in 9 s"),
        (Refusal(429, {"RateLimit": '"api";r=0;t=33'}), TOKEN, HubRateLimited, "try again in 33 s"),
        (Refusal(500), TOKEN, HubUnreachable, "check the connection and the proxy"),
        (Refusal(200, {}, b"<html>Please log in to this hotel</html>"), TOKEN, HubUnreachable, "check the connection"),
        (Refusal(200, {}, b"[]"), TOKEN, HubUnreachable, "check the connection"),
    ],
)  # fmt: skip
def test_each_refusal_has_its_own_error_and_next_action(
    hub: HubServer,
    weights: PulledWeights,
    refusal: Refusal,
    token: str | None,
    error: type[SdfleetError],
    action: str,
) -> None:
    hub.decide = lambda _asked: refusal
    with pytest.raises(SdfleetError) as caught:
        plan_download(CARD, _client(hub, token=token), weights)
    assert type(caught.value) is error
    assert action in caught.value.hint
    assert TOKEN not in str(caught.value)
    assert "Client Error" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "token", "error"),
    [(401, None, TokenNeeded), (401, TOKEN, TokenRefused), (403, TOKEN, LicenceNotAccepted)],
)
def test_a_gated_model_is_planned_and_its_refusal_told_before_gigabytes_come(
    hub: HubServer, weights: PulledWeights, status: int, token: str | None, error: type[SdfleetError]
) -> None:
    hub.is_gated = True
    hub.decide = lambda asked: gated(status) if "/api/models/Maker/Toy-1/auth-check" in asked.path else None
    plan = plan_download(CARD, _client(hub, token=token), weights)
    assert type(plan.refusal) is error
    assert plan.is_gated
    assert plan.n_bytes > 0
    assert hub.asked_for("resolve") == []


def test_a_file_that_went_away_is_told(hub: HubServer, weights: PulledWeights) -> None:
    client = _client(hub)
    plan = plan_download(CARD, client, weights)
    del hub.files["vae/config.json"]
    with pytest.raises(HubFileNotFound, match=r"vae/config\.json"):
        fetch(plan, yes(plan), client, weights)


def test_the_token_goes_to_the_hub_and_never_to_where_it_redirects(hub: HubServer, weights: PulledWeights) -> None:
    client = _client(hub)
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights)
    assert {asked.token for asked in hub.asked if not asked.is_cdn} == {TOKEN}
    elsewhere = [asked for asked in hub.asked if asked.is_cdn]
    assert any(LARGE in asked.path for asked in elsewhere)
    assert {asked.token for asked in elsewhere} == {None}


def test_a_mirror_gets_no_token_unless_asked(
    hub: HubServer, weights: PulledWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the library would send by itself.
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    client = _client(hub, sends_token=False)
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights)
    assert {asked.token for asked in hub.asked} == {None}


def test_a_gated_model_on_a_mirror_says_that_the_token_was_kept_back(hub: HubServer, weights: PulledWeights) -> None:
    hub.decide = lambda _asked: gated(401)
    with pytest.raises(TokenNeeded, match="SD_TOKEN_TO_MIRROR"):
        plan_download(CARD, _client(hub, sends_token=False), weights)


@pytest.mark.usefixtures("online")
def test_a_login_of_this_machine_is_for_the_official_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    official = HuggingFace(Access(endpoint="https://huggingface.co"))
    mirror = HuggingFace(Access(endpoint="https://mirror.example"))
    assert (official._token(), mirror._token()) == ("hf_environment", None)


def test_a_machine_that_is_set_offline_says_so(
    hub: HubServer, weights: PulledWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubOffline, match="HF_HUB_OFFLINE is set"):
        plan_download(CARD, _client(hub), weights)
    assert hub.asked == []
