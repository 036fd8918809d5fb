"""What ModelScope refuses, told apart as far as it lets us."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfleet.catalog.download import fetch, plan_download
from sdfleet.catalog.hubs.hub import Access
from sdfleet.catalog.hubs.modelscope import ModelScope
from sdfleet.catalog.pulled import PulledWeights
from sdfleet.errors import (
    HubFileNotFound,
    HubRateLimited,
    HubUnreachable,
    LicenceNotAccepted,
    RepositoryNotFound,
    SdfleetError,
    TokenNeeded,
    TokenRefused,
)
from tests.catalog.hub_server import HubServer, Refusal
from tests.catalog.hubs import CARD, TOKEN, yes


def _refusal(status: int, message: str = "no", **headers: str) -> Refusal:
    body = f'{{"Code": 1, "Message": "{message}", "RequestId": "r", "Success": false}}'.encode()
    return Refusal(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def _client(hub: HubServer, tmp_path: Path, *, token: str | None = TOKEN, sends_token: bool = True) -> ModelScope:
    access = Access(endpoint=hub.url, token=token, sends_token=sends_token)
    return ModelScope(access, notes_folder=tmp_path / "notes")


@pytest.mark.parametrize(
    ("refusal", "token", "error", "action"),
    [
        (_refusal(401), None, TokenNeeded, "set MODELSCOPE_API_TOKEN"),
        (_refusal(401), TOKEN, TokenRefused, "make a new one at https://modelscope.cn/my/myaccesstoken"),
        (_refusal(403), None, TokenNeeded, "check the name; make a token"),
        (_refusal(403), TOKEN, LicenceNotAccepted, "accept the licence there"),
        (_refusal(404), TOKEN, RepositoryNotFound, "check the name"),
        (_refusal(429, Retry_After="9"), TOKEN, HubRateLimited, "try again in 9 s"),
        (_refusal(418), TOKEN, HubUnreachable, "check the connection"),
    ],
)
def test_each_refusal_of_a_file_has_its_own_error_and_next_action(
    hub: HubServer,
    tmp_path: Path,
    refusal: Refusal,
    token: str | None,
    error: type[SdfleetError],
    action: str,
) -> None:
    client = _client(hub, tmp_path, token=token)
    listing = client.listing("Maker/Toy-1")
    hub.decide = lambda _asked: refusal
    path = "" if error is RepositoryNotFound else "vae/config.json"
    with pytest.raises(SdfleetError) as caught, client.open("Maker/Toy-1", listing, path, start=0):
        pass
    assert type(caught.value) is error
    assert action in caught.value.hint
    assert TOKEN not in str(caught.value)


def test_a_model_that_is_not_there_is_told(hub: HubServer, weights: PulledWeights, tmp_path: Path) -> None:
    card = CARD.model_copy(update={"modelscope": "Maker/Misspelt"})
    with pytest.raises(RepositoryNotFound, match="check the name"):
        plan_download(card, _client(hub, tmp_path), weights)


def test_an_answer_that_is_none_of_its_own_is_told(hub: HubServer, weights: PulledWeights, tmp_path: Path) -> None:
    hub.decide = lambda _asked: Refusal(200, {}, b"<html>Please log in to this hotel</html>")
    with pytest.raises(HubUnreachable, match="check the connection"):
        plan_download(CARD, _client(hub, tmp_path), weights)


@pytest.mark.parametrize(("status", "error"), [(401, TokenRefused), (403, LicenceNotAccepted)])
def test_a_refused_list_of_files_is_told_at_once(
    hub: HubServer, weights: PulledWeights, tmp_path: Path, status: int, error: type[SdfleetError]
) -> None:
    hub.decide = lambda _asked: _refusal(status, Retry_After="9")
    with pytest.raises(error):
        plan_download(CARD, _client(hub, tmp_path), weights)
    assert len(hub.asked) == 1


def test_a_file_that_went_away_is_told(hub: HubServer, weights: PulledWeights, tmp_path: Path) -> None:
    client = _client(hub, tmp_path)
    plan = plan_download(CARD, client, weights)
    hub.decide = lambda asked: _refusal(404) if "FilePath" in asked.path else None
    with pytest.raises(HubFileNotFound):
        fetch(plan, yes(plan), client, weights)


def test_the_token_goes_to_the_official_address(hub: HubServer, weights: PulledWeights, tmp_path: Path) -> None:
    client = _client(hub, tmp_path)
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights)
    assert {asked.token for asked in hub.asked} == {TOKEN}


def test_a_mirror_gets_no_token_unless_asked(
    hub: HubServer, weights: PulledWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the library would send by itself.
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "environment")
    client = _client(hub, tmp_path, sends_token=False)
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights)
    assert {asked.token for asked in hub.asked} == {None}
    assert not any(asked.cookie and "m_session_id" in asked.cookie for asked in hub.asked)


def test_a_mirror_that_wants_a_token_says_that_it_was_kept_back(hub: HubServer, tmp_path: Path) -> None:
    client = _client(hub, tmp_path, sends_token=False)
    listing = client.listing("Maker/Toy-1")
    hub.decide = lambda _asked: _refusal(403)
    with pytest.raises(TokenNeeded, match="SD_TOKEN_TO_MIRROR"), client.open("Maker/Toy-1", listing, "x", start=0):
        pass
