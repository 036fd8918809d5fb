"""A job cut into parts for several engines, and one result made of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sdfleet.backends.local import LocalBackend
from sdfleet.domain import Drawing, ImageResult

_SEEDS = 2**64


@dataclass(slots=True, eq=False)
class Part:
    """Pictures `first` to `first + n - 1` of a job, in the hands of one engine. `left`: steps, by picture.

    The parts of a job have its id, each in an engine of its own; one that had to move has an id of its own.
    """

    engine: LocalBackend
    drawing: Drawing
    first: int
    left: list[int]
    eta_s: float | None = None


@dataclass(slots=True, eq=False)
class CutJob:
    """A job, as it was asked for, and its parts in the order of its pictures."""

    drawing: Drawing
    is_cancelled: bool = False
    parts: list[Part] = field(default_factory=list)

    def cut(self, engine: LocalBackend, *, first: int, n: int) -> None:
        """Give n pictures, from `first` on, to an engine."""
        own = self.drawing
        if n != own.n_images:
            own = replace(own, seed=(own.seed + first) % _SEEDS, n_images=n)
        self.parts.append(Part(engine, own, first, [own.steps] * n))


def merged(drawing: Drawing, results: Sequence[ImageResult]) -> ImageResult:
    """One result from those of the parts: pictures in order, times of the part that took longest."""
    if len(results) == 1:
        return replace(results[0], job_id=drawing.job_id, drawing=drawing)
    phases = dict.fromkeys(name for result in results for name in result.timings_s)
    return replace(
        results[0],
        job_id=drawing.job_id,
        drawing=drawing,
        images=tuple(image for result in results for image in result.images),
        warnings=tuple(dict.fromkeys(text for result in results for text in result.warnings)),
        timings_s={name: max(result.timings_s.get(name, 0.0) for result in results) for name in phases},
        rungs=tuple(dict.fromkeys(rung for result in results for rung in result.rungs)),
    )
