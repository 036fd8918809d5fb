"""How answers of language models are framed, kept alive and broken off, under a clock of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, MutableMapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from sdfleet.api import ollama, openai
from sdfleet.api.talk import QUIET_S, Told
from sdfleet.errors import ModelNotFound, SdfleetError, UpstreamFailed
from sdfleet.language.asking import Answer, Ask, Door, LanguageModel
from sdfleet.language.shelf import Shelf
from tests.fleet.virtual_time import run

MODEL = LanguageModel(name="m", engine="openai", capabilities=("completion",))
Step = bytes | float | SdfleetError


class Scripted(Shelf):
    """Says what is written: pieces, pauses in seconds, and how it ends."""

    def __init__(self, *script: Step) -> None:
        super().__init__()
        self._script: Sequence[Step] = script
        self.is_left = False

    @asynccontextmanager
    async def ask(self, ask: Ask) -> AsyncIterator[Answer]:
        first, *rest = self._script
        if isinstance(first, float):
            await asyncio.sleep(first)
            first, *rest = rest
        if isinstance(first, SdfleetError):
            raise first
        assert isinstance(first, bytes)
        try:
            async with aclosing(self._said(first, *rest)) as pieces:
                yield Answer(node="n1", model=MODEL, pieces=pieces)
        finally:
            self.is_left = True

    async def _said(self, *script: Step) -> AsyncGenerator[bytes]:
        for step in script:
            match step:
                case bytes():
                    yield step
                case SdfleetError():
                    raise step
                case seconds:
                    await asyncio.sleep(seconds)


async def told(language: Shelf, door: Door, *, stream: bool = True, leaves_s: float = 1e6) -> tuple[int, bytes, bool]:
    """Status, body, and whether the answer was ended."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.sleep(leaves_s)
        return {"type": "http.disconnect"}

    dialect = openai.DIALECT if door.startswith("/v1/") else ollama.DIALECT
    ask = Ask(door=door, model="m", body={"stream": stream})
    await Told(language, ask, dialect=dialect)({"type": "http"}, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"] if sent else 0, body, bool(sent) and not sent[-1].get("more_body", False)


def test_events_end_with_done_and_lines_with_their_last() -> None:
    async def main() -> None:
        assert await told(Scripted(b"1", b"2"), "/v1/chat/completions") == (
            200, b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n", True,
        )  # fmt: skip
        assert await told(Scripted(b"1", b"2"), "/api/chat") == (200, b"1\n2\n", True)
        assert await told(Scripted(b"1", b"2"), "/v1/embeddings") == (200, b"12", True)

    run(main())


def test_events_show_signs_of_life_while_a_long_prompt_is_read() -> None:
    async def main() -> None:
        status, body, _ = await told(Scripted(QUIET_S * 2.5, b"1"), "/v1/chat/completions")
        assert status == 200
        assert body == b": still reading\n\n" * 2 + b"data: 1\n\ndata: [DONE]\n\n"

    run(main())


@pytest.mark.parametrize("door", ["/v1/chat/completions", "/api/chat"])
def test_a_fault_before_the_first_piece_has_its_status(door: Door) -> None:
    async def main() -> None:
        status, body, is_ended = await told(Scripted(1.0, ModelNotFound("no m")), door)
        assert (status, is_ended) == (404, True)
        assert "no m" in str(json.loads(body)["error"])

    run(main())


def test_a_fault_after_it_is_the_last_thing_said() -> None:
    async def main() -> None:
        fault = UpstreamFailed("it broke off")
        status, body, is_ended = await told(Scripted(b"1", fault), "/v1/chat/completions")
        first, last, empty = body.split(b"\n\n")
        assert (status, first, empty, is_ended) == (200, b"data: 1", b"", True)
        assert json.loads(last[6:])["error"]["message"] == "it broke off"
        _, body, _ = await told(Scripted(b"1", fault), "/api/chat")
        assert body.splitlines()[1:] == [b'{"error": "it broke off"}']
        # What is no stream has no place for it: the connection is broken instead.
        _, body, is_ended = await told(Scripted(b"1", fault), "/v1/embeddings")
        assert (body, is_ended) == (b"1", False)

    run(main())


@pytest.mark.parametrize("script", [(b"1", 600.0), (600.0, b"1")], ids=["in the middle", "before the first"])
def test_who_leaves_ends_the_asking_at_once(script: Sequence[Step]) -> None:
    async def main() -> None:
        language = Scripted(*script)
        began_s = asyncio.get_running_loop().time()
        await told(language, "/api/chat", leaves_s=5.0)
        assert asyncio.get_running_loop().time() - began_s < 6.0
        assert language.is_left or isinstance(script[0], float)

    run(main())
