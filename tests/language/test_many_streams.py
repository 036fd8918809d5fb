"""500 answers at once through a router and two nodes: every token of each, once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from sdfleet.language.openai import OpenAIEngine
from sdfleet.language.server import Server
from tests.api.serving import Running, running
from tests.fleet.houses import RouterInMemory
from tests.language.readers import read_many
from tests.language.streaming_upstream import streaming_upstream


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Running]:
    with streaming_upstream() as url:
        language = {name: lambda: [OpenAIEngine(Server(url))] for name in ("n1", "n2")}
        with running(tmp_path, opens=RouterInMemory("n1", "n2", language=language)) as here:
            while not any(one["id"] == "clock" for one in httpx2.get(f"{here.url}/v1/models").json()["data"]):
                pass
            yield here


@pytest.mark.parametrize("n_streams", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_every_stream_is_whole(router: Running, n_streams: int) -> None:
    n_tokens = 20
    found = asyncio.run(read_many(router.url, n_streams, n_tokens=n_tokens, every_s=0.05))
    assert [one.status for one in found] == [200] * n_streams
    assert all(one.is_whole for one in found)
    assert all(one.numbers == list(range(n_tokens)) for one in found)
    assert router.house.language.running() == {}


@pytest.mark.slow
def test_as_many_answers_as_llama_cpp_takes_at_once(machine: Running) -> None:
    """Eight slots: 40 wait in llama.cpp's own line, and all are answered."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 20}

    async def main() -> list[str]:
        async with httpx2.AsyncClient(timeout=120) as client:
            url = f"{machine.url}/v1/chat/completions"
            answers = await asyncio.gather(*(client.post(url, json=asked) for _ in range(40)))
        return [answer.text for answer in answers]

    assert all(text.endswith("data: [DONE]\n\n") for text in asyncio.run(main()))
