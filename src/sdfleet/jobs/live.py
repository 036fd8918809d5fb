"""What is known of one open job now: where it stands, and who wants to hear of it. Only in memory.

A watcher keeps one number, the last it has seen. Whoever is slow finds the newest state and the newest step of each
picture, never a backlog: a job costs the same memory whether nobody or a thousand watch it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from sdfleet.domain import Job, JobEvent, JobId, JobStatus, Progress
from sdfleet.errors import SdfleetError


class Live:
    """One job that has not ended, or the end of it for those who still watch. Belongs to one event loop.

    job: as the store has it, without its input pictures. gone: set when the desk closed before the job ended.
    place: asked for the place in line of a job that waits, and the seconds to its end.
    """

    def __init__(self, job: Job, *, place: Callable[[JobId], tuple[int, float | None]]) -> None:
        self._place = place
        self._job = without_pictures(job)
        self._number = 1
        self._state_number = 1
        self._progress: dict[int, tuple[int, Progress]] = {}  # picture -> (event number, newest step)
        self._changed = asyncio.Event()
        self._n_watchers = 0
        self._n_previewers = 0
        self._is_previewing = job.submission.wants_previews
        self.n_deaths = 0
        self.is_cancelled = False
        self.gone: SdfleetError | None = None

    @property
    def job(self) -> Job:
        return self._job

    @property
    def has_ended(self) -> bool:
        return self._job.has_ended

    @property
    def is_watched(self) -> bool:
        return self._n_watchers > 0

    @property
    def wants_previews(self) -> bool:
        """Somebody looks, or said with the job that somebody will and has not come and left yet."""
        return self._n_previewers > 0 or self._is_previewing

    @property
    def part_left(self) -> float:
        """Which part of the drawing is still to do, 0 to 1."""
        status = self.status() if self._job.state == "running" else None
        return 1.0 - status.step / status.n_steps if status is not None and status.n_steps else 1.0

    def status(self) -> JobStatus:
        """Where the job stands now."""
        job = self._job
        steps = [progress for _, progress in self._progress.values()]
        per_picture = max((each.n_steps for each in steps), default=job.request.steps or 0)
        n_steps = per_picture * job.request.n_images
        step = n_steps if job.state == "done" else sum(each.step for each in steps)
        if job.state == "queued":
            position, eta_s = self._place(job.id)
            return JobStatus(job=job, queue_position=position, eta_s=eta_s, n_steps=n_steps)
        eta_s = None if job.has_ended or not steps else steps[-1].eta_s
        return JobStatus(job=job, eta_s=eta_s, step=step, n_steps=n_steps)

    def become(self, job: Job) -> None:
        """Take in a new state; those who watch hear of it."""
        if not job.has_ended:
            self._progress.clear()  # it begins, or begins anew
        self._job = without_pictures(job)
        self.touch()

    def touch(self) -> None:
        """Tell those who watch that the status is another: the job's state, or its place among the waiting."""
        self._number += 1
        self._state_number = self._number
        self._wake()

    def take(self, progress: Progress) -> None:
        """Take in a step."""
        self._number += 1
        # Put last, so that `eta_s` of the newest step is read.
        self._progress.pop(progress.image_index, None)
        self._progress[progress.image_index] = self._number, progress
        self._wake()

    def leave(self, reason: SdfleetError) -> None:
        """Nothing more will come: the desk closes and the job goes on after the next start."""
        self.gone = reason
        self._wake()

    async def wait(self) -> None:
        """Until the job has ended. Raises `gone`."""
        while not self.has_ended:
            if self.gone is not None:
                raise self.gone
            await self._changed.wait()

    @contextmanager
    def watched(self, *, previews: bool) -> Iterator[None]:
        """Count this watcher while it watches."""
        self._n_watchers += 1
        self._n_previewers += previews
        try:
            yield
        finally:
            self._n_watchers -= 1
            self._n_previewers -= previews
            self._is_previewing = self._is_previewing and not previews

    async def news(self, after: int) -> list[JobEvent]:
        """What happened after event `after`, oldest first: the newest step of each picture and the newest state.

        Waits for something to happen. Empty if the watcher has seen the end. Raises `gone`.
        """
        if after > self._number:
            # A reader from before a restart: numbers go on from where it stands.
            self._number = self._state_number = after + 1
        while self._number <= after:
            if self.has_ended:
                return []
            if self.gone is not None:
                raise self.gone
            await self._changed.wait()
        status = self.status()
        events = [
            JobEvent(number=number, status=status, progress=progress)
            for number, progress in self._progress.values()
            if number > after
        ]
        if self._state_number > after:
            events.append(JobEvent(number=self._state_number, status=status))
        return sorted(events, key=lambda event: event.number)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def without_pictures(job: Job) -> Job:
    """The job without its input pictures, which may be many megabytes."""
    request = job.request
    if request.image is None and request.mask is None:
        return job
    return replace(job, submission=replace(job.submission, request=replace(request, image=None, mask=None)))
