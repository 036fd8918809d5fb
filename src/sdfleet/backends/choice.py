"""Which backend draws a request: the one that is named, else one that can, is here, and has the model in memory.

    named        that one, or the reason why not
    the default  SD_DEFAULT_BACKEND, where it has the model
    automatic    whichever can draw it here: one that has the model in memory first, then in the order of `rank`

What draws outside this machine is never chosen automatically. The choice is made once, when a job is accepted, and
stands in its request: another backend would draw another picture from the same seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sdfleet.backends.base import Backend, BackendState, Capabilities, OnProgress
from sdfleet.catalog.cards import Card, Family
from sdfleet.catalog.store import Catalog, Entry
from sdfleet.domain import AUTO, BACKENDS, LOCAL, Drawing, ImageRequest, ImageResult, JobId
from sdfleet.errors import (
    BackendNotNamed,
    BackendUnavailable,
    BadRequest,
    CheckpointError,
    CheckpointNotFound,
    SdfleetError,
    UnknownName,
    UnsupportedByModel,
)

# This machine's own engine, under the names that people give it by the kind of model.
OWN: Mapping[str, tuple[Family, ...]] = {"sd": ("sd", "sdxl", "sd3"), "flux-local": ("flux", "flux2", "zimage")}
FAKE = "fake"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to make pictures beside this machine's own engine.

    id: one of domain.BACKENDS.
    reason: why nothing can be drawn with it now, and what to do about it; empty where it can. Called often, in any
        thread: never waits, looks at a file at most. A way without a key, or not installed, says so here.
    families: it reads weights of these in the catalog's folders; `check` decides about the single model.
    cards: models that it has by itself, each with `Card.backend` set to this id; folder: only where there is one.
    check: what it would leave out of a request for one of its models, as warnings. Raises a BadRequest for what it
        cannot draw (this model, this size, a LoRA, no room). Called in a worker thread; must not wait for long.
    service: who is sent the prompt, where that leaves this machine; empty where it does not. Such a way is never chosen
        automatically.
    is_ours: it draws in memory that this server may use as it likes; another program's is not filled for nothing.
    rank: lower is preferred, between ways that can draw a request and have its model in memory alike; ours has 10.
    look: finds out anew how it stands and what it has; must not raise, and returns at once when it did so lately.
        None: it knows by itself.
    """

    id: str
    backend: Backend
    reason: Callable[[], str]
    check: Callable[[Card, ImageRequest], tuple[str, ...]]
    families: tuple[Family, ...] = ()
    cards: Callable[[], tuple[Card, ...]] = tuple
    service: str = ""
    is_ours: bool = True
    rank: int = 20
    look: Callable[[], Awaitable[None]] | None = None


OWN_RANK = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one backend stands. engine: what is behind the id."""

    id: str
    engine: str
    state: BackendState
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who draws a request, and with what. warnings: what the caller should be told about it.

    service: who is sent the prompt, where that leaves this machine. is_ours: see `Way`.
    """

    backend: str
    entry: Entry
    warnings: tuple[str, ...] = ()
    service: str = ""
    is_ours: bool = True


