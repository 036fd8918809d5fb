"""A drawing on its way through the engine: what is left of it, what it took, what must be told about it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sdfleet.domain import Drawing, TokenCount
from sdfleet.engine.memory import Rung


@dataclass(slots=True, kw_only=True)
class Job:
    """A drawing on its way. `arrived_turn`: the engine's turn it came in. `left`: pictures not yet sent."""

    drawing: Drawing
    arrived_turn: int
    begun_s: float
    wants_previews: bool
    left: int
    n_evaluations: int = 0
    n_evaluated: int = 0
    denoise_begun_s: float | None = None
    timings_s: dict[str, float] = field(default_factory=dict)
    tokens: tuple[TokenCount, ...] = ()
    warnings: list[str] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to a phase."""
        begun_s = time.perf_counter()
        try:
            yield
        finally:
            self.spend(phase, time.perf_counter() - begun_s)

    def spend(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.timings_s[phase] = self.timings_s.get(phase, 0.0) + seconds

    def climb(self, rung: Rung) -> None:
        """Note a rung of the memory ladder, once."""
        if rung not in self.rungs:
            self.rungs.append(rung)
