"""One job from its turn to its end: begun in the store, drawn by the backend, written to disk, done in the store.

Killed anywhere on the way, the job is drawn again by the next start: the same picture under the same name. What the
store or the disk refuses is tried again; a job ends badly only by a decision.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from sdfleet.domain import ImageResult, Job, Output
from sdfleet.engine.sampler_names import a1111_label
from sdfleet.errors import (
    DeadlineExceeded,
    EngineDied,
    JobCancelled,
    OutputNotWritable,
    SdfleetError,
    StoreUnavailable,
)
from sdfleet.jobs.board import Begun, Board, note
from sdfleet.jobs.live import Live
from sdfleet.jobs.observer import Observer
from sdfleet.jobs.queue import Waiting
from sdfleet.jobs.webhooks import Webhooks
from sdfleet.runtime import Runtime
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles

log = logging.getLogger(__name__)

T = TypeVar("T")

# Key of `Job.timings_s` for a job's share of the device; estimates start from it after a restart.
DEVICE = "device"
# A finished picture is held in memory this long while the disk is full.
OUTPUT_PATIENCE_S = 60.0
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 5.0


class Drawer:
    """Does the work of a job. max_deaths: how often a job may be there when the engine dies before it fails.

    max_attempts: how often it may be begun, for a job whose drawing takes the whole server down.
    """

    def __init__(
        self,
        board: Board,
        *,
        store: JobStore,
        files: OutputFiles,
        runtime: Runtime,
        observer: Observer,
        webhooks: Webhooks | None,
        max_deaths: int,
        max_attempts: int,
        output_patience_s: float,
    ) -> None:
        self._board = board
        self._store = store
        self._files = files
        self._runtime = runtime
        self._observer = observer
        self._webhooks = webhooks
        self._max_deaths = max_deaths
        self._max_attempts = max_attempts
        self._output_patience_s = output_patience_s

    async def work(self, begun: Begun, live: Live) -> None:
        """Draw one job. When the desk closes its row stays as it is."""
        try:
            await self._draw(begun, live)
        except Exception as exc:  # one job fails with its cause, the others go on
            log.exception("a job met a fault of ours", extra={"job_id": live.job.id})
            await self.fail(live, SdfleetError(f"{type(exc).__name__} in sdfleet itself", hint="see the server's log"))
        finally:
            begun.leave_device()
            self._board.end(begun.waiting)

    async def fail(self, live: Live, error: SdfleetError) -> None:
        """Write down why a job failed, and tell those who watch."""
        await self._insist(lambda: self._store.fail(live.job.id, error.to_wire()), live)
        self._told(live, await self._insist(lambda: self._store.job(live.job.id), live), error)

    async def cancel(self, live: Live, error: JobCancelled) -> None:
        """Write down that a job was cancelled, and tell those who watch. Raises StoreUnavailable at once."""
        await self._store.cancel(live.job.id, error.to_wire())
        self._told(live, await self._store.job(live.job.id), error)

    async def _draw(self, begun: Begun, live: Live) -> None:
        try:
            job = await self._begin(live)
            if job is None:
                return
            live.become(job)
            self._observer.on_started(job, wait_s=max(0.0, (job.started_s or job.created_s) - job.created_s))
            result = await self._pictures(job, live, begun.waiting)
        except SdfleetError as exc:
            begun.leave_device()
            await self._end_badly(live, exc)
            return
        # The device has room while the pictures are encoded.
        device_s = begun.leave_device()
        self._board.n_storing += begun.waiting.n_pictures
        try:
            await self._keep(job, live, result, device_s=device_s)
        finally:
            self._board.n_storing -= begun.waiting.n_pictures
            self._board.wake.set()

    async def _begin(self, live: Live) -> Job | None:
        """The job, running; None if somebody ended it in the store."""
        job_id = live.job.id
        job = await self._insist(partial(self._store.begin, job_id), live)
        if job is None:
            job = await self._insist(partial(self._store.job, job_id), live)
            if job is None or job.state != "running":
                self._board.follow(live, job)
                return None
            # A commit whose answer was lost: nobody but this process begins jobs.
        if job.attempts > self._max_attempts:
            live.n_deaths = self._max_deaths
            raise EngineDied(f"the server ended {job.attempts - 1} times while it drew this job")
        return job

    async def _pictures(self, job: Job, live: Live, waiting: Waiting) -> ImageResult:
        """What the backend draws. Raises what it raises, JobCancelled, DeadlineExceeded."""
        prepared = await self._runtime.prepare(job.request, job_id=job.id)
        left_s = None if waiting.deadline_s is None else waiting.deadline_s - self._board.clock()
        timeout = asyncio.timeout(left_s)
        try:
            async with timeout:
                # No await from here to the backend: no wish to cancel or to look on is lost in between.
                if live.is_cancelled:
                    raise JobCancelled(f"job {job.id} was cancelled before it was drawn")
                drawing = replace(prepared.drawing, wants_previews=live.wants_previews)
                return await self._runtime.draw(replace(prepared, drawing=drawing), on_progress=live.take)
        except TimeoutError as exc:
            if not timeout.expired():
                raise
            raise DeadlineExceeded(f"job {job.id} was not done in the {job.submission.deadline_s} s it had") from exc

    async def _keep(self, job: Job, live: Live, result: ImageResult, *, device_s: float) -> None:
        """Write the files, then say so in the row: never the other way round."""
        try:
            outputs = await self._insist(
                partial(self._written, job, result), live, faults=OutputNotWritable, within_s=self._output_patience_s
            )
        except OutputNotWritable as exc:
            await self.fail(live, exc)
            return
        # What was spent on loading the model says nothing about the next job.
        device_s = max(0.0, device_s - result.timings_s.get("load", 0.0))
        done = replace(
            job,
            state="done",
            outputs=tuple(outputs),
            warnings=tuple(dict.fromkeys(job.warnings + result.warnings)),
            timings_s={**result.timings_s, DEVICE: round(device_s, 4)},
            device=result.device,
            dtype=result.dtype,
            rungs=result.rungs,
            withheld=result.withheld,
            node=result.node,
            backend=result.backend,
            cost_credits=_cost_of(result),
            finished_s=self._board.clock(),
        )
        if await self._insist(partial(self._store.finish, done), live) or await self._is_finished(done, live):
            self._board.forecasts.learn(done, device_s=device_s)
            live.become(done)
            total_s = max(0.0, self._board.clock() - job.created_s)
            note("job done", done, spent_s=round(total_s, 3), n_outputs=len(outputs))
            draw_s = result.timings_s.get("total", 0.0)
            self._observer.on_finished(done, draw_s=draw_s, device_s=device_s, total_s=total_s)
            self._tell_webhook(done)

    async def _written(self, job: Job, result: ImageResult) -> list[Output]:
        submission = job.submission
        return list(
            await asyncio.to_thread(
                self._files.write,
                job,
                result,
                format=submission.format,
                quality=submission.quality,
                sampler_label=a1111_label(result.drawing.sampler),
            )
        )

    async def _is_finished(self, done: Job, live: Live) -> bool:
        """Whether it was this drawing that finished the job, in a commit whose answer was lost.

        If not, another process ended the job meanwhile: its files go, and it is what the store says.
        """
        now = await self._insist(partial(self._store.job, done.id), live)
        if now is not None and now.state == "done":
            return True
        for output in done.outputs:
            await asyncio.to_thread(self._files.delete, output)
        self._board.follow(live, now)
        return False

    async def _end_badly(self, live: Live, exc: SdfleetError) -> None:
        job_id = live.job.id
        if isinstance(exc, EngineDied) and live.is_cancelled:
            exc = JobCancelled(f"job {job_id} was cancelled")
        match exc:
            case JobCancelled() as cancelled:
                await self._insist(partial(self.cancel, live, cancelled), live)
            case EngineDied() if not self._board.is_open:
                pass  # the backend was closed under it; the next start draws it
            case EngineDied() if live.n_deaths + 1 < self._max_deaths:
                live.n_deaths += 1
                await self._insist(partial(self._store.release, job_id), live)
                self._board.follow(live, await self._insist(partial(self._store.job, job_id), live))
                note("job queued again: the engine died", live.job, n_deaths=live.n_deaths)
            case _:
                await self.fail(live, exc)

    def _told(self, live: Live, now: Job | None, error: SdfleetError) -> None:
        self._board.follow(live, now)
        if now is not None and now.state in {"failed", "cancelled"}:
            note("job failed" if now.state == "failed" else "job cancelled", now, code=error.code)
            self._observer.on_failed(now, code=error.code)
            self._tell_webhook(now)

    def _tell_webhook(self, job: Job) -> None:
        if self._webhooks is not None and job.submission.webhook is not None:
            self._webhooks.nudge()

    async def _insist(
        self,
        ask: Callable[[], Awaitable[T]],
        live: Live,
        *,
        faults: type[SdfleetError] = StoreUnavailable,
        within_s: float = float("inf"),
    ) -> T:
        """The answer, asked for again while there are faults. Raises the fault after `within_s`."""
        pause_s = _RETRY_FIRST_S
        begun_s = time.monotonic()
        while True:
            try:
                return await ask()
            except faults as exc:
                self._observer.on_store_fault(code=exc.code)
                if time.monotonic() - begun_s >= within_s:
                    raise
                log.warning("trying again to write a job down", extra={"job_id": live.job.id, "why": str(exc)})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_MOST_S)


def _cost_of(result: ImageResult) -> float | None:
    """What was charged for all its pictures; None where nobody said."""
    told = [image.cost_credits for image in result.images if image.cost_credits is not None]
    return sum(told) if told else None