class Backends:
    """All backends of a machine behind the face of one. own: this machine's engine; others: what stands beside it.

    default: the id that is tried first where a request names none. is_fleet: own is a fleet, whose nodes choose.
    """

    def __init__(
        self, own: Backend, others: Sequence[Way] = (), *, default: str | None = None, is_fleet: bool = False
    ) -> None:
        self.own = own
        self._others = {way.id: way for way in others}
        self._default = None if default == AUTO else default
        self._is_fleet = is_fleet
        self._looks = [way.look for way in others if way.look is not None]

    # ------------------------------------------------------------------------------------------------------ the choice

    def choose(self, request: ImageRequest, catalog: Catalog) -> Choice:
        """Who draws this request. Blocks: cards and folders are read.

        Raises what `Catalog.resolve` does, BackendUnavailable, BackendNotNamed, and a BadRequest that says what the one
        that was named cannot draw.
        """
        named = None if request.backend == AUTO else request.backend
        if named is not None:
            return self._named(named, request, catalog)
        if self._default is not None and (found := self._by_default(self._default, request, catalog)) is not None:
            return found
        return self._automatic(request, catalog)

    def may_be_own(self, request: ImageRequest) -> bool:
        """Whether this machine's own engine may come to draw it; asked before anything was looked at."""
        named = self._default if request.backend in {None, AUTO} else request.backend
        return named not in self._others

    def _named(self, name: str, request: ImageRequest, catalog: Catalog) -> Choice:
        way = self._others.get(name)
        if way is not None:
            if reason := way.reason():
                raise BackendUnavailable(way.id, reason)
            return self._by_way(way, catalog.resolve(request.model, backend=way.id), request)
        if name not in OWN and name != LOCAL and not (name == FAKE and self.own.capabilities().name == FAKE):
            raise BackendUnavailable(name, self._why_not_here(name))
        entry = catalog.resolve(request.model)
        if entry.card.backend is not None:
            raise UnsupportedByModel(
                f"{entry.card.name} is drawn by {entry.card.backend} alone, not by {name}",
                hint="name that, or another model; see /api/backends",
            )
        if name in OWN and entry.card.family not in OWN[name]:
            raise UnsupportedByModel(
                f"{entry.card.name} is not a model of the backend {name}", hint="see /api/backends"
            )
        return self._by_own(entry, name=name if name == FAKE else None)

    def _by_default(self, name: str, request: ImageRequest, catalog: Catalog) -> Choice | None:
        """The default backend, where it has the model; None where another is to be looked for."""
        way = self._others.get(name)
        try:
            if way is not None:
                entry = catalog.resolve(request.model, backend=way.id)
                if entry.card.backend not in {None, way.id} or not (entry.card.backend or self._reads(way, entry.card)):
                    return None
            return self._named(name, request, catalog)
        except (UnsupportedByModel, CheckpointError):
            return None
        except UnknownName:
            if way is not None and (reason := way.reason()):
                raise BackendUnavailable(way.id, reason) from None
            raise

    def _automatic(self, request: ImageRequest, catalog: Catalog) -> Choice:
        entry = catalog.resolve(request.model)
        card = entry.card
        if card.backend is not None:
            way = self._others.get(card.backend)
            if way is not None and way.service:
                raise _not_named(way, card, request, catalog)
            return self._named(card.backend, request, catalog)
        best = self._by_own(entry)
        key = (not _is_warm(self.own, entry), OWN_RANK)
        for way in self._others.values():
            if way.service or not self._reads(way, card) or way.reason():
                continue
            this = (not _is_warm(way.backend, entry), way.rank)
            if this >= key:
                continue
            try:
                found = self._by_way(way, entry, request)
            except BadRequest:
                continue
            if not found.warnings:  # who would leave something out draws only where it was named
                best, key = found, this
        return best

    def _reads(self, way: Way, card: Card) -> bool:
        return card.family in way.families

    def _by_way(self, way: Way, entry: Entry, request: ImageRequest) -> Choice:
        card = entry.card
        if card.backend != way.id and not self._reads(way, card):
            raise UnsupportedByModel(f"{card.name} is not a model of the backend {way.id}", hint="see /api/backends")
        warnings = way.check(card, request)
        return Choice(backend=way.id, entry=entry, warnings=warnings, service=way.service, is_ours=way.is_ours)

    def _by_own(self, entry: Entry, *, name: str | None = None) -> Choice:
        if name is None:
            name = "" if self._is_fleet else own_id(entry.card)
        return Choice(backend=name, entry=entry)

    def _why_not_here(self, name: str) -> str:
        if self._is_fleet:
            return "on a router, its nodes choose; leave `backend` out, or name sd or flux-local"
        return "it is not set up on this server"

    # --------------------------------------------------------------------------------------------------- how they stand

    def standings(self) -> tuple[Standing, ...]:
        """Every backend there is a name for, and why one cannot be used; asks nobody and never waits."""
        own = self.own.capabilities()
        reason = own.reason if own.state in {"unavailable", "closed"} else ""
        names = (*OWN, FAKE) if own.name == FAKE else tuple(OWN)
        told = [Standing(id=name, engine=own.name, state=own.state, reason=reason) for name in names]
        for way in self._others.values():
            now, why = way.backend.capabilities(), way.reason()
            state: BackendState = "unavailable" if why and now.state != "closed" else now.state
            why = why or (now.reason if now.state in {"unavailable", "closed"} else "")
            told.append(Standing(id=way.id, engine=now.name, state=state, reason=why))
        known = {each.id for each in told} | {FAKE}
        missing = [name for name in BACKENDS if name not in known]
        told += [Standing(id=n, engine=n, state="unavailable", reason=self._why_not_here(n)) for n in missing]
        return tuple(told)

    def models_of(self, name: str, entries: Sequence[Entry]) -> list[str]:
        """The models that a backend draws, of these and of its own; none of one that cannot be used. Blocks."""
        way = self._others.get(name)
        if way is None and name not in {*OWN, FAKE}:
            return []
        if way is None:
            families = OWN.get(name)
            here = [entry.card for entry in entries if entry.card.backend is None]
            return [card.name for card in here if families is None or card.family in families]
        if way.reason():
            return []
        readable = [entry.card for entry in entries if entry.card.backend is None and self._reads(way, entry.card)]
        own = [card.name for card in way.cards()]
        return [*own, *(card.name for card in readable if card.name not in own and _draws(way, card))]

    def way(self, name: str) -> Way | None:
        """What stands beside our own engine under this id."""
        return self._others.get(name)

    async def look(self) -> None:
        """Find out anew how the others stand."""
        if self._looks:
            await asyncio.gather(*(look() for look in self._looks))

    # ------------------------------------------------------------------------------------------- the face of a backend

    def capabilities(self) -> Capabilities:
        """How this machine's own engine stands, with what the others hold and do besides."""
        told = self.own.capabilities()
        others = [now for way in self._others.values() if (now := way.backend.capabilities()).n_running or now.facts]
        if not others:
            return told
        facts = dict(told.facts)
        held = [name for now in (told, *others) for name in _held(now)]
        facts["checkpoints"] = list(dict.fromkeys(held))
        n_bytes: dict[str, int] = {}
        for now in (told, *others):
            for name, n in _bytes(now).items():
                n_bytes[name] = n_bytes.get(name, 0) + n
        facts["bytes_by_checkpoint"] = n_bytes
        return replace(
            told,
            n_running=told.n_running + sum(now.n_running for now in others),
            n_waiting=told.n_waiting + sum(now.n_waiting for now in others),
            facts=facts,
        )

    async def start(self) -> None:
        """Have this machine's own engine stand ready; the others start with their first job."""
        await asyncio.gather(self.own.start(), self.look())

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        return await self._of(drawing).generate(drawing, on_progress)

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        for backend in self._all():
            await backend.watch(job_id, previews=previews)

    async def cancel(self, job_id: JobId) -> None:
        for backend in self._all():
            await backend.cancel(job_id)

    async def load(self, drawing: Drawing) -> None:
        await self._of(drawing).load(drawing)

    async def unload(self, checkpoint: str) -> None:
        for backend in self._all():
            await backend.unload(checkpoint)

    async def pin(self, checkpoints: Collection[str]) -> None:
        for backend in self._all():
            await backend.pin(checkpoints)

    async def close(self) -> None:
        ended = await asyncio.gather(*(backend.close() for backend in self._all()), return_exceptions=True)
        for fault in ended:
            if fault is not None:
                raise fault

    def _all(self) -> tuple[Backend, ...]:
        return (self.own, *(way.backend for way in self._others.values()))

    def _of(self, drawing: Drawing) -> Backend:
        way = self._others.get(drawing.backend)
        if way is not None:
            return way.backend
        if drawing.backend and drawing.backend not in {*OWN, FAKE}:
            raise BackendUnavailable(drawing.backend, self._why_not_here(drawing.backend))
        return self.own


