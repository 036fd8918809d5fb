"""The open jobs of this process: who waits, who is drawn, and what is known of each. All of it in memory.

Everything here is one step of the event loop, so no two tasks see a job half-way between the line and the device.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from sdfleet.domain import SERVICES, Job, JobId, OwnerId
from sdfleet.jobs.estimates import DeviceClock, Estimates
from sdfleet.jobs.forecasts import Forecasts, shape_of
from sdfleet.jobs.live import Live
from sdfleet.jobs.queue import FairQueue, Waiting

log = logging.getLogger(__name__)


class Board:
    """What the desk, the drawer and the follower share. clock: seconds since 1970, as in the store's rows.

    wake: there may be something to dispatch. settled: a job has left the device. line_moved: places have changed.
    """

    def __init__(self, *, aging_s: float, patience_s: float, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.wake = asyncio.Event()
        self.settled = asyncio.Event()
        self.line_moved = asyncio.Event()
        self.is_open = False
        self.lives: dict[JobId, Live] = {}
        self.queue = FairQueue(aging_s=aging_s, patience_s=patience_s)
        self.running: dict[JobId, Waiting] = {}
        self.n_storing = 0
        self.device = DeviceClock()
        self.forecasts = Forecasts(self.queue, Estimates(), clock=clock)

    def add(self, job: Job) -> bool:
        """Let a queued job of the store wait its turn here; False if it is here already."""
        if job.id in self.lives:
            return False
        self.lives[job.id] = Live(job, place=self.place)
        self.forecasts.note(job)
        self._line_up(job)
        return True

    def take_out(self, job_id: JobId) -> bool:
        """Whether the job was waiting; it does not any more."""
        waiting = self.queue.remove(job_id)
        self.wake.set()
        self.line_moved.set()
        return waiting is not None

    def begin(self, waiting: Waiting) -> Begun:
        """The job leaves the line for the device."""
        self.running[waiting.job_id] = waiting
        self.line_moved.set()
        return Begun(self, waiting)

    def end(self, waiting: Waiting) -> None:
        """The task that had the job is over: the job has ended, or lines up again, or stays for the next start."""
        live = self.lives[waiting.job_id]
        del self.running[waiting.job_id]
        self.wake.set()
        self.settled.set()
        if self.is_open:
            self.settle(live)

    def follow(self, live: Live, now: Job | None) -> None:
        """Take over what the store says of a job. None: it was removed there, which ends it for whoever waits."""
        if now is None:
            error = {"code": "not_found", "message": f"job {live.job.id} was removed from the store", "hint": ""}
            now = replace(live.job, state="cancelled", finished_s=self.clock(), error=error)
        live.become(now)
        if now.id not in self.running:
            self.settle(live)

    def place(self, job_id: JobId) -> tuple[int, float | None]:
        """The place of a waiting job in line, and the seconds to its end."""
        return self.forecasts.of(job_id, running=self._parts_left())

    def wait_s(self) -> float | None:
        """Seconds until all that is open now will be done; None until jobs like those were measured."""
        return self.forecasts.total_s(running=self._parts_left())

    def by_owner(self) -> Mapping[OwnerId, int]:
        """How many jobs of each owner wait."""
        return self.queue.by_owner()

    def settle(self, live: Live) -> None:
        """Put a job that nobody draws where its state wants it: in line, or out of memory."""
        job = live.job
        if self.lives.get(job.id) is not live:
            return  # it has left, and may have come back as another
        if job.has_ended:
            self.take_out(job.id)
            self.forecasts.forget(job.id)
            del self.lives[job.id]
        elif job.state == "queued" and job.id not in self.queue:
            self._line_up(job)

    def _line_up(self, job: Job) -> None:
        deadline_s = job.submission.deadline_s
        shape = shape_of(job)
        waiting = Waiting(
            job_id=job.id,
            owner=job.submission.caller.owner,
            arrived_s=job.created_s,
            model=job.request.model,
            priority=job.submission.priority,
            n_pictures=job.request.n_images,
            cost=shape.cost,
            deadline_s=None if deadline_s is None else job.created_s + deadline_s,
            megapixels=shape.width_px * shape.height_px / 2**20,
            steps=shape.steps,
            service=job.request.backend if job.request.backend in SERVICES else "",
        )
        self.queue.add(waiting)
        self.wake.set()
        self.line_moved.set()

    def _parts_left(self) -> list[tuple[JobId, float]]:
        return [(job_id, self.lives[job_id].part_left) for job_id in self.running if job_id in self.lives]


class Begun:
    """A job's room on the device, from its turn until its pictures are drawn; one of a service has none there."""

    def __init__(self, board: Board, waiting: Waiting) -> None:
        self.waiting = waiting
        self._board = board
        self._begun_s = time.monotonic()
        n_pictures = 0 if waiting.service else waiting.n_pictures
        self._receipt: tuple[int, float] | None = board.device.begin(n_pictures, now_s=self._begun_s)

    def leave_device(self) -> float:
        """The device time the job had, in seconds, a service's where it drew; 0 if it had left before."""
        if self._receipt is None:
            return 0.0
        now_s = time.monotonic()
        spent_s = self._board.device.end(self._receipt, now_s=now_s)
        if self.waiting.service:
            spent_s = now_s - self._begun_s
        self._receipt = None
        self._board.wake.set()
        return spent_s


def note(text: str, job: Job, **facts: object) -> None:
    """One line for a change of a job's state; never what it draws."""
    submission = job.submission
    whose = {"job_id": job.id, "model": job.request.model, "dialect": submission.dialect}
    log.info(text, extra={**whose, "owner": submission.caller.owner, "attempts": job.attempts, **facts})
