"""A router speaks every dialect as one machine does, with nodes behind it."""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from PIL import Image

from sdfleet.fleet import join_code
from sdfleet.fleet.transport_memory import MemoryBroker
from tests.api import (
    test_a1111,
    test_herd,
    test_jobs,
    test_native,
    test_ollama,
    test_openai_clients,
    test_openai_edits,
    test_openai_faults,
    test_openai_generations,
    test_openai_stream,
)
from tests.api.serving import Running, running
from tests.api.test_ollama import clients_are_closed
from tests.fleet.houses import PLACE, RouterInMemory

__all__ = ["clients_are_closed"]

DIALECTS: tuple[ModuleType, ...] = (
    test_a1111, test_herd, test_jobs, test_native, test_ollama, test_openai_clients, test_openai_edits,
    test_openai_faults, test_openai_generations, test_openai_stream,
)  # fmt: skip


# What a router answers otherwise, on purpose.
OTHERWISE = {
    "test_the_queue_and_the_fleet_count_this_machine",  # it counts its nodes, see below
    "test_the_client_lists_and_shows_a_model_that_draws",  # models are in the memory of nodes: /fleet/status
    "test_an_empty_prompt_loads_or_unloads_the_model",  # as above: sdfleet fleet load
}


def _claims() -> Iterator[Any]:
    """Every test of a dialect that wants nothing but a server."""
    for module in DIALECTS:
        for name, claim in vars(module).items():
            if not name.startswith("test_") or name in OTHERWISE:
                continue
            if list(inspect.signature(claim).parameters) == ["fake_server"]:
                yield pytest.param(claim, id=f"{module.__name__.rpartition('.')[2]}-{name.removeprefix('test_')}")


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("router"), opens=RouterInMemory("n1", "n2")) as here:
        yield here


@pytest.mark.parametrize("claim", list(_claims()))
def test_what_one_machine_answers_a_router_answers(claim: Callable[[Running], None], router: Running) -> None:
    claim(router)


def test_a_router_and_one_machine_give_the_same_pixels(router: Running, fake_server: Running) -> None:
    asked = {"model": "starter", "prompt": "a red fox", "seed": 7, "steps": 3, "width": 128, "height": 128}
    drawn = [httpx2.post(f"{here.url}/api/generate-image", json=asked).content for here in (router, fake_server)]
    assert _pixels(drawn[0]) == _pixels(drawn[1])


def test_an_input_picture_reaches_the_node(router: Running, fake_server: Running) -> None:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(stream, "PNG")
    asked = {"model": "starter", "prompt": "x", "seed": "7"}

    def edited(here: Running) -> bytes:
        files = {"image": ("a.png", stream.getvalue(), "image/png")}
        answer = httpx2.post(f"{here.url}/v1/images/edits", data=asked, files=files)
        return _pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))

    assert edited(router) == edited(fake_server)


def _pixels(file: bytes) -> bytes:
    with Image.open(io.BytesIO(file)) as image:
        return image.convert("RGB").tobytes()


def test_the_answer_names_the_node_that_drew(router: Running) -> None:
    answer = httpx2.post(f"{router.url}/api/generate-image", json={"model": "starter", "prompt": "x", "steps": 2})
    assert answer.headers["x-fleet-node"] in {"n1", "n2"}
    job = httpx2.get(f"{router.url}/api/jobs/{answer.headers['x-job-id']}").json()
    assert job["node"] == answer.headers["x-fleet-node"]
    assert job["why"].startswith(f"{job['node']}: done in ")


def test_the_fleet_is_shown_with_its_nodes(router: Running) -> None:
    httpx2.post(f"{router.url}/api/generate-image", json={"model": "starter", "prompt": "x", "steps": 2})
    told = httpx2.get(f"{router.url}/fleet/status").json()
    assert (told["fleet"]["nodes_total"], told["fleet"]["nodes_online"]) == (2, 2)
    assert [node["node_id"] for node in told["nodes"]] == ["n1", "n2"]
    assert all(node["image"]["models_available"][0]["name"] == "starter" for node in told["nodes"])
    models = httpx2.get(f"{router.url}/api/image-models").json()["models"]
    assert [model["fleet_nodes"] for model in models if model["name"] == "starter"] == [["n1", "n2"]]
    stats = httpx2.get(f"{router.url}/dashboard/api/image-stats").json()
    assert set(stats["by_node"]) & {"n1", "n2"}
    assert stats["recent"][0]["node_id"] in {"n1", "n2"}


def test_a_waiting_job_is_explained_and_the_wait_is_predicted(router: Running) -> None:
    asked = {"prompt": "x", "steps": 4}
    with router.holding() as gate:
        # Four pictures for each node, and one more.
        made = [httpx2.post(f"{router.url}/api/jobs", json=asked).json()["id"] for _ in range(9)]
        gate.wait_for_job()
        told = httpx2.get(f"{router.url}/fleet/jobs/{made[-1]}/why").json()
        queue = httpx2.get(f"{router.url}/fleet/queue").json()
    assert told["state"] == "queued"
    assert {one["name"] for one in told["placement"]["candidates"]} == {"n1", "n2"}
    assert told["why"]
    assert queue["estimated_wait_ms"] > 0
    for job in made:
        router.call(router.house.desk.wait(job))


