"""How fast pictures come on this machine: sizes x steps x batch, through the same door as every request."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdfleet import __version__
from sdfleet.domain import ImageRequest
from sdfleet.runtime import Runtime

PROMPT = "a red circle above a blue square on a white background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to time: `n_images` pictures of one size in one request."""

    width_px: int
    height_px: int
    steps: int
    n_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """A case and its times: the fastest of `n_runs` runs. phases_s are those of that run."""

    case: Case
    n_runs: int
    best_s: float
    worst_s: float
    phases_s: dict[str, float]

    @property
    def picture_s(self) -> float:
        """Seconds for one picture of the batch."""
        return self.best_s / self.case.n_images


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was timed, and on what. first_s: the very first picture, with the start of the engine and its loading."""

    model: str
    device: str
    dtype: str
    first_s: float
    timings: tuple[Timing, ...]

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
            "device": self.device,
            "dtype": self.dtype,
            "first_s": round(self.first_s, 4),
            "timings": [
                {
                    **asdict(timing.case),
                    "n_runs": timing.n_runs,
                    "best_s": round(timing.best_s, 4),
                    "worst_s": round(timing.worst_s, 4),
                    "picture_s": round(timing.picture_s, 4),
                    "phases_s": timing.phases_s,
                }
                for timing in self.timings
            ],
        }


async def measure(
    runtime: Runtime,
    *,
    model: str,
    sizes: Sequence[tuple[int, int]] = (),
    steps: Sequence[int] = (),
    batches: Sequence[int] = (1, 4),
    n_runs: int = 2,
    on_timing: Callable[[Timing], None] | None = None,
) -> Report:
    """Times for every combination; sizes and steps left out are the model's own.

    One picture is drawn first and not counted among the timings. Raises as `Runtime.generate`.
    """
    card = runtime.catalog.resolve(model).card
    cases = [
        Case(width_px=size[0], height_px=size[1], steps=n_steps, n_images=n_images)
        for size, n_steps, n_images in itertools.product(
            sizes or ((card.width_px, card.height_px),), steps or (card.steps,), batches
        )
    ]
    requests = [_request(model, case) for case in cases]
    for request in requests:
        # A wrong size or batch at the end of the list is told before the first minute is spent.
        await runtime.prepare(request)
    started_s = time.perf_counter()
    first = await runtime.generate(requests[0])
    first_s = time.perf_counter() - started_s
    timings = []
    for case, request in zip(cases, requests, strict=True):
        timing = await _time(runtime, case, request, n_runs=n_runs)
        timings.append(timing)
        if on_timing is not None:
            on_timing(timing)
    return Report(model=first.model, device=first.device, dtype=first.dtype, first_s=first_s, timings=tuple(timings))


def _request(model: str, case: Case) -> ImageRequest:
    return ImageRequest(
        prompt=PROMPT,
        model=model,
        width_px=case.width_px,
        height_px=case.height_px,
        steps=case.steps,
        n_images=case.n_images,
        seed=0,
    )


async def _time(runtime: Runtime, case: Case, request: ImageRequest, *, n_runs: int) -> Timing:
    runs: list[tuple[float, dict[str, float]]] = []
    for _ in range(n_runs):
        started_s = time.perf_counter()
        result = await runtime.generate(request)
        phases_s = {name: round(seconds, 4) for name, seconds in result.timings_s.items()}
        runs.append((time.perf_counter() - started_s, phases_s))
    best_s, phases_s = min(runs, key=lambda run: run[0])
    return Timing(case=case, n_runs=n_runs, best_s=best_s, worst_s=max(run[0] for run in runs), phases_s=phases_s)
