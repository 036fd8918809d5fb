"""A router speaks every dialect as one machine does, with nodes behind it."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import httpx2
import pytest
from PIL import Image

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
from tests.fleet.houses import RouterInMemory

DIALECTS: tuple[ModuleType, ...] = (
    test_a1111, test_herd, test_jobs, test_native, test_ollama, test_openai_clients, test_openai_edits,
    test_openai_faults, test_openai_generations, test_openai_stream,
)  # fmt: skip


def _claims() -> Iterator[Any]:
    """Every test of a dialect that wants nothing but a server."""
    for module in DIALECTS:
        for name, claim in vars(module).items():
            if name.startswith("test_") and list(inspect.signature(claim).parameters) == ["fake_server"]:
                yield pytest.param(claim, id=f"{module.__name__.rpartition('.')[2]}-{name.removeprefix('test_')}")


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("router"), opens=RouterInMemory("n1", "n2")) as here:
        yield here


@pytest.mark.parametrize("claim", list(_claims()))
def test_what_one_machine_answers_a_router_answers(claim: Callable[[Running], None], router: Running) -> None:
    claim(router)


def test_a_router_and_one_machine_give_the_same_pixels(router: Running, fake_server: Running) -> None:
    asked = {"prompt": "a red fox", "seed": 7, "steps": 3, "width": 128, "height": 128}
    drawn = [
        httpx2.post(f"{here.url}/api/txt2img", json={**asked, "response_format": "b64_json"}).json()["images"]
        for here in (router, fake_server)
    ]
    assert drawn[0] == drawn[1]


def test_an_input_picture_reaches_the_node(router: Running, fake_server: Running) -> None:
    stream = io.BytesIO()
    Image.effect_noise((128, 128), 60.0).convert("RGB").save(stream, "PNG")
    files = {"image": ("a.png", stream.getvalue(), "image/png")}
    asked = {"prompt": "x", "seed": "7", "n": "1"}
    drawn = [
        httpx2.post(f"{here.url}/v1/images/edits", data=asked, files=files).json()["data"][0]["b64_json"]
        for here in (router, fake_server)
    ]
    assert drawn[0] == drawn[1]


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


