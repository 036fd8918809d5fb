"""What is asked of a language or speech model, and what comes back: the faces that the API and the fleet share.

    door      the path a caller came through; it decides the shape of the answer
    Ask       one request, its JSON as it came
    Answer    pieces of the answer in that shape, each one JSON text (or the only one, of any kind)

An engine that has the caller's own door is given the JSON untouched and its pieces are passed through; for another one
`ollama_over_openai.py` translates.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sdfleet.errors import ModelNotFound

Door = Literal[
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
    "/api/transcribe",
    "/api/pull",
    "/api/delete",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
]

# Having models come and go: what an Ollama can, and whoever asks has said yes to.
MANAGING: frozenset[Door] = frozenset({"/api/pull", "/api/delete"})
SPEECH: frozenset[Door] = frozenset({"/api/transcribe", "/v1/audio/transcriptions", "/v1/audio/translations"})
EMBEDDING: frozenset[Door] = frozenset({"/api/embed", "/api/embeddings", "/v1/embeddings"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A model that answers here. engine: what runs it. is_warm: in memory now, as far as that is told.

    n_bytes: of its weights, 0 where nobody says; in memory the same is counted. slots: answers at once, 0 if unknown.
    expires_at: RFC 3339, when it leaves the memory. details, digest, modified_at: as `/api/tags` lists them.
    """

    name: str
    engine: Literal["openai", "ollama", "whisper"]
    capabilities: tuple[str, ...]
    is_warm: bool = False
    n_bytes: int = 0
    slots: int = 0
    n_context: int = 0
    modified_at: str = ""
    expires_at: str = ""
    digest: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaking:
    """How a language model stands on a node; those that are neither in memory nor in use are not named."""

    model: str
    is_warm: bool
    n_running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """A recording as it was uploaded, in any format that the engine reads."""

    name: str
    kind: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. body: its JSON object, or the fields of its form, as they came; prompts are in it, so never shown.

    model: as the caller calls it. node: the only one that is meant; "" where any will do.
    """

    door: Door
    model: str
    body: Mapping[str, object] = field(repr=False)
    sound: Sound | None = None
    node: str = ""

    @property
    def is_stream(self) -> bool:
        """Whether pieces are wanted as they come: Ollama's routes stream unless told not to, OpenAI's only if told."""
        if self.door in EMBEDDING or self.door in {"/api/transcribe", "/api/delete"}:
            return False
        asked = self.body.get("stream")
        return asked is not False if self.door.startswith("/api/") else asked in {True, "true"}

    @property
    def kind(self) -> str:
        """The media type of an answer that is no stream."""
        is_text = self.door in SPEECH and self.body.get("response_format") in {"text", "srt", "vtt"}
        return "text/plain; charset=utf-8" if is_text else "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer whose first piece has come. node: who gives it, "" for this machine; n_retries: who failed before.

    pieces: all of them; where they break off, reading them raises UpstreamFailed. Of an answer that does not stream
    they are parts of one body, in order.
    """

    node: str
    model: LanguageModel
    pieces: AsyncGenerator[bytes]
    n_retries: int = 0


class Engine(Protocol):
    """One server, or one process of ours, that answers for some models."""

    async def models(self) -> tuple[LanguageModel, ...]:
        """What it answers for now. Raises UpstreamFailed where it cannot be asked."""

    def answer(self, model: LanguageModel, ask: Ask) -> AsyncGenerator[bytes]:
        """The pieces of an answer in the shape of the caller's door; closing it stops the engine's work.

        Raises UpstreamRefused, UpstreamFailed, Busy; after a piece only UpstreamFailed.
        """

    async def close(self) -> None:
        """Let go of connections and processes."""


class Language(Protocol):
    """Whoever answers: this machine's engines, or a router's nodes."""

    def models(self) -> tuple[LanguageModel, ...]:
        """Every model that answers now, each name once."""

    def find(self, name: str) -> LanguageModel | None:
        """The model that is meant by a name, with or without `:latest`."""

    def running(self) -> Mapping[str, int]:
        """How many answers are under way for each model in use."""

    def nodes_with(self, name: str) -> tuple[str, ...]:
        """The nodes that have a model."""

    def pullers(self) -> tuple[str, ...]:
        """The nodes that are known to be able to have models come and go, "" for this machine."""

    def ask(self, ask: Ask) -> AbstractAsyncContextManager[Answer]:
        """The answer, once its first piece is here; leaving the context stops what still goes on.

        Raises ModelNotFound, UpstreamRefused, UpstreamFailed, Busy.
        """


def same_name(asked: str, known: str) -> bool:
    """Whether a model is meant by a name: `:latest` may be left out, as Ollama's clients do.

    >>> same_name("llama3", "llama3:latest"), same_name("llama3:latest", "llama3"), same_name("llama3", "llama3:8b")
    (True, True, False)
    """
    return asked.removesuffix(":latest") == known.removesuffix(":latest")


def not_found(name: str) -> ModelNotFound:
    """What a caller is told who names a model that nobody has."""
    return ModelNotFound(f"model(s) {name[:80]!r} not found on any node", hint="see /api/tags")


async def with_first(first: bytes, others: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """All pieces, of which the first was read already."""
    yield first
    async for piece in others:
        yield piece
