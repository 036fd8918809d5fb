"""The small engines of a pool: how many cores each has, whether there can be any now, and their start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol, cast

from sdfleet.backends.base import Backend
from sdfleet.backends.local import LocalBackend
from sdfleet.engine.events import EngineOptions
from sdfleet.errors import SdfleetError

log = logging.getLogger(__name__)

# More engines than this were never measured; on more cores each gets several.
MOST_ENGINES = 8
# An engine's process beside its weights: after a trial with the built-in model (15 MB of weights) 427 to 493 MB were
# resident (2026-11-21, two cores, torch), and larger pictures take more.
_ENGINE_BYTES = 600_000_000
# What the small engines may take of the memory that is free: pictures need some, and so do other programs.
_SHARE_OF_FREE = 0.6
# After this many the small engines are given up: what keeps them from starting is not going to change.
_MOST_FAILED_STARTS = 3


class MakeEngine(Protocol):
    """Builds one engine's backend, not yet started. Its arguments are those of `LocalBackend`."""

    def __call__(
        self, options: EngineOptions, *, name: str, cores: Collection[int] | None, on_facts: Callable[[], None]
    ) -> LocalBackend: ...


class SmallEngines:
    """Engines that share the cores; none where one would be all. Started together, when somebody wants them.

    n_engines, n_cores, free_bytes: as in `EnginePool`. wide_facts: what the wide engine says of itself.
    setting: how they are laid out, in words: what was measured with other words says nothing about them.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        n_engines: int | Literal["auto"],
        n_cores: int | None,
        make: MakeEngine,
        on_facts: Callable[[], None],
        free_bytes: Callable[[], int],
        wide_facts: Callable[[], Mapping[str, object]],
    ) -> None:
        cores = _usable_cores()
        n_cores = n_cores or options.n_threads or len(cores)
        n_small = min(n_cores, MOST_ENGINES) if n_engines == "auto" else n_engines
        n_threads = max(1, n_cores // n_small)
        self._limit_bytes = options.memory_limit_bytes
        self._free_bytes = free_bytes
        self._wide_facts = wide_facts
        self._engines: list[LocalBackend] = []
        if n_small > 1:
            limit = None if self._limit_bytes is None else self._limit_bytes // (2 * n_small)
            narrow = replace(options, n_threads=n_threads, memory_limit_bytes=limit)
            for i in range(n_small):
                mine = cores[i * n_threads : (i + 1) * n_threads] if options.n_threads is None else []
                self._engines.append(make(narrow, name=f"local-{i + 1}", cores=mine or None, on_facts=on_facts))
        self.setting = f"{n_small} engines of {n_threads} threads, {n_cores} cores, {options.dtype}"
        self.why_not = ""
        self.starting: asyncio.Task[None] | None = None
        self._n_failed_starts = 0
        self._is_given_up = False

    def __iter__(self) -> Iterator[LocalBackend]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def are_ready(self) -> bool:
        """Whether all of them stand."""
        return all(map(is_ready, self._engines))

    def hold(self, checkpoint: str) -> bool:
        """Whether each of them has a checkpoint in memory."""
        return all(_holds(engine, checkpoint) for engine in self._engines)

    def are_warm(self, checkpoint: str) -> bool:
        """Whether they hold a checkpoint and have nothing left to try out with it.

        Otherwise a job of theirs would wait for what others have: of 16 that came at once, the half that one small
        engine got took 4.3 to 5.9 s, where 2.6 was the most later on (2026-11-21).
        """
        return all(has_settled(engine, checkpoint) for engine in self._engines)

    def want(self) -> None:
        """Start them, unless they run, this is no CPU, or the memory does not hold them; `why_not` says which."""
        is_starting = self.starting is not None and not self.starting.done()
        if self._n_failed_starts >= _MOST_FAILED_STARTS or self._is_given_up or is_starting:
            return
        self.why_not = self.refusal()
        if not self.why_not and not self.are_ready:
            self.starting = asyncio.create_task(self._start(), name="small engines")

    def give_up(self) -> None:
        """Start no more."""
        self._is_given_up = True

    def refusal(self) -> str:
        """Why there can be no small engines now; "" if there can."""
        facts = self._wide_facts()
        if facts.get("device") in {"cuda", "mps"}:
            return f"one engine owns the {facts['device']} device"
        missing = [engine for engine in self._engines if not is_ready(engine)]
        weights_bytes = cast("int", facts.get("resident_bytes", 0))
        needed_bytes = len(missing) * (_ENGINE_BYTES + weights_bytes)
        free_bytes = self._free_bytes()
        if self._limit_bytes is not None:
            free_bytes = min(free_bytes, self._limit_bytes - weights_bytes)
        if needed_bytes > free_bytes * _SHARE_OF_FREE:
            return (
                f"{len(missing)} more engines take {needed_bytes / 1e9:.1f} GB, and may take "
                f"{_SHARE_OF_FREE:.0%} of the {free_bytes / 1e9:.1f} GB that are free"
            )
        return ""

    async def _start(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for engine in self._engines:
                    tasks.create_task(engine.start())
        except* SdfleetError as group:
            self._n_failed_starts += 1
            self.why_not = str(group.exceptions[0])
            log.warning("small engines could not be started, the wide one draws", extra={"why": self.why_not})


def is_ready(engine: Backend) -> bool:
    """Whether a job would be drawn at once."""
    return engine.capabilities().state == "ready"


def has_settled(engine: Backend, checkpoint: str) -> bool:
    """Whether an engine holds a checkpoint, and says that what draws with it stays. It says so after its picture."""
    facts = engine.capabilities().facts
    executors = cast("Mapping[str, Mapping[str, object]]", facts.get("executors", {}))
    is_settled = bool(executors.get(checkpoint, {}).get("is_settled", True)) and not facts.get("is_rehearsing")
    return _holds(engine, checkpoint) and is_settled


def _holds(engine: Backend, checkpoint: str) -> bool:
    return checkpoint in cast("Sequence[str]", engine.capabilities().facts.get("checkpoints", [checkpoint]))


def _usable_cores() -> list[int]:
    with contextlib.suppress(AttributeError):  # macOS has no affinity
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