def test_a_drained_node_is_given_nothing(router: Running) -> None:
    assert httpx2.post(f"{router.url}/fleet/nodes/n1/drain").json() == {"nodes": ["n1"]}
    try:
        answers = [
            httpx2.post(f"{router.url}/api/generate-image", json={"model": "starter", "prompt": "x", "steps": 1})
            for _ in range(4)
        ]
        assert {answer.headers["x-fleet-node"] for answer in answers} == {"n2"}
        node = next(n for n in httpx2.get(f"{router.url}/fleet/status").json()["nodes"] if n["node_id"] == "n1")
        assert node["is_draining"]
        assert node["free_slots"] == 0
    finally:
        httpx2.post(f"{router.url}/fleet/nodes/n1/undrain")


def test_a_model_is_pinned_at_a_node_and_let_go(router: Running) -> None:
    asked = {"model": "starter"}
    assert httpx2.post(f"{router.url}/fleet/nodes/n2/pin", json=asked).status_code == 200
    assert _node(router, "n2")["pinned"] == ["starter"]
    assert httpx2.post(f"{router.url}/fleet/nodes/n2/unpin", json=asked).status_code == 200
    assert _node(router, "n2")["pinned"] == []


def test_what_a_node_answers_to_an_order_reaches_the_caller(router: Running) -> None:
    answer = httpx2.post(f"{router.url}/fleet/nodes/n1/load", json={"model": "no-such-model"})
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_name")


def test_a_limit_keeps_jobs_away(router: Running) -> None:
    for node in ("n1", "n2"):
        httpx2.post(f"{router.url}/fleet/nodes/{node}/limit", json={"max_steps": 3})
    try:
        job = httpx2.post(f"{router.url}/api/jobs", json={"prompt": "x", "steps": 5}).json()["id"]
        told = httpx2.get(f"{router.url}/fleet/jobs/{job}/why").json()
        assert told["state"] == "queued"
        assert told["why"].startswith("no device can take it")
    finally:
        for node in ("n1", "n2"):
            httpx2.post(f"{router.url}/fleet/nodes/{node}/limit", json={})
    assert router.call(router.house.desk.wait(job)).state == "done"


@pytest.mark.parametrize("verb", ["approve", "revoke", "drain", "undrain"])
def test_a_node_that_does_not_exist_is_named_in_the_refusal(router: Running, verb: str) -> None:
    answer = httpx2.post(f"{router.url}/fleet/nodes/nobody/{verb}")
    assert answer.status_code == 404
    assert "nobody" in answer.json()["error"]


def test_a_code_is_a_command_that_joins(router: Running) -> None:
    told = httpx2.post(f"{router.url}/fleet/code").json()
    assert told["command"] == f"sdfleet node --join {told['code']}"
    assert join_code.parse(told["code"]).places == (PLACE,)


def test_a_revoked_node_is_out_of_the_fleet(tmp_path: Path) -> None:
    with running(tmp_path, opens=RouterInMemory("n1", "n2")) as here:
        assert httpx2.post(f"{here.url}/fleet/nodes/n1/revoke").status_code == 200
        assert [node["node_id"] for node in httpx2.get(f"{here.url}/fleet/status").json()["nodes"]] == ["n2"]


def test_what_is_done_to_a_fleet_needs_the_right_to_manage(tmp_path: Path) -> None:
    with running(tmp_path, opens=RouterInMemory("n1"), api_key="owner") as here:
        _, made = here.call(here.house.keys.create("reader", scopes=frozenset({"read", "generate"})))
        headers = {"Authorization": f"Bearer {made}"}
        for path in ("code", "nodes/n1/drain", "nodes/n1/revoke", "nodes/n1/approve"):
            assert httpx2.post(f"{here.url}/fleet/{path}", headers=headers).status_code == 403
        assert httpx2.get(f"{here.url}/fleet/pending", headers=headers).status_code == 403
        assert httpx2.get(f"{here.url}/fleet/status", headers=headers).status_code == 200


def test_one_machine_says_that_it_has_no_fleet(fake_server: Running) -> None:
    answer = httpx2.post(f"{fake_server.url}/fleet/nodes/n1/drain")
    assert (answer.status_code, answer.json()["hint"]) == (404, "start one: sdfleet router")


def test_a_second_router_waits_until_the_first_has_ended(tmp_path: Path) -> None:
    broker = MemoryBroker()
    with (
        running(tmp_path / "a", opens=RouterInMemory("n1", broker=broker)),
        running(tmp_path / "b", opens=RouterInMemory("n2", broker=broker), is_loaded=False) as second,
    ):
        answer = httpx2.post(f"{second.url}/api/generate-image", json={"model": "starter", "prompt": "x"})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert not httpx2.get(f"{second.url}/status").json()["loaded"]


def _node(here: Running, name: str) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = httpx2.get(f"{here.url}/fleet/status").json()["nodes"]
    return next(node for node in nodes if node["node_id"] == name)


def test_a_model_of_the_nodes_is_no_fault_of_the_router(router: Running) -> None:
    told = httpx2.get(f"{router.url}/dashboard/api/health", timeout=60).json()["recommendations"]
    assert [one for one in told if one["check_id"] == "default-model"] == []
