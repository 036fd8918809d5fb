"""Models come and go over HTTP: never without a yes, with Ollama's own client too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import ollama
import pytest

from tests.api.serving import Running
from tests.catalog.conftest import online
from tests.catalog.hub_server import HubServer, gated, serving
from tests.catalog.hubs import LARGE, toy_hub

__all__ = ["online"]

CARD = """
name = "toy"
family = "sd"
hf = "Maker/Toy-1"
aliases = ["x/toy"]
licence = "Toy Licence"
width_px = 64
height_px = 64
steps = 4
guidance = 2.0
sampler = "ddim"
"""


@pytest.fixture
def hub(tmp_path: Path, online: None) -> Iterator[HubServer]:  # noqa: ARG001 - sets the stage
    with serving(toy_hub(tmp_path / "published")) as running:
        yield running


@pytest.fixture
def here(server: Callable[..., Running], hub: HubServer, tmp_path: Path) -> Running:
    """A server that knows the card of the hub's model."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "toy.toml").write_text(CARD)
    return server(model_dir=models, hf_endpoint=hub.url)


def _post(here: Running, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{here.url}/api/pull", json={"model": "toy", **body}, timeout=60)


def _statuses(answer: httpx2.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


def test_without_a_yes_the_plan_is_shown_and_nothing_is_downloaded(here: Running, hub: HubServer) -> None:
    answer = _post(here)
    body = answer.json()
    assert (answer.status_code, body["code"]) == (409, "confirmation_required")
    assert "Toy Licence" in body["error"]
    assert "confirm" in body["error"]
    assert body["plan"]["n_bytes"] == sum(file["n_bytes"] for file in body["plan"]["files"])
    assert hub.asked_for("resolve") == []


def test_with_the_token_of_the_plan_it_is_downloaded_and_usable_without_a_restart(here: Running) -> None:
    confirm = _post(here).json()["confirm"]
    told = _statuses(_post(here, confirm=confirm))
    assert told[0] == {"status": "pulling manifest"}
    assert [line["status"] for line in told[-3:]] == ["verifying sha256 digest", "writing manifest", "success"]
    transfers = [line for line in told if "digest" in line]
    assert all(line["status"] == f"pulling {line['digest'].partition(':')[2][:12]}" for line in transfers)
    assert transfers[-1]["completed"] == transfers[-1]["total"]
    drawn = httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "a dot", "model": "x/toy:latest"}, timeout=60)
    assert drawn.status_code == 200, drawn.text


def test_without_streaming_one_object_says_success(here: Running) -> None:
    confirm = _post(here).json()["confirm"]
    assert _post(here, confirm=confirm, stream=False).json() == {"status": "success"}
    # Here already: no yes is needed for nothing.
    assert _statuses(_post(here))[-1] == {"status": "success"}


def test_a_token_for_another_state_of_the_repository_says_no_yes(here: Running, hub: HubServer) -> None:
    confirm = _post(here).json()["confirm"]
    hub.files["vae/config.json"] += b" "
    again = _post(here, confirm=confirm)
    assert again.status_code == 409
    assert again.json()["confirm"] != confirm
    assert hub.asked_for("resolve") == []


@pytest.mark.parametrize("confirm", ["", "yes", "9999999999.", "9999999999.00", "1.ab", "²." + "0" * 64, "ü"])
def test_a_made_up_token_says_no_yes(here: Running, confirm: str) -> None:
    assert _post(here, confirm=confirm).status_code == 409


def test_the_setting_is_a_yes_too(server: Callable[..., Running], hub: HubServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "toy.toml").write_text(CARD)
    here = server(model_dir=models, hf_endpoint=hub.url, pull_without_asking=True)
    client = ollama.Client(host=here.url)
    assert [part.status for part in client.pull("toy", stream=True)][-1] == "success"
    client._client.close()


def test_ollamas_client_is_told_what_to_do_when_nobody_said_yes(here: Running) -> None:
    client = ollama.Client(host=here.url)
    with pytest.raises(ollama.ResponseError, match="needs a yes") as caught:
        client.pull("toy")
    assert caught.value.status_code == 409
    client._client.close()


def test_a_gated_model_says_the_next_action_before_it_asks_for_a_yes(here: Running, hub: HubServer) -> None:
    hub.is_gated = True
    hub.decide = lambda asked: gated(401) if "auth-check" in asked.path else None
    answer = _post(here)
    assert answer.status_code == 403
    assert "set HF_TOKEN" in answer.json()["error"]


def test_a_fault_in_the_middle_is_the_last_line(here: Running, hub: HubServer) -> None:
    hub.announced_sha256[LARGE] = "0" * 64
    confirm = _post(here).json()["confirm"]
    last = _statuses(_post(here, confirm=confirm))[-1]
    assert last["code"] == "download_damaged"
    assert "try again" in last["error"]


def test_a_model_nobody_knows_is_not_found(here: Running) -> None:
    answer = httpx2.post(f"{here.url}/api/pull", json={"model": "tyo"})
    assert answer.status_code == 404
    assert "did you mean 'toy'" in answer.json()["error"]
    assert httpx2.post(f"{here.url}/api/pull", json={}).status_code == 400


def test_only_a_caller_who_may_manage_pulls_or_deletes(here: Running) -> None:
    _, secret = here.call(here.house.keys.create("reader", scopes=frozenset({"generate", "read"})))
    headers = {"Authorization": f"Bearer {secret}"}
    pulled = httpx2.post(f"{here.url}/api/pull", json={"model": "toy"}, headers=headers)
    deleted = httpx2.request("DELETE", f"{here.url}/api/delete", json={"model": "toy"}, headers=headers)
    for answer in (pulled, deleted):
        assert answer.status_code == 403
        assert "--scope manage" in answer.json()["error"]


def test_a_deleted_model_is_gone_and_an_import_keeps_its_folder(here: Running, tmp_path: Path) -> None:
    confirm = _post(here).json()["confirm"]
    _post(here, confirm=confirm)
    client = ollama.Client(host=here.url)
    assert client.delete("toy").status == "success"
    assert not (tmp_path / "models/weights/toy").exists()
    with pytest.raises(ollama.ResponseError):
        client.delete("toy")
    here.house.catalog.add(tmp_path / "published", name="mine")
    client.delete("mine")
    assert (tmp_path / "published/model_index.json").is_file()
    with pytest.raises(ollama.ResponseError, match="built in"):
        client.delete("starter")
    client._client.close()


def test_a_model_that_a_job_needs_is_not_deleted(here: Running) -> None:
    confirm = _post(here).json()["confirm"]
    _post(here, confirm=confirm)
    with here.holding() as gate:
        job = httpx2.post(f"{here.url}/api/jobs", json={"prompt": "a dot", "model": "toy"})
        assert job.is_success, job.text
        gate.wait_for_job()
        answer = httpx2.request("DELETE", f"{here.url}/api/delete", json={"model": "toy"})
        assert answer.status_code == 409
        assert "sdfleet jobs cancel" in answer.json()["error"]