def _not_named(way: Way, card: Card, request: ImageRequest, catalog: Catalog) -> SdfleetError:
    """Why a model that a service has is not drawn: nobody has named the service, or its weights could be here."""
    error = BackendNotNamed(card.name, way.id, way.service)
    try:
        catalog.resolve_here(request.model)
    except CheckpointNotFound as exc:
        return CheckpointNotFound(exc.message, hint=f"{exc.hint}; or {error.hint}, and {way.service} draws it")
    except SdfleetError:
        pass
    return error


def cards_of(ways: Sequence[Way]) -> dict[str, tuple[Card, ...]]:
    """By id, the models that they have by themselves; none of one that cannot be used.

    Services come last: of two that answer to a name, the one that keeps the prompt here is meant.
    """
    return {way.id: way.cards() for way in sorted(ways, key=lambda way: bool(way.service)) if not way.reason()}


def own_id(card: Card) -> str:
    """What people call this machine's own engine when it draws with this model.

    >>> card = Card(name="a", family="sdxl", width_px=64, height_px=64, steps=1, guidance=1, sampler="euler")
    >>> own_id(card)
    'sd'
    """
    return next((name for name, families in OWN.items() if card.family in families), "sd")


def _draws(way: Way, card: Card) -> bool:
    try:
        way.check(card, ImageRequest(prompt="a picture", model=card.name))
    except BadRequest:
        return False
    return True


def _is_warm(backend: Backend, entry: Entry) -> bool:
    return str(entry.folder) in _held(backend.capabilities())


def _held(now: Capabilities) -> Sequence[str]:
    found = now.facts.get("checkpoints", ())
    return [str(name) for name in found] if isinstance(found, list | tuple) else []


def _bytes(now: Capabilities) -> Mapping[str, int]:
    found = now.facts.get("bytes_by_checkpoint", {})
    return {str(name): int(n) for name, n in found.items()} if isinstance(found, Mapping) else {}
