"""Which engines draw a job: whichever finish it first, by seconds that were measured. No process ever comes here.

One wide engine uses all cores, several small ones share them. A step of k pictures in one engine takes about
`base + k * each` seconds, for all k together; both numbers come from a trial (`engine_trial.py`).

>>> trial = Trial(n_many=8, n_engines=2, wide_one_s=.30, wide_many_s=.80, small_one_s=.40, small_many_s=.50)
>>> trial.gain, trial.is_spread                      # eight pictures: the small engines need .50 s instead of .80 s
(1.6, True)
>>> lone_job(trial, n_images=1, n_small=2)           # one picture alone: all cores for it
'wide'
>>> lone_job(trial, n_images=8, n_small=2)
'small'
>>> shares([Load(work_s=0.0, each_s=.1), Load(work_s=.15, each_s=.1)], n_images=3)   # the second is busy already
(2, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["wide", "small"]

# Several engines take several times the memory, and are never loaded quite evenly, which the slowest requests pay for:
# with a gain of 1.19, sixteen clients had a p95 of 0.43 of a plain server's, where one engine had 0.34 to 0.36 with as
# many pictures a second (2026-11-21, benchmarks/LOG.md). Below this they stay unused.
_MUST_GAIN = 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Seconds of the same short drawing, by the wide engine and by the small ones.

    one: one picture with the machine to itself. many: `n_many` pictures at once, for the small engines in equal shares.
    n_steps: steps of that drawing. executors: what ran the denoiser in each engine, the wide one first.
    """

    n_many: int
    n_engines: int
    wide_one_s: float
    wide_many_s: float
    small_one_s: float
    small_many_s: float
    n_steps: int = 1
    executors: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """Pictures per second of the small engines together, over those of the wide one."""
        return self.wide_many_s / max(self.small_many_s, 1e-9)

    @property
    def is_spread(self) -> bool:
        """Whether jobs of this kind should be spread over the small engines."""
        return self.gain >= _MUST_GAIN

    def wide_s(self, n_images: int) -> float:
        """Predicted seconds of n pictures on the idle wide engine."""
        return self.wide_one_s + (n_images - 1) * max(0.0, self.wide_many_s - self.wide_one_s) / (self.n_many - 1)

    def small_s(self, n_images: int) -> float:
        """Predicted seconds of n pictures on one small engine that has nothing else to draw."""
        return self.small_one_s + (n_images - 1) * self._each_s

    def work_s(self, steps_left: Sequence[int]) -> float:
        """Predicted seconds of pictures with these steps left, on one small engine, all in shared steps."""
        if not steps_left:
            return 0.0
        base_s = max(0.0, self.small_one_s - self._each_s)
        return (base_s * max(steps_left) + self._each_s * sum(steps_left)) / self.n_steps

    @property
    def _each_s(self) -> float:
        per_engine = self.n_many / self.n_engines
        if per_engine <= 1:
            return self.small_one_s
        return max(0.0, self.small_many_s - self.small_one_s) / (per_engine - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One small engine: seconds of the work it has, and seconds that one more picture adds."""

    work_s: float
    each_s: float


def lone_job(trial: Trial | None, *, n_images: int, n_small: int) -> Side:
    """Who draws a job that has the machine to itself. Nothing measured: the small ones if each gets a picture."""
    if trial is None:
        return "small" if n_images >= n_small else "wide"
    return "small" if trial.small_s(-(-n_images // n_small)) < trial.wide_s(n_images) else "wide"


def shares(loads: Sequence[Load], *, n_images: int) -> tuple[int, ...]:
    """How many of the pictures each small engine draws: each picture goes where it is finished first."""
    given = [0] * len(loads)
    for _ in range(n_images):
        ends_s = [load.work_s + (n + 1) * load.each_s for load, n in zip(loads, given, strict=True)]
        given[ends_s.index(min(ends_s))] += 1
    return tuple(given)
