"""Whoever answers, with every answer counted: what kind it was, of which model, how it ended, how many tokens it had.

A token is what the model's server counted, at the end of its answer; of a stream that ends without a count (it broke
off, its caller left, or OpenAI's `stream_options` did not ask for one) each event with text counts as one. That is how
llama.cpp, vLLM and Ollama send them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from sdfleet.errors import SdfleetError
from sdfleet.language.asking import EMBEDDING, MANAGING, SPEECH, Answer, Ask, Language, LanguageModel

Kind = Literal["chat", "generate", "embeddings", "transcription", "translation"]

# How an answer ended that no error ended: whole, or because its caller went away.
DONE, LEFT = "done", "left"
# A name that a caller made up must not become a label.
UNKNOWN = "unknown"
# The count stands at the end of an answer, behind at most a few facts of the server's own.
_TAIL_BYTES = 8192
# Inside a text of the answer the quotes would have backslashes before them.
_TOLD = re.compile(rb'"(?:completion_tokens|eval_count|predicted_n)"\s*:\s*(\d{1,12})')
_TEXT = re.compile(rb'"(?:content|text|response|thinking|reasoning|reasoning_content|arguments)"\s*:\s*"[^"]')


class AnswerObserver(Protocol):
    """What can be counted about answers; the composer joins it to the metrics. Must not block or raise."""

    def on_asked(self, kind: Kind, *, is_stream: bool) -> None:
        """A request is passed on; `on_ended` follows."""

    def on_first_token(self, kind: Kind, model: str, *, after_s: float) -> None:
        """A stream begins to speak."""

    def on_ended(self, kind: Kind, model: str, *, outcome: str, n_tokens: int, spent_s: float, is_stream: bool) -> None:
        """No more comes. outcome: `done`, `left`, or an error's code. model: `unknown` where nobody has it."""


def kind_of(ask: Ask) -> Kind:
    """What is asked for.

    >>> kind_of(Ask(door="/v1/completions", model="m", body={})), kind_of(Ask(door="/api/embed", model="m", body={}))
    ('generate', 'embeddings')
    """
    if ask.door in SPEECH:
        return "translation" if ask.door == "/v1/audio/translations" else "transcription"
    if ask.door in EMBEDDING:
        return "embeddings"
    return "chat" if "chat" in ask.door else "generate"


@dataclass(slots=True)
class _Count:
    """One answer, as far as it has come. tail: its last two pieces."""

    ask: Ask
    began_s: float = field(default_factory=time.monotonic)
    model: str = ""
    n_texts: int = 0
    tail: tuple[bytes, bytes] = (b"", b"")
    is_whole: bool = False

    async def read(self, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """The pieces, untouched."""
        has_texts = self.ask.is_stream and self.ask.door not in SPEECH
        async for piece in pieces:
            if has_texts and _TEXT.search(piece):
                self.n_texts += 1
            self.tail = (self.tail[1], piece)
            yield piece
        self.is_whole = True

    @property
    def n_tokens(self) -> int:
        """See the file's first lines; 0 for vectors and recordings."""
        if self.ask.door in SPEECH or self.ask.door in EMBEDDING:
            return 0
        told = _TOLD.findall(b"".join(self.tail)[-_TAIL_BYTES:])
        return int(told[-1]) if told else self.n_texts


class Counted:
    """See `Language`, and the file's first lines."""

    def __init__(self, language: Language, observer: AnswerObserver) -> None:
        self._language = language
        self._observer = observer

    def models(self) -> tuple[LanguageModel, ...]:
        return self._language.models()

    def find(self, name: str) -> LanguageModel | None:
        return self._language.find(name)

    def running(self) -> Mapping[str, int]:
        return self._language.running()

    def nodes_with(self, name: str) -> tuple[str, ...]:
        return self._language.nodes_with(name)

    def pullers(self) -> tuple[str, ...]:
        return self._language.pullers()

    @asynccontextmanager
    async def ask(self, ask: Ask) -> AsyncIterator[Answer]:
        if ask.door in MANAGING:  # no answer in words
            async with self._language.ask(ask) as answer:
                yield answer
            return
        with self._counted(ask) as count:
            async with self._language.ask(ask) as answer:
                count.model = answer.model.name
                if ask.is_stream:
                    after_s = time.monotonic() - count.began_s
                    self._observer.on_first_token(kind_of(ask), count.model, after_s=after_s)
                async with aclosing(count.read(answer.pieces)) as pieces:
                    yield replace(answer, pieces=pieces)

    @contextmanager
    def _counted(self, ask: Ask) -> Iterator[_Count]:
        kind, count, outcome = kind_of(ask), _Count(ask), SdfleetError.code
        self._observer.on_asked(kind, is_stream=ask.is_stream)
        try:
            yield count
            outcome = DONE if count.is_whole else LEFT
        except SdfleetError as exc:
            outcome = exc.code
            raise
        except asyncio.CancelledError:
            outcome = LEFT
            raise
        finally:
            known = None if count.model else self.find(ask.model)
            self._observer.on_ended(
                kind,
                count.model or (UNKNOWN if known is None else known.name),
                outcome=outcome,
                n_tokens=count.n_tokens,
                spent_s=time.monotonic() - count.began_s,
                is_stream=ask.is_stream,
            )
