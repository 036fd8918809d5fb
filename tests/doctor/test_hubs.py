"""Each reason for which a hub gives nothing, against a hub on loopback that speaks to the real client library."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdfleet.doctor.examining import Examined, Examiner
from sdfleet.doctor.machine import Machine
from sdfleet.doctor.table import checks
from tests.catalog.conftest import online
from tests.catalog.hub_server import HubServer, Refusal, gated, serving
from tests.catalog.hubs import TOKEN, toy_hub
from tests.doctor.stage import cure, look, machine

__all__ = ["online"]

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture
def hub(tmp_path: Path, online: None) -> Iterator[HubServer]:  # noqa: ARG001 - sets the stage
    toy = toy_hub(tmp_path / "published")
    toy.repo_id = SD15
    with serving(toy) as running:
        yield running


def _machine(folder: Path, hub: HubServer, **changes: Any) -> Machine:
    return machine(folder, hf_endpoint=hub.url, **{"may_ask_hub": True, "asked_model": "sd15", **changes})


@pytest.mark.parametrize(
    ("refusal", "token", "told", "action"),
    [
        (gated(401), None, "given only to accounts", "make a token at https://huggingface.co/settings/tokens"),
        (gated(403), TOKEN, "has not accepted the licence", f"accept it at https://huggingface.co/{SD15}"),
        (Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), TOKEN,
         "does not know the token", "make a new one at https://huggingface.co/settings/tokens"),
        (Refusal(403), TOKEN, "may not read", "edit it at https://huggingface.co/settings/tokens"),
        (Refusal(404, {"X-Error-Code": "RepoNotFound"}), TOKEN, "there is no model", "check the name"),
        (Refusal(403, {"X-Error-Message": "Access to this resource is disabled."}), TOKEN, "taken down", "modelscope"),
        (Refusal(404, {"X-Error-Code": "RevisionNotFound"}), TOKEN, "is not in", "try again"),
        (Refusal(429, {"Retry-After": "9"}), TOKEN, "wants fewer requests", "try again in 9 s"),
        (Refusal(500), TOKEN, "status 500", "check the connection and the proxy"),
    ],
)  # fmt: skip
def test_each_cause_of_401_and_403_is_told_apart_with_its_next_action(
    hub: HubServer, tmp_path: Path, refusal: Refusal, token: str | None, told: str, action: str
) -> None:
    hub.decide = lambda _asked: refusal
    # The token goes to this hub as it would to the official one.
    there = _machine(tmp_path, hub, hf_token=token, token_to_mirror=True)
    found = look("hub-access", there)
    assert found.verdict == "fault"
    assert told in found.what
    assert action in cure("hub-access", there)


def test_the_eighth_cause_is_found_without_asking_anybody(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    off = _machine(tmp_path, hub, variables={"HF_HUB_OFFLINE": "1"}, may_ask_hub=False)
    assert cure("hub-offline", off) == "unset HF_HUB_OFFLINE"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset it" in cure("hub-access", off)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("environ", "verdict"), [({}, "ok"), ({"HF_HUB_OFFLINE": "0"}, "ok"), ({"TRANSFORMERS_OFFLINE": "1"}, "ok")]
)
def test_downloads_that_are_not_switched_off_are_well(tmp_path: Path, environ: dict[str, str], verdict: str) -> None:
    assert look("hub-offline", machine(tmp_path, variables=environ)).verdict == verdict


def test_a_model_that_the_hub_gives_is_well_and_none_of_its_weights_are_asked_for(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.is_gated = True
    found = look("hub-access", _machine(tmp_path, hub, hf_token=TOKEN, token_to_mirror=True))
    assert (found.verdict, "gated, and open to this account" in found.what) == ("ok", True)
    assert hub.asked_for("resolve") == []


def test_a_gate_behind_a_listing_that_everybody_may_see_is_found(hub: HubServer, tmp_path: Path) -> None:
    hub.is_gated = True
    hub.decide = lambda asked: gated(403) if "auth-check" in asked.path else None
    found = look("hub-access", _machine(tmp_path, hub, hf_token=TOKEN, token_to_mirror=True))
    assert "has not accepted the licence" in found.what


def test_no_token_goes_to_a_mirror(hub: HubServer, tmp_path: Path) -> None:
    hub.is_gated = True
    there = _machine(tmp_path, hub, hf_token=TOKEN)
    for name in ("hub-access", "hub-reachable"):
        look(name, there)
    assert len(hub.asked) > 1
    assert {asked.token for asked in hub.asked} == {None}


def test_a_token_that_is_kept_from_a_mirror_is_told(hub: HubServer, tmp_path: Path) -> None:
    kept = _machine(tmp_path, hub, hf_token=TOKEN, may_ask_hub=False)
    assert "SD_TOKEN_TO_MIRROR=true if you trust the mirror" in cure("token-kept-back", kept)
    sent = _machine(tmp_path, hub, hf_token=TOKEN, token_to_mirror=True, may_ask_hub=False)
    assert cure("token-kept-back", sent) == "unset SD_TOKEN_TO_MIRROR"
    assert look("token-kept-back", machine(tmp_path, hf_token=TOKEN)).verdict == "ok"
    assert look("token-kept-back", machine(tmp_path)).verdict == "not_applicable"


def test_nothing_is_asked_of_a_hub_without_leave(hub: HubServer, tmp_path: Path) -> None:
    found = Examiner().examine(_machine(tmp_path, hub, may_ask_hub=False), checks(["hub-access", "hub-reachable"]))
    assert [one.finding.verdict for one in found] == ["not_applicable", "not_applicable"]
    assert "--network" in found[0].finding.what
    assert hub.asked == []


def test_a_hub_that_answers_is_well(hub: HubServer, tmp_path: Path) -> None:
    assert look("hub-reachable", _machine(tmp_path, hub)).what == f"Hugging Face answers at {hub.url}"


@pytest.mark.usefixtures("online")
def test_a_hub_that_cannot_be_reached_is_a_fault_with_three_ways_out(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        there = machine(tmp_path, hf_endpoint=address, may_ask_hub=True)
        assert f"{address} cannot be reached" in look("hub-reachable", there).what
    action = cure("hub-reachable", there)
    assert all(way in action for way in ("HTTPS_PROXY", "SD_HF_ENDPOINT", "--from modelscope"))


def test_a_hub_with_a_fault_of_its_own_is_told(hub: HubServer, tmp_path: Path) -> None:
    hub.decide = lambda _asked: Refusal(503)
    assert "status 503" in look("hub-reachable", _machine(tmp_path, hub)).what


@pytest.mark.parametrize(("off_s", "told"), [(3600.0, "60 min ahead"), (-3600.0, "60 min behind")])
def test_a_clock_that_disagrees_with_the_hub_is_told(hub: HubServer, tmp_path: Path, off_s: float, told: str) -> None:
    there = _machine(tmp_path, hub, clock=lambda: time.time() + off_s)
    assert told in look("hub-reachable", there).what
    assert "timedatectl set-ntp true" in cure("hub-reachable", there)


@pytest.mark.usefixtures("online")
def test_a_proxy_that_does_not_answer_is_named_by_its_variable(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        environ = {"HTTPS_PROXY": f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}"}
        silent = machine(tmp_path, variables=environ)
        assert look("proxy", silent).verdict == "ok"
        found = look("proxy", machine(tmp_path, variables=environ, may_ask_hub=True))
    assert found.verdict == "fault"
    assert "HTTPS_PROXY, 127.0.0.1:" in found.what
    assert "secret" not in found.what


@pytest.mark.parametrize("value", ["http://", "http://proxy:port"])
def test_a_proxy_that_is_no_address_is_told(tmp_path: Path, value: str) -> None:
    assert cure("proxy", machine(tmp_path, variables={"HTTP_PROXY": value})).startswith("unset HTTP_PROXY")


def test_a_machine_without_a_proxy_is_well(tmp_path: Path) -> None:
    assert look("proxy", machine(tmp_path, variables={"HTTP_PROXY": ""})).what == "no proxy is set"


def test_where_every_reason_ends_the_answer_still_comes_through_the_examiner(hub: HubServer, tmp_path: Path) -> None:
    hub.decide = lambda _asked: gated(401)
    (one,) = Examiner().examine(_machine(tmp_path, hub), checks(["token-needed"]))
    assert isinstance(one, Examined)
    assert (one.entry.id, one.finding.verdict) == ("hub-access", "fault")
