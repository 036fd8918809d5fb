"""What /metrics says of answers in words, at one machine and at a router, with real servers behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from sdfleet.language.asking import Ask
from sdfleet.language.counting import Counted
from sdfleet.language.openai import OpenAIEngine
from sdfleet.language.server import Server
from sdfleet.language.shelf import Shelf
from sdfleet.metrics import MOST_CHARS, MOST_LANGUAGE_MODELS, Metrics
from tests.api.serving import Running
from tests.language.llama_server import LETTERS
from tests.language.numbers import grown, told
from tests.language.streaming_upstream import streaming_upstream
from tests.language.tiny_whisper import recording

HELLO: Any = [{"role": "user", "content": "hello"}]
# The server hears some milliseconds later that its caller has gone; each look takes some too.
MOST_LOOKS = 2000


@pytest.mark.parametrize("with_usage", [True, False], ids=["usage asked for", "not asked for"])
def test_a_stream_is_counted_with_its_tokens_and_times(
    house: Running, openai_client: openai.OpenAI, *, with_usage: bool
) -> None:
    before = told(house)
    asked: Any = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = openai_client.chat.completions.create(
        model="tiny:latest", messages=HELLO, max_tokens=7, stream=True, extra_body={"grammar": LETTERS}, **asked
    )
    list(chunks)
    about = {"kind": "chat", "model": "tiny"}
    assert grown(house, before, "sdfleet_answers_total", **about, outcome="done") == 1
    assert grown(house, before, "sdfleet_answer_tokens_total", **about) == 7
    assert grown(house, before, "sdfleet_answer_first_token_seconds_count", **about) == 1
    assert grown(house, before, "sdfleet_answer_seconds_count", **about) == 1
    first_s = grown(house, before, "sdfleet_answer_first_token_seconds_sum", **about)
    assert 0 < first_s <= grown(house, before, "sdfleet_answer_seconds_sum", **about)


@pytest.mark.parametrize(
    ("path", "body", "kind", "n_tokens"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 3}, "chat", 3),
        ("/api/chat", {"messages": HELLO, "options": {"num_predict": 3}}, "chat", 3),
        ("/v1/completions", {"prompt": "a", "max_tokens": 3}, "generate", 3),
        ("/api/generate", {"prompt": "a", "stream": False, "options": {"num_predict": 3}}, "generate", 3),
        ("/v1/embeddings", {"model": "tiny-embed", "input": "a"}, "embeddings", 0),
        ("/api/embed", {"model": "tiny-embed", "input": "a"}, "embeddings", 0),
    ],
)
def test_every_door_is_counted_by_its_kind(
    house: Running, path: str, body: dict[str, Any], kind: str, n_tokens: int
) -> None:
    before, asked = told(house), {"model": "tiny", **body}
    assert httpx2.post(f"{house.url}{path}", json=asked, timeout=60).status_code == 200
    about = {"kind": kind, "model": asked["model"]}
    assert grown(house, before, "sdfleet_answers_total", **about, outcome="done") == 1
    assert grown(house, before, "sdfleet_answer_tokens_total", **about) == n_tokens
    assert grown(house, before, "sdfleet_answer_seconds_count", **about) == 1


def test_a_recording_is_counted(house: Running, openai_client: openai.OpenAI) -> None:
    before = told(house)
    openai_client.audio.transcriptions.create(model="tiny-whisper", file=("a.wav", recording()), language="en")
    about = {"kind": "transcription", "model": "tiny-whisper"}
    assert grown(house, before, "sdfleet_answers_total", **about, outcome="done") == 1


def test_a_name_that_a_caller_made_up_is_no_label(house: Running) -> None:
    before = told(house)
    for i in range(3):
        asked = {"model": f"made-up-{i}", "messages": HELLO}
        assert httpx2.post(f"{house.url}/api/chat", json=asked, timeout=60).status_code == 404
    about = {"kind": "chat", "model": "unknown", "outcome": "model_not_found"}
    assert grown(house, before, "sdfleet_answers_total", **about) == 3
    assert "made-up" not in httpx2.get(f"{house.url}/metrics", timeout=60).text


def test_what_a_server_refuses_is_counted_under_its_code(house: Running) -> None:
    before, asked = told(house), {"model": "tiny", "messages": HELLO, "top_p": "x"}
    assert httpx2.post(f"{house.url}/v1/chat/completions", json=asked, timeout=60).status_code == 400
    about = {"kind": "chat", "model": "tiny", "outcome": "upstream_refused"}
    assert grown(house, before, "sdfleet_answers_total", **about) == 1
    assert grown(house, before, "sdfleet_answer_seconds_count", kind="chat", model="tiny") == 0


def test_a_stream_is_open_until_its_caller_leaves(house: Running) -> None:
    before = told(house)
    asked = {"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 10_000_000, "grammar": LETTERS}
    with httpx2.stream("POST", f"{house.url}/v1/chat/completions", json=asked, timeout=60) as answer:
        lines = answer.iter_lines()
        for _ in range(8):
            next(lines)
        assert grown(house, before, "sdfleet_answer_streams_open", kind="chat") == 1
    about = {"kind": "chat", "model": "tiny"}
    looks = (grown(house, before, "sdfleet_answers_total", **about, outcome="left") for _ in range(MOST_LOOKS))
    assert next(filter(None, looks), 0) == 1
    assert grown(house, before, "sdfleet_answer_streams_open", kind="chat") == 0
    assert grown(house, before, "sdfleet_answer_tokens_total", **about) >= 3
    assert grown(house, before, "sdfleet_answer_seconds_count", **about) == 0


def test_of_a_server_that_counts_nothing_events_with_text_are_counted() -> None:
    metrics = Metrics()

    async def main(url: str) -> None:
        async with Shelf([OpenAIEngine(Server(url))]) as shelf:
            await shelf.look()
            body = {"messages": HELLO, "stream": True, "max_tokens": 5, "every_s": 0}
            async with Counted(shelf, metrics).ask(Ask(door="/v1/chat/completions", model="clock", body=body)) as said:
                assert len([piece async for piece in said.pieces]) == 5

    with streaming_upstream() as url:
        asyncio.run(main(url))
    assert _sample(metrics)("sdfleet_answer_tokens_total", kind="chat", model="clock") == 5


def test_models_beyond_the_most_are_counted_as_one() -> None:
    metrics = Metrics()
    for i in range(MOST_LANGUAGE_MODELS + 10):
        metrics.on_ended("chat", f"m{i}", outcome="done", n_tokens=1, spent_s=1.0, is_stream=False)
    metrics.on_ended("chat", "m0", outcome="done", n_tokens=1, spent_s=1.0, is_stream=False)
    tokens = _sample(metrics)
    assert tokens("sdfleet_answer_tokens_total", kind="chat", model="others") == 10
    assert tokens("sdfleet_answer_tokens_total", kind="chat", model="m0") == 2
    assert tokens("sdfleet_answer_tokens_total", kind="chat", model=f"m{MOST_LANGUAGE_MODELS}") is None


def test_a_long_name_is_cut() -> None:
    metrics = Metrics()
    metrics.on_ended("chat", "m" * 10_000, outcome="done", n_tokens=1, spent_s=1.0, is_stream=False)
    assert _sample(metrics)("sdfleet_answer_tokens_total", kind="chat", model="m" * MOST_CHARS) == 1


def _sample(metrics: Metrics) -> Callable[..., float | None]:
    return lambda name, **labels: metrics._registry.get_sample_value(name, labels)
