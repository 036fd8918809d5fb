"""A node's models as its router hears of them: what is on the disk, what is on the device, what may be done to them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import psutil

from sdfleet.catalog.consent import Consent
from sdfleet.catalog.download import DownloadPlan, facts_of, plan_download
from sdfleet.catalog.headers import PICKLES
from sdfleet.catalog.hubs.hub import Hub, Source
from sdfleet.catalog.identify import Identified
from sdfleet.catalog.pulling import Pulling
from sdfleet.catalog.store import Catalog, Entry
from sdfleet.errors import CheckpointError, InvalidValue
from sdfleet.fleet.catalog import announced
from sdfleet.fleet.messages import AdapterHere, ModelHere, Order, StepCurve
from sdfleet.runtime import Runtime

# Of each file, besides its size: enough to tell two sets of weights of one architecture apart, without reading them.
_SAMPLE_BYTES = 65_536
_N_SAMPLES = 4


# Of what a LoRA's maker wrote into it, which can be megabytes.
SHOWN_METADATA = ("ss_output_name", "ss_base_model_version", "modelspec.title")
# Slots while nothing was measured, and the most: a second job waits on the device already when the first is done.
FIRST_SLOTS, MOST_SLOTS = 2, 16
# A slot more must save this part of the time per picture, as in engine/batcher.py.
_MUST_SAVE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of a device, in bytes."""

    total_bytes: int
    free_bytes: int


