"""When the jobs in line will be done: their place, and the work that stands before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sdfleet.domain import Job, JobId
from sdfleet.jobs.estimates import Estimates, Shape
from sdfleet.jobs.queue import FairQueue

# (place in line, 1 is next; seconds to the end, None until jobs of its model were measured).
Forecast = tuple[int, float | None]

# The whole line is walked for a forecast (3 ms for 1000 jobs): not at every question while it moves.
RENEW_EVERY_S = 0.25
SMALL_QUEUE = 100


class Forecasts:
    """Knows the shape of every open job. clock: seconds, for how old a forecast is."""

    def __init__(self, queue: FairQueue, estimates: Estimates, *, clock: Callable[[], float]) -> None:
        self._queue = queue
        self._estimates = estimates
        self._clock = clock
        self._shapes: dict[JobId, Shape] = {}
        self._of: dict[JobId, Forecast] = {}
        self._version = -1
        self._made_s = float("-inf")
        self._total_s: float | None = 0.0

    def note(self, job: Job) -> Shape:
        """Take in an open job."""
        shape = self._shapes[job.id] = shape_of(job)
        return shape

    def forget(self, job_id: JobId) -> None:
        """The job has ended."""
        self._shapes.pop(job_id, None)
        self._of.pop(job_id, None)

    def learn(self, job: Job, *, device_s: float) -> None:
        """Take in what a finished job took of the device."""
        self._estimates.learn(shape_of(job), device_s=device_s)

    def seconds(self, job_id: JobId) -> float | None:
        """Device time of one open job."""
        shape = self._shapes.get(job_id)
        return None if shape is None else self._estimates.seconds(shape)

    def of(self, job_id: JobId, *, running: Iterable[tuple[JobId, float]]) -> Forecast:
        """The place of a job in line. running: the jobs being drawn, and which part of each is still to do (0 to 1)."""
        self._renew(running)
        return self._of.get(job_id, (len(self._queue), self._total_s))

    def total_s(self, *, running: Iterable[tuple[JobId, float]]) -> float | None:
        """Seconds until all that is open now will be done."""
        self._renew(running)
        return self._total_s

    def _renew(self, running: Iterable[tuple[JobId, float]]) -> None:
        now_s = self._clock()
        age_s = now_s - self._made_s
        is_moved = self._version != self._queue.version
        if age_s < RENEW_EVERY_S and not (is_moved and len(self._queue) <= SMALL_QUEUE):
            return
        self._made_s, self._version = now_s, self._queue.version
        total_s: float | None = 0.0
        for job_id, part in running:
            total_s = _plus(total_s, self.seconds(job_id), part)
        self._of.clear()
        for place, job_id in enumerate(self._queue.order(now_s), start=1):
            total_s = _plus(total_s, self.seconds(job_id), 1.0)
            self._of[job_id] = place, total_s
        self._total_s = total_s


def shape_of(job: Job) -> Shape:
    """What decides how long a job takes. Its request has nothing left open."""
    request = job.request
    assert request.width_px is not None
    assert request.height_px is not None
    assert request.steps is not None
    return Shape(
        model=request.model,
        width_px=request.width_px,
        height_px=request.height_px,
        steps=request.steps,
        n_pictures=request.n_images,
    )


def _plus(total_s: float | None, more_s: float | None, part: float) -> float | None:
    return None if total_s is None or more_s is None else total_s + more_s * part
