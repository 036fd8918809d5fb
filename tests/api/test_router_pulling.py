"""A node downloads and deletes models when its router's owner says so: for this node, this plan, with a yes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.api.serving import PATIENCE_S, Running, running
from tests.api.test_pulling import CARD
from tests.catalog.conftest import online
from tests.catalog.hub_server import HubServer, serving
from tests.catalog.hubs import toy_hub
from tests.cli.conftest import Run, home, run
from tests.fleet.houses import RouterInMemory

__all__ = ["home", "online", "run"]


@pytest.fixture
def hub(tmp_path: Path, online: None) -> Iterator[HubServer]:  # noqa: ARG001 - sets the stage
    with serving(toy_hub(tmp_path / "published")) as here:
        yield here


@pytest.fixture
def router(tmp_path: Path, hub: HubServer) -> Iterator[Running]:
    home = tmp_path / "router"
    for models in (home / "models", home / "home-of-n1/models", home / "home-of-n2/models"):
        models.mkdir(parents=True)
        (models / "toy.toml").write_text(CARD)
    with running(home, opens=RouterInMemory("n1", "n2"), hf_endpoint=hub.url) as here:
        yield here


def _pull(router: Running, node: str = "n1", **body: Any) -> httpx2.Response:
    return httpx2.post(f"{router.url}/fleet/nodes/{node}/pull", json={"model": "toy", **body}, timeout=60)


def _holders(router: Running) -> list[str]:
    models = httpx2.get(f"{router.url}/api/image-models").json()["models"]
    return next((model["fleet_nodes"] for model in models if model["name"] == "toy"), [])


def _wait(router: Running, holders: list[str]) -> None:
    """Return when the router has heard who has the model."""
    end_s = time.monotonic() + PATIENCE_S
    while _holders(router) != holders:
        assert time.monotonic() < end_s, f"{_holders(router)} have it"


def test_the_nodes_plan_is_shown_and_nothing_is_downloaded_without_a_yes(router: Running, hub: HubServer) -> None:
    answer = _pull(router)
    body = answer.json()
    assert (answer.status_code, body["code"], body["plan"]["node"]) == (409, "confirmation_required", "n1")
    assert "at node n1" in body["error"]
    assert "home-of-n1" in body["plan"]["folder"]
    assert hub.asked_for("resolve") == []


def test_after_a_yes_the_node_downloads_and_draws(router: Running) -> None:
    told = [json.loads(line) for line in _pull(router, confirm=_pull(router).json()["confirm"]).text.splitlines()]
    assert told[0] == {"status": "pulling manifest"}
    assert told[-1] == {"status": "success"}
    assert any(line.get("completed") for line in told)
    _wait(router, ["n1"])
    asked = {"model": "toy", "prompt": "a dot", "steps": 1}
    assert httpx2.post(f"{router.url}/api/generate-image", json=asked, timeout=60).headers["x-fleet-node"] == "n1"
    assert _pull(router, stream=False).json() == {"status": "success"}


def test_a_yes_for_one_node_is_none_for_another(router: Running, hub: HubServer) -> None:
    confirm = _pull(router, "n1").json()["confirm"]
    assert _pull(router, "n2", confirm=confirm).status_code == 409
    assert hub.asked_for("resolve") == []


def test_a_node_forgets_a_model(router: Running) -> None:
    _pull(router, confirm=_pull(router).json()["confirm"])
    _wait(router, ["n1"])
    assert httpx2.post(f"{router.url}/fleet/nodes/n1/forget", json={"model": "toy"}).status_code == 200
    _wait(router, [])
    assert not (router.house.settings.home / "home-of-n1/models/toy").exists()


@pytest.mark.parametrize(
    ("method", "path", "verb"), [("POST", "/api/pull", "pull"), ("DELETE", "/api/delete", "forget")]
)
def test_a_router_wants_to_know_at_which_node(router: Running, method: str, path: str, verb: str) -> None:
    answer = httpx2.request(method, f"{router.url}{path}", json={"model": "toy"})
    assert answer.status_code == 400
    assert f"sdfleet fleet {verb} NODE toy" in answer.json()["error"]
    assert "n1, n2" in answer.json()["error"]


def test_the_command_shows_the_plan_and_pulls_after_a_yes(router: Running, run: Run) -> None:
    refused = run("fleet", "pull", "n2", "toy", "--router", router.url)
    assert (refused.code, "sdfleet fleet pull n2 toy --yes" in refused.err) == (1, True)
    assert "home-of-n2" in refused.out
    done = run("fleet", "pull", "n2", "toy", "--yes", "--router", router.url)
    assert done.out.splitlines()[-1] == "n2 has toy"
    _wait(router, ["n2"])
    assert "n2 has toy" in run("fleet", "pull", "n2", "toy", "--router", router.url).out
