"""A backend without a model: made-up pictures at once, for tests of whatever stands above a backend.

The same drawing always gives the same pixels; another seed or prompt gives others. Nothing here looks like the prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace

from sdfleet.backends.base import Capabilities, OnProgress
from sdfleet.domain import Drawing, FinishedPicture, ImageResult, JobId, Picture, Progress, SafetyVerdict, TokenCount
from sdfleet.errors import BadRequest, EngineDied, JobCancelled, SdfleetError, in_use

_PREVIEW_SIDE_PX = 32


class FakeBackend:
    """Draws stripes. Shipped so that users can test their own code without weights or torch.

    script: what happens to the first, second, ... job: None draws it, an error is raised half-way through its steps.
    Jobs past the end of the script are drawn.
    before_step: awaited before every step with the drawing and the step (from 1); a test can hold a job there.
    step_s: seconds of a step, where there is no before_step.
    verdict: what a safety checker says of picture i of a drawing; None: there is no checker.
    """

    def __init__(
        self,
        *,
        name: str = "fake",
        script: Sequence[SdfleetError | None] = (),
        before_step: Callable[[Drawing, int], Awaitable[None]] | None = None,
        step_s: float = 0.0,
        verdict: Callable[[Drawing, int], SafetyVerdict] | None = None,
    ) -> None:
        self._name = name
        self._script = list(script)
        self._before_step = before_step
        self._step_s = step_s
        self._verdict = verdict
        self._jobs: dict[JobId, asyncio.Future[SdfleetError]] = {}
        self._with_previews: set[JobId] = set()
        self._is_closed = False
        self._in_use: Counter[str] = Counter()
        self._loaded: dict[str, None] = {}
        self._pinned: tuple[str, ...] = ()

    def capabilities(self) -> Capabilities:
        return Capabilities(
            name=self._name,
            state="closed" if self._is_closed else "ready",
            reason="the backend was closed" if self._is_closed else "",
            has_previews=True,
            is_real=False,
            n_running=len(self._jobs),
            facts={
                "device": "none",
                "dtype": "none",
                "checkpoints": list(self._loaded),
                "bytes_by_checkpoint": dict.fromkeys(self._loaded, 0),
                "pinned": list(self._pinned),
            },
        )

    async def start(self) -> None:
        if self._is_closed:
            raise EngineDied("the fake backend is closed")

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        if self._is_closed:
            raise EngineDied("the fake backend is closed")
        if drawing.job_id in self._jobs:
            raise BadRequest(f"job {drawing.job_id} is being drawn already")
        begun_s = asyncio.get_running_loop().time()
        fault = self._script.pop(0) if self._script and drawing.n_images else None
        stop = self._jobs[drawing.job_id] = asyncio.get_running_loop().create_future()
        if drawing.wants_previews:
            self._with_previews.add(drawing.job_id)
        self._loaded[drawing.checkpoint] = None
        self._in_use[drawing.checkpoint] += 1
        try:
            images = [await self._draw(drawing, i, fault, stop, on_progress) for i in range(drawing.n_images)]
        finally:
            self._in_use[drawing.checkpoint] -= 1
            del self._jobs[drawing.job_id]
            self._with_previews.discard(drawing.job_id)
        spent_s = asyncio.get_running_loop().time() - begun_s
        return ImageResult(
            job_id=drawing.job_id,
            model=drawing.checkpoint,
            images=tuple(images),
            drawing=drawing,
            warnings=("this picture was made up by the fake backend",),
            tokens=(TokenCount(encoder="fake", n_tokens=len(drawing.prompt.split()), window=77, n_chunks=1),),
            timings_s={"load": 0.0, "encode": 0.0, "denoise": spent_s, "decode": 0.0, "total": spent_s},
            device="none",
            dtype="none",
        )

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        if previews and job_id in self._jobs:
            self._with_previews.add(job_id)
        else:
            self._with_previews.discard(job_id)

    async def cancel(self, job_id: JobId) -> None:
        self._stop(job_id, JobCancelled(f"job {job_id} was cancelled"))

    async def load(self, drawing: Drawing) -> None:
        await self.generate(replace(drawing, n_images=0))

    async def unload(self, checkpoint: str) -> None:
        n_jobs = self._in_use[checkpoint]
        if n_jobs:
            raise in_use(checkpoint, n_jobs)
        self._loaded.pop(checkpoint, None)

    async def pin(self, checkpoints: Collection[str]) -> None:
        self._pinned = tuple(checkpoints)

    async def close(self) -> None:
        self._is_closed = True
        for job_id in list(self._jobs):
            self._stop(job_id, EngineDied("the fake backend was closed before the job was done"))

    def _stop(self, job_id: JobId, error: SdfleetError) -> None:
        stop = self._jobs.get(job_id)
        if stop is not None and not stop.done():
            stop.set_result(error)

    async def _draw(
        self,
        drawing: Drawing,
        image_index: int,
        fault: SdfleetError | None,
        stop: asyncio.Future[SdfleetError],
        on_progress: OnProgress | None,
    ) -> FinishedPicture:
        for step in range(1, drawing.steps + 1):
            await self._wait_for_step(drawing, step, stop)
            if fault is not None and step > drawing.steps // 2:
                raise fault
            if on_progress is not None:
                has_preview = drawing.job_id in self._with_previews
                on_progress(_progress(drawing, image_index, step, has_preview=has_preview))
        width_px, height_px = drawing.resize_to or (drawing.width_px, drawing.height_px)
        return FinishedPicture(
            picture=_stripes(drawing, image_index, width_px=width_px, height_px=height_px),
            seed=drawing.seed + image_index,
            reproducible=True,
            safety="none" if self._verdict is None else self._verdict(drawing, image_index),
        )

    async def _wait_for_step(self, drawing: Drawing, step: int, stop: asyncio.Future[SdfleetError]) -> None:
        """Let others run, and `before_step` take its time; raises what `stop` was given."""
        if self._before_step is None:
            await (asyncio.wait({stop}, timeout=self._step_s) if self._step_s else asyncio.sleep(0))
        else:
            hold: asyncio.Future[None] = asyncio.ensure_future(self._before_step(drawing, step))
            either: set[asyncio.Future[None] | asyncio.Future[SdfleetError]] = {hold, stop}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                hold.cancel()
            if hold.done():
                hold.result()
        if stop.done():
            raise stop.result()


def _progress(drawing: Drawing, image_index: int, step: int, *, has_preview: bool) -> Progress:
    preview = None
    if has_preview:
        preview = _stripes(drawing, image_index, width_px=_PREVIEW_SIDE_PX, height_px=_PREVIEW_SIDE_PX)
    return Progress(
        job_id=drawing.job_id,
        image_index=image_index,
        step=step,
        n_steps=drawing.steps,
        eta_s=0.0,
        preview=preview,
    )


def _stripes(drawing: Drawing, image_index: int, *, width_px: int, height_px: int) -> Picture:
    """Diagonal stripes whose colours are a digest of everything that would change a real picture."""
    inputs = [picture.data for picture in (drawing.image, drawing.mask) if picture is not None]
    words = (drawing.checkpoint, drawing.prompt, drawing.negative_prompt, drawing.sampler)
    numbers = (drawing.steps, drawing.guidance, drawing.strength, drawing.seed + image_index)
    digest = hashlib.sha256(repr((words, numbers)).encode() + b"".join(inputs)).digest()
    colours = [digest[i : i + 3] for i in range(0, 24, 3)]
    band_px = max(1, width_px // 8)
    line = b"".join(colours[x // band_px % 8] for x in range(width_px + height_px))
    data = b"".join(line[3 * y : 3 * (y + width_px)] for y in range(height_px))
    return Picture(width_px=width_px, height_px=height_px, mode="RGB", data=data)
