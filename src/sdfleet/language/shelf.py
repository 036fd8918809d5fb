"""The language and speech models of one machine: which engines there are, what they have, who answers what.

A model that several engines have is asked of the one with the fewest answers under way for each of its slots; one that
fails before its first piece is passed over for the next. After the first piece nobody else goes on in its place: what
has been said cannot be unsaid.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Self

from sdfleet.errors import Busy, ModelNotFound, SdfleetError, UpstreamFailed
from sdfleet.language.asking import (
    EMBEDDING,
    MANAGING,
    SPEECH,
    Answer,
    Ask,
    Engine,
    LanguageModel,
    not_found,
    same_name,
    with_first,
)
from sdfleet.language.ollama import OllamaEngine

log = logging.getLogger(__name__)

# How often engines are asked which models they have, and how soon again for a name that none of them is known to have.
LOOK_EVERY_S = 5.0
LOOK_AGAIN_S = 1.0
# A server that computes on every core may be late with its list: "not found" would be wrong, and its fault tells more.
FORGIVEN_LOOKS = 3


@dataclass(slots=True, eq=False)
class _Place:
    """An engine and what it had when last asked. n_running: answers under way. n_failed: looks in vain since."""

    engine: Engine
    models: tuple[LanguageModel, ...] = ()
    n_running: dict[str, int] = field(default_factory=dict)
    fault: str = ""
    n_failed: int = 0


class Shelf:
    """See `Language`, and the file's first lines. An async context: while inside, engines are looked at."""

    def __init__(self, engines: Sequence[Engine] = ()) -> None:
        self._places = [_Place(engine) for engine in engines]
        self._looked = asyncio.Lock()
        self._looked_s = float("-inf")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._places:
            self._task = asyncio.create_task(self._keep_looking(), name="language models")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for place in self._places:
            await place.engine.close()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is set up here that could answer."""
        return not self._places

    def models(self) -> tuple[LanguageModel, ...]:
        found: dict[str, LanguageModel] = {}
        for place in self._places:
            for model in place.models:
                known = found.setdefault(model.name, model)
                if known is not model:
                    slots = known.slots + model.slots if known.slots and model.slots else 0
                    found[model.name] = replace(known, is_warm=known.is_warm or model.is_warm, slots=slots)
        return tuple(found.values())

    def running(self) -> dict[str, int]:
        """How many answers are under way for each model in use."""
        found: dict[str, int] = {}
        for place in self._places:
            for name, n in place.n_running.items():
                found[name] = found.get(name, 0) + n
        return found

    def find(self, name: str) -> LanguageModel | None:
        models = self.models()
        exact = next((model for model in models if model.name == name), None)
        return exact or next((model for model in models if same_name(name, model.name)), None)

    def nodes_with(self, name: str) -> tuple[str, ...]:
        return ()

    def pullers(self) -> tuple[str, ...]:
        return ("",) if any(isinstance(place.engine, OllamaEngine) for place in self._places) else ()

    def faults(self) -> tuple[str, ...]:
        """Why engines could not say what they have."""
        return tuple(place.fault for place in self._places if place.fault)

    async def look(self, *, at_most_s_ago: float = 0.0) -> None:
        """Ask every engine what it has, unless that was done just now; one that is asked in vain again has nothing."""
        async with self._looked:
            now_s = asyncio.get_running_loop().time()
            if now_s - self._looked_s < at_most_s_ago:
                return
            await asyncio.gather(*(self._look_at(place) for place in self._places))
            self._looked_s = asyncio.get_running_loop().time()

    @asynccontextmanager
    async def ask(self, ask: Ask) -> AsyncIterator[Answer]:
        places = self._candidates(ask)
        if not places and self._places and ask.door not in MANAGING:
            await self.look(at_most_s_ago=LOOK_AGAIN_S)  # it may have come a moment ago
            places = self._candidates(ask)
        fault: SdfleetError = not_found(ask.model)
        for n_retries, (place, model) in enumerate(places):
            with _counted(place, model.name):
                async with aclosing(place.engine.answer(model, ask)) as pieces:
                    try:
                        first = await anext(pieces, None)
                    except (UpstreamFailed, Busy, ModelNotFound) as exc:
                        fault = exc
                        log.info("an engine did not answer", extra={"model": model.name, "why": exc.code})
                        continue
                    if first is None:
                        fault = UpstreamFailed("the server of the model answered with nothing")
                        continue
                    async with aclosing(with_first(first, pieces)) as all_pieces:
                        yield Answer(node="", model=model, pieces=all_pieces, n_retries=n_retries)
                    if ask.door in MANAGING:
                        await self.look()
                    return
        raise fault

    def _candidates(self, ask: Ask) -> list[tuple[_Place, LanguageModel]]:
        wanted = "transcription" if ask.door in SPEECH else "embedding" if ask.door in EMBEDDING else "completion"
        if ask.door == "/api/pull":
            coming = LanguageModel(name=ask.model, engine="ollama", capabilities=())
            return [(place, coming) for place in self._places if isinstance(place.engine, OllamaEngine)]
        found = []
        for place in self._places:
            if ask.door == "/api/delete" and not isinstance(place.engine, OllamaEngine):
                continue
            for model in place.models:
                if same_name(ask.model, model.name):
                    load = place.n_running.get(model.name, 0) / max(1, model.slots)
                    order = (model.name != ask.model, wanted not in model.capabilities, not model.is_warm, load)
                    found.append((order, place, model))
        return [(place, model) for _, place, model in sorted(found, key=lambda one: one[0])]

    async def _look_at(self, place: _Place) -> None:
        try:
            place.models, place.fault, place.n_failed = await place.engine.models(), "", 0
        except SdfleetError as exc:
            if not place.fault:
                log.warning("an engine of language models cannot be asked", extra={"why": str(exc)})
            place.fault = str(exc)
            place.n_failed += 1
            if place.n_failed >= FORGIVEN_LOOKS:
                place.models = ()

    async def _keep_looking(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)


@contextmanager
def _counted(place: _Place, name: str) -> Iterator[None]:
    """While inside, one more answer of a model is under way."""
    place.n_running[name] = place.n_running.get(name, 0) + 1
    try:
        yield
    finally:
        place.n_running[name] -= 1
        if not place.n_running[name]:
            del place.n_running[name]
