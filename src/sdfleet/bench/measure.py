"""How fast pictures come on this machine: sizes x steps x rows, through the same door as every request."""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdfleet import __version__
from sdfleet.domain import ImageRequest
from sdfleet.runtime import Runtime

PROMPT = "a red circle above a blue square on a white background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to time: `n_images` pictures of one size in one request, so that they step together."""

    width_px: int
    height_px: int
    steps: int
    n_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What the device gives at most, in floating point operations a second: its fastest matrix product, measured."""

    per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Floating point operations of one picture of a case, counted. One step is `step`, all of the picture `picture`."""

    step: int
    picture: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """A case and its times: the fastest of `n_runs` runs. phases_s are those of that run.

    estimated_steps: the case was drawn with one step, to say from it how long this many would take.
    """

    case: Case
    n_runs: int
    best_s: float
    worst_s: float
    phases_s: dict[str, float]
    operations: Operations | None = None
    limit: Limit | None = None
    estimated_steps: int | None = None

    @property
    def picture_s(self) -> float:
        """Seconds for one picture of the batch, as measured."""
        return self.best_s / self.case.n_images

    @property
    def images_per_s(self) -> float:
        """Pictures a second, as measured."""
        return self.case.n_images / self.best_s

    @property
    def step_s(self) -> float:
        """Seconds in which all pictures of the case move one step."""
        return self.phases_s.get("denoise", 0.0) / self.case.steps

    @property
    def estimated_picture_s(self) -> float | None:
        """An estimate, not a measurement: what a picture of `estimated_steps` would take, from its measured phases."""
        if self.estimated_steps is None:
            return None
        fixed_s = self.phases_s.get("encode", 0.0) + self.phases_s.get("decode", 0.0)
        return (fixed_s + self.estimated_steps * self.step_s) / self.case.n_images

    @property
    def step_share(self) -> float | None:
        """[0, 1] of the device's limit that the steps reach; None where it is not known or too short to tell."""
        if self.operations is None or self.limit is None or not self.step_s:
            return None
        return self.case.n_images * self.operations.step / (self.limit.per_s * self.step_s)

    @property
    def picture_share(self) -> float | None:
        """[0, 1] of the device's limit over everything between request and picture."""
        if self.operations is None or self.limit is None:
            return None
        return self.case.n_images * self.operations.picture / (self.limit.per_s * self.best_s)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; what is not known is absent."""
        told: dict[str, Any] = {
            **asdict(self.case),
            "n_runs": self.n_runs,
            "best_s": round(self.best_s, 4),
            "worst_s": round(self.worst_s, 4),
            "picture_s": round(self.picture_s, 4),
            "images_per_s": round(self.images_per_s, 4),
            "step_s": round(self.step_s, 5),
            "phases_s": self.phases_s,
        }
        if self.operations is not None:
            told["gflop"] = {name: round(n / 1e9, 3) for name, n in asdict(self.operations).items()}
        if self.step_share is not None and self.picture_share is not None:
            told["share_of_limit"] = {"step": round(self.step_share, 4), "picture": round(self.picture_share, 4)}
        if self.estimated_picture_s is not None:
            told["estimate"] = {"steps": self.estimated_steps, "picture_s": round(self.estimated_picture_s, 4)}
        return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was timed, and on what. first_s: the very first picture, with the start of the engine and its loading.

    weights: `random` for a model that is not here, `checkpoint` otherwise. Its text encoders may be stand-ins then.
    """

    model: str
    device: str
    dtype: str
    first_s: float
    timings: tuple[Timing, ...]
    limit: Limit | None = None
    weights: str = "checkpoint"
    text_encoders: str = "whole"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "sdfleet": __version__,
            "machine": {
                "platform": platform.platform(),
                "n_cores": os.cpu_count(),
                "python": platform.python_version(),
            },
            "model": self.model,
            "weights": self.weights,
            "text_encoders": self.text_encoders,
            "device": self.device,
            "dtype": self.dtype,
            "first_s": round(self.first_s, 4),
            **({"limit_gflop_per_s": round(self.limit.per_s / 1e9, 1)} if self.limit else {}),
            "timings": [timing.to_json() for timing in self.timings],
        }


async def measure(
    runtime: Runtime,
    *,
    model: str,
    sizes: Sequence[tuple[int, int]] = (),
    steps: Sequence[int] = (),
    batches: Sequence[int] = (1, 4),
    n_runs: int = 2,
    is_one_step: bool = False,
    limit: Limit | None = None,
    on_timing: Callable[[Timing], None] | None = None,
) -> Report:
    """Times for every combination; sizes and steps left out are the model's own.

    One picture is drawn first and not counted among the timings. is_one_step: every case is drawn with one step, and
    the time with all its steps is estimated from that. limit: see engine/limits.py; operations are counted only then.
    Raises as `Runtime.generate`.
    """
    card = runtime.catalog.resolve(model).card
    cases = [
        Case(width_px=size[0], height_px=size[1], steps=n_steps, n_images=n_images)
        for size, n_steps, n_images in itertools.product(
            sizes or ((card.width_px, card.height_px),), steps or (card.steps,), batches
        )
    ]
    for case in cases:
        # A wrong size or batch at the end of the list is told before the first minute is spent.
        await runtime.prepare(_request(model, case))
    drawn = [_with_one_step(case) if is_one_step else case for case in cases]
    started_s = time.perf_counter()
    first = await runtime.generate(_request(model, drawn[0]))
    first_s = time.perf_counter() - started_s
    timings = []
    numbers = itertools.count(1)
    for asked, case in zip(cases, drawn, strict=True):
        operations = None if limit is None else await _operations(runtime, model, case)
        runs = await _runs(runtime, model, case, n_runs=n_runs, numbers=numbers)
        best_s, phases_s = min(runs, key=lambda run: run[0])
        timing = Timing(
            case=case, n_runs=n_runs, best_s=best_s, worst_s=max(run[0] for run in runs), phases_s=phases_s,
            operations=operations, limit=limit, estimated_steps=asked.steps if is_one_step else None,
        )  # fmt: skip
        timings.append(timing)
        if on_timing is not None:
            on_timing(timing)
    return Report(
        model=first.model, device=first.device, dtype=first.dtype, first_s=first_s, timings=tuple(timings), limit=limit
    )


def _with_one_step(case: Case) -> Case:
    return Case(width_px=case.width_px, height_px=case.height_px, steps=1, n_images=case.n_images)


def _request(model: str, case: Case, *, number: int = 0) -> ImageRequest:
    # Another prompt for each run: one that was read before is not read again, and its time would be missing.
    return ImageRequest(
        prompt=f"{PROMPT}, picture {number}",
        model=model,
        width_px=case.width_px,
        height_px=case.height_px,
        steps=case.steps,
        n_images=case.n_images,
        seed=0,
    )


async def _operations(runtime: Runtime, model: str, case: Case) -> Operations:
    from sdfleet.engine.limits import count_work

    prepared = await runtime.prepare(_request(model, case))
    work = await asyncio.to_thread(count_work, prepared.drawing)
    return Operations(step=work.step, picture=work.picture(case.steps))


async def _runs(
    runtime: Runtime, model: str, case: Case, *, n_runs: int, numbers: Iterator[int]
) -> list[tuple[float, dict[str, float]]]:
    runs = []
    for _ in range(n_runs):
        request = _request(model, case, number=next(numbers))
        started_s = time.perf_counter()
        result = await runtime.generate(request)
        spent_s = time.perf_counter() - started_s
        runs.append((spent_s, {name: round(seconds, 5) for name, seconds in result.timings_s.items()}))
    return runs
