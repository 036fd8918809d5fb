from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator

import httpx2
import ollama
import pytest
from PIL import Image

from tests.api.serving import Running


@pytest.fixture(autouse=True)
def clients_are_closed() -> Iterator[None]:
    """The clients of a test are closed after it: they have no `close` of their own."""
    yield
    while _CLIENTS:
        _CLIENTS.pop()._client.close()


_CLIENTS: list[ollama.Client] = []


def _client(here: Running) -> ollama.Client:
    _CLIENTS.append(ollama.Client(host=here.url))
    return _CLIENTS[-1]


def _picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_the_client_lists_and_shows_a_model_that_draws(fake_server: Running) -> None:
    client = _client(fake_server)
    assert [model.model for model in client.list().models] == ["starter"]
    shown = client.show("starter:latest")
    assert shown.capabilities == ["image"]
    assert shown.details is not None
    assert shown.details.family == "sd"
    assert [model.model for model in client.ps().models] == ["starter"]
    with pytest.raises(ollama.ResponseError, match="not found") as missing:
        client.show("llama3")
    assert missing.value.status_code == 404


def test_the_client_draws_with_progress_and_gets_a_png_last(fake_server: Running) -> None:
    client = _client(fake_server)
    told = list(
        client.generate(
            "starter",
            "a cat",
            width=128,
            height=64,
            steps=4,
            options={"seed": 7},
            stream=True,
        )
    )
    completed = [each.completed for each in told[:-1]]
    assert completed == sorted(completed, key=lambda step: step or 0)
    assert {each.total for each in told[:-1]} == {4}
    assert told[-1].done
    assert told[-1].image is not None
    assert _picture(told[-1].image).size == (128, 64)
    whole = client.generate("starter", "a cat", width=128, height=64, steps=4, options={"seed": 7})
    assert whole.image is not None
    assert _picture(whole.image).tobytes() == _picture(told[-1].image).tobytes()


def test_a_fault_in_the_middle_is_a_line_the_client_raises(server: Callable[..., Running]) -> None:
    here = server()
    with here.holding() as gate:
        faults: list[ollama.ResponseError] = []

        def draw() -> None:
            try:
                list(_client(here).generate("starter", "x", stream=True))
            except ollama.ResponseError as exc:
                faults.append(exc)

        drawing = threading.Thread(target=draw)
        drawing.start()
        gate.wait_for_job()
        job = httpx2.get(f"{here.url}/api/jobs").json()["jobs"][0]["id"]
        httpx2.delete(f"{here.url}/api/jobs/{job}")
        drawing.join()
    assert "cancelled" in str(faults[0])


def test_an_empty_prompt_loads_or_unloads_the_model(fake_server: Running) -> None:
    client = _client(fake_server)
    assert client.generate("starter").done_reason == "load"
    assert client.generate("starter", keep_alive=0).done_reason == "unload"


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"model": "starter", "prompt": "x", "width": 5000}, 400, "width and height must be <= 4096"),
        ({"prompt": "x"}, 400, "model"),
        ({"model": "nope", "prompt": "x"}, 404, "not found"),
        ({"model": "starter", "prompt": "x", "options": {"seed": "abc"}}, 400, "seed"),
        ({"model": "starter", "prompt": "x", "images": ["%%%"]}, 400, "base64"),
        ({"model": 3}, 400, "model"),
    ],
)
def test_every_fault_is_one_line_under_error(
    fake_server: Running, body: dict[str, object], status: int, text: str
) -> None:
    answer = httpx2.post(f"{fake_server.url}/api/generate", json=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert text in answer.json()["error"]


def test_lines_are_json_whatever_the_content_type_of_the_request(fake_server: Running) -> None:
    body = json.dumps({"model": "starter", "prompt": "x", "steps": 2})
    answer = httpx2.post(f"{fake_server.url}/api/generate", content=body, headers={"Content-Type": "text/plain"})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line)["done"] for line in answer.text.splitlines()][-1]


def test_a_reader_that_leaves_takes_its_job_along(server: Callable[..., Running]) -> None:
    here = server()
    with here.holding() as gate:
        with httpx2.stream(
            "POST", f"{here.url}/api/generate", json={"model": "starter", "prompt": "x"}, timeout=60
        ) as stream:
            gate.wait_for_job()
            next(stream.iter_lines())
        job = httpx2.get(f"{here.url}/api/jobs").json()["jobs"][0]["id"]
        here.call(here.house.desk.wait(job))
        assert httpx2.get(f"{here.url}/api/jobs/{job}").json()["state"] == "cancelled"
