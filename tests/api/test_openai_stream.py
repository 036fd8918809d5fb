"""`stream: true`: pictures in the making as server-sent events, read by OpenAI's own client and as raw lines."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from sdfleet.api import openai_stream
from sdfleet.domain import JobId
from sdfleet.errors import EngineFailed
from tests.api.pixels import format_of, from_base64, picture_file
from tests.api.serving import PATIENCE_S, Running


@pytest.fixture
def client(fake_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fake_server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def _blocks(text: str) -> list[tuple[str | None, dict[str, Any]]]:
    """Every event of a stream: its name and its data; comments left out."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("event"), json.loads(lines["data"])))
    return found


def test_partial_pictures_are_spread_evenly_and_come_before_the_whole(
    client: openai.OpenAI, fake_server: Running
) -> None:
    with fake_server.holding() as gate:
        stream = client.images.generate(
            prompt="a red fox", stream=True, partial_images=3, size="256x192", extra_body={"seed": 7, "steps": 20}
        )
        for index in range(3):
            gate.let(5)
            event = next(stream)
            assert event.type == "image_generation.partial_image"
            assert event.partial_image_index == index
            preview = from_base64(event.b64_json)
            assert (preview.width_px, preview.height_px, event.size) == (256, 192, "256x192")
        gate.let()
        done = next(stream)
        assert done.type == "image_generation.completed"
        assert next(stream, None) is None
    assert (done.quality, done.background, done.output_format) == ("medium", "opaque", "png")
    assert done.usage.output_tokens == 16 * 12
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    whole = client.images.generate(prompt="a red fox", size="256x192", extra_body={"seed": 7, "steps": 20})
    assert whole.data is not None
    assert from_base64(done.b64_json) == from_base64(whole.data[0].b64_json)


def test_every_picture_has_its_completed_event_and_usage_adds_up(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="a red fox", n=3, stream=True, extra_body={"seed": 7}))
    assert [event.type for event in events] == ["image_generation.completed"] * 3
    assert [event.seed for event in events] == [7, 8, 9]  # type: ignore[union-attr]
    usages = [event.usage for event in events if event.type == "image_generation.completed"]
    assert sum(usage.input_tokens for usage in usages) == 3
    assert sum(usage.output_tokens for usage in usages) == 3 * 64


def test_a_stream_of_an_edit_has_its_own_names(client: openai.OpenAI, fake_server: Running) -> None:
    with fake_server.holding() as gate:
        stream = client.images.edit(
            image=picture_file(64), prompt="a fox", stream=True, partial_images=1, output_format="webp"
        )
        gate.wait_for_job()
        gate.let(12)
        first = next(stream)
        gate.let()
        rest = list(stream)
    assert [event.type for event in (first, *rest)] == ["image_edit.partial_image", "image_edit.completed"]
    assert all(event.output_format == "webp" for event in (first, *rest))


def test_the_async_client_reads_the_stream(fake_server: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{fake_server.url}/v1", api_key="none", timeout=30) as client:
            stream = await client.images.generate(prompt="a red fox", stream=True)
            return [event.type async for event in stream]

    assert asyncio.run(ask()) == ["image_generation.completed"]


def test_with_streaming_response_gives_the_raw_answer(client: openai.OpenAI) -> None:
    with client.images.with_streaming_response.generate(prompt="a red fox") as response:
        assert response.headers["x-request-id"]
        assert response.parse().created


def test_previews_have_the_format_asked_for(fake_server: Running) -> None:
    body = {"prompt": "a fox", "stream": True, "partial_images": 1, "output_format": "jpeg", "steps": 4}
    url = f"{fake_server.url}/v1/images/generations"
    with fake_server.holding() as gate, httpx2.stream("POST", url, json=body, timeout=30) as response:
        gate.let(2)
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        preview = json.loads(next(lines).removeprefix("data: "))
        gate.let()
        whole = json.loads(next(lines).removeprefix("data: "))
    assert {format_of(base64.b64decode(event["b64_json"])) for event in (preview, whole)} == {"jpeg"}


def test_the_first_byte_comes_before_the_drawing_begins(fake_server: Running) -> None:
    with fake_server.holding() as gate:
        body = {"prompt": "a red fox", "stream": True}
        with httpx2.stream("POST", f"{fake_server.url}/v1/images/generations", json=body, timeout=30) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-store"
            lines = response.iter_lines()
            assert next(lines).startswith(": job ")
            gate.let()
            assert "event: image_generation.completed" in list(lines)


def test_signs_of_life_are_comments_that_the_client_skips(
    client: openai.OpenAI, fake_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_stream, "HEARTBEAT_S", 0.01)
    with fake_server.holding() as gate:
        body = {"prompt": "a red fox", "stream": True}
        with httpx2.stream("POST", f"{fake_server.url}/v1/images/generations", json=body, timeout=30) as response:
            lines = response.iter_lines()
            assert [line for line, _ in zip(lines, range(5), strict=False)][2:] == [
                ": still drawing",
                "",
                ": still drawing",
            ]
            gate.let()
            list(lines)
        assert [event.type for event in client.images.generate(prompt="a fox", stream=True)] == [
            "image_generation.completed"
        ]


def test_a_fault_after_the_status_line_is_an_event_that_raises(client: openai.OpenAI, fake_server: Running) -> None:
    backend = fake_server.house.runtime._backend
    backend._script.append(EngineFailed("the picture is black", hint="try float32"))  # type: ignore[attr-defined]
    with pytest.raises(openai.APIError, match="the picture is black") as met:
        list(client.images.generate(prompt="a red fox", stream=True))
    assert met.value.code == "engine_failed"


def test_a_bad_request_is_answered_before_the_stream_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="a red fox", stream=True, size="10x10x10")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a red fox", stream=True, model="nope")


def test_a_reader_who_leaves_takes_the_job_along(fake_server: Running) -> None:
    with fake_server.holding() as gate:
        body = {"prompt": "a red fox", "stream": True}
        with httpx2.stream("POST", f"{fake_server.url}/v1/images/generations", json=body, timeout=30) as response:
            lines = response.iter_lines()
            job_id = next(lines).removeprefix(": job ")
            gate.wait_for_job()
        job = fake_server.call(fake_server.house.desk.wait(JobId(job_id), deadline_s=PATIENCE_S))
    assert job.state == "cancelled"


def test_a_stream_past_its_time_says_so(server: Callable[..., Running]) -> None:
    here = server(request_timeout_s=0.05)
    with here.holding():
        response = httpx2.post(
            f"{here.url}/v1/images/generations", json={"prompt": "a red fox", "stream": True}, timeout=30
        )
    ((name, data),) = _blocks(response.text)
    assert (name, data["error"]["code"]) == (None, "deadline_exceeded")


@pytest.mark.slow
def test_the_built_in_model_shows_itself_drawing(starter_server: Running) -> None:
    with openai.OpenAI(base_url=f"{starter_server.url}/v1", api_key="none", timeout=120) as client:
        events = list(client.images.generate(prompt="a red fox", stream=True, partial_images=3, size="512x512"))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert all(from_base64(event.b64_json).width_px == 512 for event in events)
    assert len({event.b64_json for event in events}) == 4
