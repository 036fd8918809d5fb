"""The job desk: takes requests in, sees to it that each is drawn and stored once, and tells how it goes.

    submit: prepared -> row committed -> answered -> in line      (what is impossible is refused before there is a job)
    drawn:  row running -> backend -> files (fsync) -> row done   (killed anywhere: the next start draws it again, the
                                                                   same picture under the same name)

The store decides what a job's state is; what stands in memory (`board.py`) can all be made again from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from sdfleet.domain import Job, JobEvent, JobId, JobState, JobStatus, Output, OwnerId, Submission
from sdfleet.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidValue,
    JobCancelled,
    NotFound,
    QueueFull,
    SdfleetError,
    ShuttingDown,
)
from sdfleet.jobs.board import Board, note
from sdfleet.jobs.chooser import Chooser, OneDevice
from sdfleet.jobs.dispatcher import Dispatcher
from sdfleet.jobs.drawer import DEVICE, OUTPUT_PATIENCE_S, Drawer
from sdfleet.jobs.follower import Follower
from sdfleet.jobs.ledger import Ledger
from sdfleet.jobs.live import Live, without_pictures
from sdfleet.jobs.observer import Observer, Silent
from sdfleet.jobs.queue import AGING_S, PATIENCE_S, Waiting
from sdfleet.jobs.retention import Retention
from sdfleet.jobs.webhooks import Webhooks
from sdfleet.runtime import Runtime
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles

log = logging.getLogger(__name__)

# Two batches of 16 guided pictures: a guess at what keeps a device busy, not measured. More would only take away the
# queue's say in who is next, and make a cancelled or urgent job wait behind what was handed over already.
MAX_PICTURES = 32
MAX_QUEUED = 1000
MOST_PRIORITY = 100
# The local backend has drawn a job twice before it says EngineDied.
MAX_DEATHS = 3
# A job whose drawing takes the whole server down every time must not do so for ever.
MAX_ATTEMPTS = 50
# Finished jobs that estimates are learnt from at the start.
N_REMEMBERED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskOptions:
    """How the desk works.

    max_pictures: pictures that are given to the backend at once, counted and not jobs, so that its batches are full.
    max_queued: jobs that may wait, of all owners together. max_deaths: tries of a job that kills the engine.
    max_attempts: tries of a job that kills the server. aging_s, patience_s: see `queue.py`.
    drain_s: how long `close` lets running jobs go on. sync_s: how soon it is noticed what another process (`sdfleet
    jobs`) did to the store; None: never. output_patience_s: how long a finished picture waits for a full disk.
    """

    max_pictures: int = MAX_PICTURES
    max_queued: int = MAX_QUEUED
    max_deaths: int = MAX_DEATHS
    max_attempts: int = MAX_ATTEMPTS
    aging_s: float = AGING_S
    patience_s: float = PATIENCE_S
    drain_s: float = 10.0
    sync_s: float | None = 2.0
    output_patience_s: float = OUTPUT_PATIENCE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskLoad:
    """How busy it is. wait_s: until all that is open now is done; None until jobs like those were measured."""

    n_queued: int
    n_running: int
    by_owner: Mapping[OwnerId, int]
    wait_s: float | None


class JobDesk:
    """See the file's first lines. Belongs to one event loop; started once; one desk for one store at a time.

    chooser: who begins when; None: `OneDevice`. ledger: a second place where accepted jobs are written down.
    clock: seconds since 1970, as in the store's rows.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        files: OutputFiles,
        runtime: Runtime,
        options: DeskOptions | None = None,
        observer: Observer | None = None,
        webhooks: Webhooks | None = None,
        retention: Retention | None = None,
        chooser: Chooser | None = None,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.options = DeskOptions() if options is None else options
        self._store = store
        self._files = files
        self._runtime = runtime
        self._observer: Observer = Silent() if observer is None else observer
        self._webhooks = webhooks
        self._retention = retention
        self._ledger = ledger
        self._board = Board(aging_s=self.options.aging_s, patience_s=self.options.patience_s, clock=clock)
        self._chooser = OneDevice(self._board, max_pictures=self.options.max_pictures) if chooser is None else chooser
        self._chooser.on_change(self._board.wake.set)
        self._drawer = Drawer(
            self._board,
            store=store,
            files=files,
            runtime=runtime,
            observer=self._observer,
            webhooks=webhooks,
            max_deaths=self.options.max_deaths,
            max_attempts=self.options.max_attempts,
            output_patience_s=self.options.output_patience_s,
        )
        self._accepting: set[asyncio.Task[Job]] = set()
        self._main: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --------------------------------------------------------------------------------------------- beginning and end

    async def start(self) -> None:
        """Take up every job that had not ended, and begin. Raises StoreUnavailable."""
        resumed = await self._store.resume()
        done, _ = await self._store.page(states=frozenset({"done"}), limit=N_REMEMBERED)
        for job in reversed(done):
            if DEVICE in job.timings_s:
                self._board.forecasts.learn(job, device_s=job.timings_s[DEVICE])
        for job in resumed:
            self._board.add(job)
        if resumed:
            log.info("jobs were taken up again", extra={"n_jobs": len(resumed)})
        self._board.is_open = True
        self._main = asyncio.create_task(self._run(), name="job desk")
        self._main.add_done_callback(lambda _: self._board.settled.set())

    async def close(self, *, drain_s: float | None = None) -> None:
        """Take no more jobs, let those that run end for `drain_s` (the options' by default), and stop.

        What has not ended stays in the store and goes on at the next start. Whoever waits for it hears ShuttingDown.
        May be called twice. Raises what the desk died of, if it did.
        """
        board = self._board
        board.is_open = False
        main, self._main = self._main, None
        if main is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.options.drain_s if drain_s is None else drain_s):
                while (board.running or self._accepting) and not main.done():
                    board.settled.clear()
                    await board.settled.wait()
        if board.running:
            log.warning("jobs go on after the next start", extra={"n_jobs": len(board.running)})
        main.cancel()
        await asyncio.wait({main, *self._accepting})
        if not main.cancelled():
            main.result()

    async def stand(self) -> None:
        """Return when the desk is closed; raise what it died of. For whoever must not go on without it."""
        main = self._main
        if main is not None:
            await asyncio.wait({main})
            if not main.cancelled():
                main.result()

    @property
    def fault(self) -> BaseException | None:
        """What the desk died of; None while all is well."""
        main = self._main
        return main.exception() if main is not None and main.done() and not main.cancelled() else None

    # -------------------------------------------------------------------------------------------------- what is asked

    async def submit(self, submission: Submission) -> Job:
        """The job of this submission, in the store for good; an older one if its Idempotency key named that.

        A caller that leaves while this runs may leave a job behind, which is drawn.
        Raises what `Runtime.prepare` refuses, Conflict, QueueFull, ShuttingDown, StoreUnavailable.
        """
        self._check_is_open()
        task = asyncio.create_task(self._accept(submission))
        self._accepting.add(task)
        task.add_done_callback(self._accepted)
        return await asyncio.shield(task)

    async def wait(self, job_id: JobId, *, owner: OwnerId | None = None, deadline_s: float | None = None) -> Job:
        """The job, ended: done, failed or cancelled; without its input pictures.

        Raises NotFound, DeadlineExceeded, ShuttingDown.
        """
        live = await self._find_live(job_id, owner)
        if live is None:
            return without_pictures(await self._find(job_id, owner))
        try:
            async with asyncio.timeout(deadline_s):
                await live.wait()
        except TimeoutError as exc:
            raise DeadlineExceeded(f"job {job_id} was not done within {deadline_s} s") from exc
        return live.job

    async def watch(
        self, job_id: JobId, *, owner: OwnerId | None = None, after: int = 0, previews: bool = False
    ) -> AsyncGenerator[JobEvent, None]:
        """What happens to the job from now on: first where it stands, last its end. Close it when you leave.

        after: number of the last event a reader has seen. previews: they are computed while somebody asks for them.
        Slow readers miss steps, never the newest. Jobs in events are without input pictures.
        Raises NotFound, ShuttingDown.
        """
        live = await self._find_live(job_id, owner)
        if live is None:
            yield JobEvent(number=after + 1, status=await self.status(job_id, owner=owner))
            return
        try:
            with live.watched(previews=previews):
                if previews:
                    await self._runtime.watch(job_id, previews=True)
                while news := await live.news(after):
                    for event in news:
                        after = event.number
                        yield event if previews else _without_preview(event)
        finally:
            if previews and not live.wants_previews:
                await self._runtime.watch(job_id, previews=False)

    async def status(self, job_id: JobId, *, owner: OwnerId | None = None) -> JobStatus:
        """Where the job stands. Its request is without input pictures while it has not ended. Raises NotFound."""
        live = self._board.lives.get(job_id)
        if live is not None and owner in {None, live.job.submission.caller.owner}:
            return live.status()
        return _ended_status(await self._find(job_id, owner))

    async def statuses(
        self,
        *,
        owner: OwnerId | None = None,
        states: frozenset[JobState] | None = None,
        before: str | None = None,
        limit: int = 50,
        search: str | None = None,
    ) -> tuple[list[JobStatus], str | None]:
        """A page of jobs, newest first, without input pictures, and the cursor of the next page."""
        jobs, cursor = await self._store.page(owner=owner, states=states, before=before, limit=limit, search=search)
        lives = [self._board.lives.get(job.id) for job in jobs]
        found = [_ended_status(job) if live is None else live.status() for job, live in zip(jobs, lives, strict=True)]
        return found, cursor

    async def cancel(self, job_id: JobId, *, owner: OwnerId | None = None) -> JobStatus:
        """Have the job end soon, and where it stands now: a waiting job has ended, a running one ends after its step.

        A job that is finished in the same moment is done. One that has ended stays as it is.
        Raises NotFound, StoreUnavailable.
        """
        live = await self._find_live(job_id, owner)
        if live is None:
            return _ended_status(await self._find(job_id, owner))
        if self._board.take_out(job_id):
            try:
                await self._drawer.cancel(live, JobCancelled(f"job {job_id} was cancelled before it was drawn"))
            finally:
                self._board.settle(live)  # in line again, if it could not be written down
        else:
            live.is_cancelled = True
            await self._runtime.cancel(job_id)
        return live.status()

    async def retry(self, job_id: JobId, *, owner: OwnerId | None = None) -> Job:
        """The failed or cancelled job in line again, with the same seed and settings.

        Raises NotFound, Conflict (it is done, or has not ended), QueueFull, ShuttingDown, StoreUnavailable.
        """
        self._check_is_open()
        job = await self._find(job_id, owner)
        if job.state not in {"failed", "cancelled"}:
            raise Conflict(f"job {job_id} is {job.state}", hint="only a failed or cancelled job can be tried again")
        if (n_queued := len(self._board.queue)) >= self.options.max_queued:
            raise QueueFull(f"{n_queued} jobs wait already", retry_after_s=self._retry_after_s())
        again = await self._store.requeue(job_id)
        if again is None:
            raise Conflict(f"job {job_id} was tried again by somebody else")
        if self._ledger is not None:
            try:
                await self._ledger.again(again)
            except SdfleetError as exc:
                await self._store.cancel(job_id, exc.to_wire())
                raise
        if not self._board.add(again):
            # The task that wrote its end down is about to see that it is queued again, and lets it line up.
            self._board.lives[job_id].is_cancelled = False
        note("job queued again", again)
        return again

    async def picture(self, output: Output) -> bytes:
        """The file of a finished picture. Raises NotFound."""
        return await asyncio.to_thread(self._files.read, output)

    async def thumbnail(self, output: Output) -> bytes:
        """A small WebP of a finished picture. Raises NotFound."""
        return await asyncio.to_thread(self._files.thumbnail, output)

    def is_open(self, job_id: JobId) -> bool:
        """Whether the job has not ended."""
        return job_id in self._board.lives

    def now_s(self) -> float:
        """The clock of every job's times."""
        return self._board.clock()

    def in_line(self) -> Iterator[Waiting]:
        """What waits, in the order in which it would begin; to be read at once, before anything else happens."""
        return self._board.queue.in_order(self._board.clock())

    def running(self) -> tuple[JobStatus, ...]:
        """Where every job stands that is being drawn, the longest first; without input pictures."""
        lives = (self._board.lives.get(job_id) for job_id in self._board.running)
        return tuple(live.status() for live in lives if live is not None)

    def load(self) -> DeskLoad:
        """How busy it is now."""
        board = self._board
        return DeskLoad(
            n_queued=len(board.queue), n_running=len(board.running), by_owner=board.by_owner(), wait_s=board.wait_s()
        )

    # ----------------------------------------------------------------------------------------------------- acceptance

    async def _accept(self, submission: Submission) -> Job:
        self._check(submission)
        prepared = await self._runtime.prepare(submission.request)
        try:
            job, is_new = await self._store.accept(
                replace(submission, request=prepared.request),
                job_id=prepared.drawing.job_id,
                max_queued=self.options.max_queued,
                warnings=prepared.warnings,
            )
        except QueueFull as exc:
            exc.retry_after_s = self._retry_after_s()
            raise
        if job.state == "queued":
            self._board.add(job)
        if self._ledger is not None and not job.has_ended:
            await self._entered(self._ledger, job)
        if is_new:
            note("job queued", job)
            self._observer.on_accepted(job)
        return job

    async def _entered(self, ledger: Ledger, job: Job) -> None:
        """Have the job in the ledger too. Raises what the ledger does; the job was not accepted then."""
        try:
            await ledger.enter(job)
        except SdfleetError:
            live = self._board.lives.get(job.id)
            if live is None or not self._board.take_out(job.id):
                return  # it has begun, or is done: its caller hears of that
            await self._drawer.cancel(live, JobCancelled("it could not be accepted"))
            # So that its Idempotency key is free for the next try.
            await self._store.forget_jobs([job.id])
            raise

    def _accepted(self, task: asyncio.Task[Job]) -> None:
        self._accepting.discard(task)
        self._board.settled.set()
        if not task.cancelled():
            task.exception()  # its caller may have left; then nobody else looks at it

    def _check(self, submission: Submission) -> None:
        """Raise InvalidValue for what is wrong beside the picture. Aging ends only a priority that has an end."""
        if not -MOST_PRIORITY <= submission.priority <= MOST_PRIORITY:
            raise InvalidValue("priority", f"{submission.priority} is not between -{MOST_PRIORITY} and {MOST_PRIORITY}")
        if submission.deadline_s is not None and not 0 < submission.deadline_s < math.inf:
            raise InvalidValue("deadline", f"{submission.deadline_s} is not a number of seconds above 0")
        if submission.webhook is not None:
            if self._webhooks is None:
                raise InvalidValue("webhook", "this server calls nobody")
            self._webhooks.check(submission.webhook)

    def _check_is_open(self) -> None:
        if (fault := self.fault) is not None:
            raise _stopped(fault)
        if not self._board.is_open:
            raise ShuttingDown("the server is stopping", retry_after_s=10.0, hint="try again when it is back")

    def _retry_after_s(self) -> float:
        """When a place in line will be free again: a quarter of the line, so that not all come back at its end."""
        wait_s = self._board.wait_s()
        return 5.0 if wait_s is None else min(120.0, max(1.0, wait_s / 4))

    async def _find(self, job_id: JobId, owner: OwnerId | None) -> Job:
        job = await self._store.job(job_id, owner=owner)
        if job is None:
            raise NotFound(f"there is no job {job_id[:80]!r}")
        return job

    async def _find_live(self, job_id: JobId, owner: OwnerId | None) -> Live | None:
        """The job while it is open; None if it has ended. Raises NotFound, ShuttingDown."""
        live = self._board.lives.get(job_id)
        if live is None:
            job = await self._find(job_id, owner)
            if job.has_ended:
                return None
            self._check_is_open()
            if job.state == "queued":
                self._board.add(job)
            live = self._board.lives.get(job_id)
        if live is None:
            # It may have ended between two looks.
            job = await self._find(job_id, owner)
            if not job.has_ended:
                raise Conflict(f"job {job_id} is {job.state} with another server", hint="ask that one")
            return None
        if owner not in {None, live.job.submission.caller.owner}:
            raise NotFound(f"there is no job {job_id[:80]!r}")
        return live

    # -------------------------------------------------------------------------------------------------------- the work

    async def _run(self) -> None:
        reason: SdfleetError = ShuttingDown("the server is stopping", hint="the job goes on after its next start")
        try:
            async with asyncio.TaskGroup() as tasks:
                dispatcher = Dispatcher(self._board, chooser=self._chooser, drawer=self._drawer)
                tasks.create_task(dispatcher.run(tasks), name="dispatch")
                tasks.create_task(dispatcher.tell_places(), name="places in line")
                if self.options.sync_s is not None:
                    follower = Follower(self._board, store=self._store, runtime=self._runtime)
                    tasks.create_task(follower.run(every_s=self.options.sync_s), name="follow the store")
                for chore in (self._webhooks, self._retention):
                    if chore is not None:
                        tasks.create_task(chore.run(), name=type(chore).__name__)
        except BaseExceptionGroup as fault:
            log.critical("the job desk stopped", exc_info=fault)
            reason = _stopped(fault)
            raise
        finally:
            self._board.is_open = False
            for live in self._board.lives.values():
                live.leave(reason)


def _ended_status(job: Job) -> JobStatus:
    n_steps = (job.request.steps or 0) * job.request.n_images
    return JobStatus(job=job, step=n_steps if job.state == "done" else 0, n_steps=n_steps)


def _without_preview(event: JobEvent) -> JobEvent:
    if event.progress is None or event.progress.preview is None:
        return event
    return replace(event, progress=replace(event.progress, preview=None))


def _stopped(fault: BaseException) -> SdfleetError:
    return SdfleetError(f"the server's job desk stopped: {type(fault).__name__}", hint="see its log, then restart it")
