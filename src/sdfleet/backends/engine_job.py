"""One job in the hands of an engine's process, and what its caller receives of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sdfleet.backends.base import OnProgress
from sdfleet.domain import Drawing, FinishedPicture, ImageResult, JobId, Progress
from sdfleet.engine.events import Event, JobDone, JobFailed, PictureDone
from sdfleet.errors import EngineFailed

DRAWN_AGAIN = "the engine process ended and the job was drawn again"


class Again:
    """The job starts anew; what was received of it is void."""


@dataclass(slots=True, eq=False)
class EngineJob:
    """One `generate` that has not ended. `inbox` is read by the caller's own task. is_begun: it has shown progress."""

    drawing: Drawing
    inbox: asyncio.Queue[Event | Again] = field(default_factory=asyncio.Queue)
    is_sent: bool = False
    is_begun: bool = False
    is_cancelled: bool = False
    n_deaths: int = 0

    @property
    def id(self) -> JobId:
        return self.drawing.job_id

    async def collect(self, drawing: Drawing, on_progress: OnProgress | None) -> ImageResult:
        """The result, put together when the job ends; drawing: as it was asked for. Raises what the job failed of."""
        pictures: dict[int, FinishedPicture] = {}
        warnings: tuple[str, ...] = ()
        while True:
            match await self.inbox.get():
                case Progress() as progress:
                    if on_progress is not None:
                        on_progress(progress)
                case PictureDone(image_index=image_index, finished=finished):
                    pictures[image_index] = finished
                case JobFailed(error=error):
                    raise error
                case JobDone() as done:
                    return _as_result(drawing, pictures, replace(done, warnings=(*done.warnings, *warnings)))
                case Again():
                    pictures.clear()
                    warnings = (DRAWN_AGAIN,)


def _as_result(drawing: Drawing, pictures: Mapping[int, FinishedPicture], done: JobDone) -> ImageResult:
    if sorted(pictures) != list(range(drawing.n_images)):
        raise EngineFailed(f"the engine sent pictures {sorted(pictures)} of {drawing.n_images} and called it done")
    return ImageResult(
        job_id=drawing.job_id,
        model=drawing.checkpoint,
        images=tuple(pictures[i] for i in range(drawing.n_images)),
        drawing=drawing,
        warnings=done.warnings,
        tokens=done.tokens,
        timings_s=done.timings_s,
        device=done.device,
        dtype=done.dtype,
        rungs=done.rungs,
    )