class Stock:
    """See the file's first line. Looks at the disk in a thread; a folder that has not changed is not read again.

    hub: where weights come from, for a source that was named or for the node's own choice; without it none are pulled.
    """

    def __init__(
        self, catalog: Catalog, runtime: Runtime, *, hub: Callable[[Source | None], Hub] | None = None
    ) -> None:
        self._catalog = catalog
        self._runtime = runtime
        self._hub = hub
        self._names: dict[str, str] = {}
        self._identities: dict[Path, tuple[object, str]] = {}
        self._curves_of: tuple[object, tuple[StepCurve, ...]] = (None, ())

    async def models(self) -> tuple[ModelHere, ...]:
        """Everything that can be drawn with here; what is broken is left out (the catalog says so when asked)."""
        return await asyncio.to_thread(self._models)

    def on_device(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the models in memory, and of those among them that are pinned."""
        here = [(self._names.get(each.checkpoint), each.is_pinned) for each in self._runtime.residents.here()]
        loaded = tuple(name for name, _ in here if name is not None)
        return loaded, tuple(name for name, is_pinned in here if name is not None and is_pinned)

    async def adapters(self) -> tuple[AdapterHere, ...]:
        """Every readable LoRA and embedding here."""
        return await asyncio.to_thread(self._adapters)

    def curves(self) -> tuple[StepCurve, ...]:
        """What the engine has measured of steps of several pictures, for models that are known here."""
        told = self._runtime.capabilities().facts.get("step_s", ())
        if told != self._curves_of[0]:
            self._curves_of = told, tuple(_curves(cast("list[Mapping[str, Any]]", told), self._names))
        return self._curves_of[1]

    def memory(self, device_bytes: int, *, beside_bytes: int = 0, coming_bytes: int = 0) -> Memory:
        """Of the device: what the engine says, else `device_bytes`; this machine's where both are silent.

        beside_bytes: what language models hold on it. Pictures never get that: their model is in use, or may be at any
        moment, and nobody would bring it back. coming_bytes: the part of it that no measurement shows yet.
        """
        facts = self._runtime.capabilities().facts
        machine = psutil.virtual_memory()
        total = cast("int", facts.get("memory_bytes", 0)) or device_bytes
        if not total:
            return Memory(total_bytes=machine.total, free_bytes=max(0, machine.available - coming_bytes))
        taken = cast("int", facts.get("resident_bytes", 0))
        measured = cast("int | None", facts.get("memory_free_bytes"))
        free = total - taken - beside_bytes if measured is None else measured - coming_bytes
        return Memory(total_bytes=total, free_bytes=max(0, free))

    async def obey(self, order: Order, tell: Callable[[Mapping[str, object]], Awaitable[None]]) -> Mapping[str, object]:
        """Do what the router wants with a model. tell: told how a pull goes.

        Raises what the runtime, the catalog and the hub raise, InvalidValue for what a node does not do.
        """
        match order.order:
            case "load":
                await self._runtime.load(order.model)
            case "unload":
                await self._runtime.unload(order.model)
            case "pin":
                await self._runtime.load(order.model, is_pinned=True)
            case "unpin":
                await self._runtime.unpin(order.model)
            case "plan":
                plan = (await self._planned(order))[0]
                return {"id": plan.id, **facts_of(plan)}
            case "pull":
                await self._pull(order, tell)
            case "forget":
                return {"n_freed_bytes": await self._forget(order.model)}
            case "stop":
                raise InvalidValue("order", "stop is not an order of its own")
        return {}

    async def _forget(self, model: str) -> int:
        """Bytes that are free now; of an imported model only the name is forgotten, its folder stays."""
        name = (await asyncio.to_thread(self._catalog.card, model)).name
        with contextlib.suppress(CheckpointError):  # broken or half here: removing it is the cure
            await self._runtime.unload(name)
        return await asyncio.to_thread(self._catalog.forget, name)

    async def _planned(self, order: Order) -> tuple[DownloadPlan, Hub]:
        if self._hub is None:
            raise InvalidValue("order", "this node downloads nothing", hint="do it at the node itself")
        hub = self._hub(order.source)
        card = await asyncio.to_thread(self._catalog.card, order.model)
        return await asyncio.to_thread(plan_download, card, hub, self._catalog.weights), hub

    async def _pull(self, order: Order, tell: Callable[[Mapping[str, object]], Awaitable[None]]) -> None:
        plan, hub = await self._planned(order)
        if plan.refusal is not None and not plan.is_here:
            raise plan.refusal
        # The router's caller said yes to the plan of this id, for this node; `fetch` refuses any other.
        consent = Consent(plan_id=order.consent, given_by="api")
        async with contextlib.aclosing(Pulling(plan, consent, hub, self._catalog.weights).statuses()) as statuses:
            async for status in statuses:
                await tell(status)

    def _models(self) -> tuple[ModelHere, ...]:
        found = []
        for entry in self._catalog.entries():
            if entry.card.backend is not None:
                continue  # a router knows models by their files
            try:
                inspected = self._catalog.inspect(entry)
            except CheckpointError:
                continue
            self._names[str(entry.folder)] = entry.card.name
            found.append(announced(entry, inspected, identity=self._identity(entry, inspected)))
        return tuple(found)

    def _adapters(self) -> tuple[AdapterHere, ...]:
        found = []
        kinds: tuple[Literal["lora", "embedding"], ...] = ("lora", "embedding")
        for kind in kinds:
            for one in self._catalog.adapters.all(kind):
                facts = one.facts
                shown = {key: one.metadata[key] for key in SHOWN_METADATA if key in one.metadata}
                here = AdapterHere(
                    kind=kind, name=one.name, n_bytes=one.n_bytes, family=facts.family or "", widths=facts.widths,
                    n_vectors=facts.n_vectors, word=facts.word, metadata=shown,
                )  # fmt: skip
                found.append(here)
        return tuple(found)

    def _identity(self, entry: Entry, found: Identified) -> str:
        files = sorted(path for path in entry.folder.rglob("*") if path.is_file() and path.suffix not in PICKLES)
        state = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        known = self._identities.get(entry.folder)
        if known is None or known[0] != state:
            known = self._identities[entry.folder] = state, _identity_of(entry.folder, files, found)
        return known[1]


def _identity_of(folder: Path, files: list[Path], found: Identified) -> str:
    """A hash of everything that decides a picture, as far as it can be had without reading gigabytes."""
    digest = hashlib.sha256(json.dumps([found.family, found.pipeline_class, found.t5]).encode())
    for path in files:
        if path.suffix not in {".safetensors", ".json", ".txt", ".model", ".gguf"}:
            continue
        n_bytes = path.stat().st_size
        digest.update(f"\0{path.relative_to(folder)}\0{n_bytes}\0".encode())
        with path.open("rb") as file:
            for index in range(_N_SAMPLES):
                file.seek(max(0, n_bytes - _SAMPLE_BYTES) * index // (_N_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def slots_of(curves: tuple[StepCurve, ...]) -> int:
    """How many pictures a device should draw at once: up to where sharing a step no longer saves time per picture.

    Of several models the most is taken: who is given too many jobs draws them in smaller batches.

    >>> slots_of((StepCurve(model="sd15", work=0.25, rows_s=(0.10, 0.12, 0.0, 0.20)),))
    4
    >>> slots_of((StepCurve(model="sd15", work=0.25, rows_s=(0.10, 0.20, 0.0, 0.40)),))
    2
    """
    most = FIRST_SLOTS
    for curve in curves:
        known = [(n, seconds / n) for n, seconds in enumerate(curve.rows_s, start=1) if seconds > 0]
        for (_, before_s), (n, each_s) in itertools.pairwise(known):
            if each_s > before_s * (1 - _MUST_SAVE):
                break
            most = max(most, n)
    return min(most, MOST_SLOTS)


def _curves(told: list[Mapping[str, Any]], names: Mapping[str, str]) -> Iterator[StepCurve]:
    """The engine's measurements, for models with a name; see `Engine.facts`."""
    for one in told:
        name = names.get(one["checkpoint"])
        if name is not None:
            seconds = dict(one["picture_s"])
            rows_s = tuple(float(seconds.get(n, 0.0)) for n in range(1, max(seconds) + 1))
            yield StepCurve(model=name, work=float(one["megapixels"]), rows_s=rows_s)
