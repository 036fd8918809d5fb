"""Who begins now, in a fleet: the desk's `Chooser`, with placement's rule.

Jobs that a node has already (the router was started again) go back to it first; then those whose node was lost; then
the line, in its fair order, each where it is finished first, and only where there is room at this moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from sdfleet.fleet.remote import FleetBackend
from sdfleet.fleet.state import NodeId, WaitingJob
from sdfleet.jobs.queue import FairQueue, Waiting


class PlacedByFleet:
    """See `jobs.chooser.Chooser`."""

    def __init__(self, fleet: FleetBackend) -> None:
        self._fleet = fleet
        self._ready: deque[Waiting] = deque()

    def on_change(self, wake: Callable[[], None]) -> None:
        self._fleet.on_change(wake)

    def next(self, queue: FairQueue, *, now_s: float) -> Waiting | None:
        if self._ready:
            return self._ready.popleft()
        self._fleet.jobs_are_known()
        if not self._fleet.is_settled:
            return None
        adopted = self._adopted(queue, now_s)
        if adopted is not None:
            return adopted
        self._decide(queue, now_s)
        return self._ready.popleft() if self._ready else None

    def _adopted(self, queue: FairQueue, now_s: float) -> Waiting | None:
        for job, node in list(self._fleet.offers().items()):
            waiting = queue.take(job, now_s=now_s)
            if waiting is None:
                if not self._fleet.may_come(job):
                    self._fleet.offers().pop(job, None)  # it runs, or has ended
                continue
            self._fleet.assign(self._job(waiting, now_s), node, left_s=_left_s(waiting, now_s))
            return waiting
        return None

    def _decide(self, queue: FairQueue, now_s: float) -> None:
        homeless = self._fleet.homeless()

        def in_order() -> Iterator[WaitingJob]:
            yield from homeless
            for waiting in queue.in_order(now_s):
                yield self._job(waiting, now_s)

        sent = self._fleet.placement.decide(in_order(), n_waiting=len(queue) + len(homeless), now_s=self._fleet.now_s())
        for dispatch in sent:
            waiting = queue.take(dispatch.job_id, now_s=now_s)
            is_homeless = self._fleet.take(dispatch, left_s=None if waiting is None else _left_s(waiting, now_s))
            if waiting is not None:
                self._ready.append(waiting)
            elif not is_homeless:
                self._fleet.untake(dispatch)

    def _job(self, waiting: Waiting, now_s: float) -> WaitingJob:
        return in_line(waiting, not_on=self._fleet.not_on(waiting.job_id), now_s=now_s)


def in_line(waiting: Waiting, *, not_on: frozenset[NodeId], now_s: float) -> WaitingJob:
    """A job of the line as placement sees it. now_s: on the line's clock."""
    return WaitingJob(
        job_id=waiting.job_id,
        model=waiting.model,
        megapixels=waiting.megapixels,
        steps=waiting.steps,
        n_pictures=waiting.n_pictures,
        priority=waiting.priority,
        owner=waiting.owner,
        waited_s=max(0.0, now_s - waiting.arrived_s),
        not_on=not_on,
    )


def _left_s(waiting: Waiting, now_s: float) -> float | None:
    return None if waiting.deadline_s is None else waiting.deadline_s - now_s
