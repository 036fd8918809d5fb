"""Which job goes to which device now: the one that will have finished it first, minding those who wait.

At every event the first waiting jobs are walked in order, and each is put, on paper, where it costs least:
`wait + load + draw`, what it takes from the jobs already there, and what it takes from those who wait (`demand.py`).
Only a job whose device has room now is sent; the others are decided anew at the next event (late binding). Where the
first job of a device must load, later ones whose model is there may go before it a few times.

>>> from sdfleet.fleet.state import LoadedModel, NodeId
>>> predictor = Predictor()
>>> placement = Placement(predictor)
>>> for name, speed, loaded in (("mini", 1.0, "sd15"), ("tower", 8.0, "sdxl")):
...     predictor.seed(DeviceId(name), speed=speed)
...     placement.upsert(Device(
...         device_id=DeviceId(name), node_id=NodeId(name), name=name, heartbeat_s=0.0,
...         memory_total_bytes=8 << 30, memory_free_bytes=0, on_disk={"sd15": 4 << 30, "sdxl": 7 << 30},
...         loaded=(LoadedModel(model=loaded, n_bytes=8 << 30),)))
>>> job = WaitingJob(job_id=JobId("j1"), model="sd15", megapixels=0.25, steps=20)
>>> [sent] = placement.decide([job], n_waiting=1, now_s=0.0)
>>> print(sent.why.text)
mini: done in 5.0 s. tower would need 9.2 s (8.6 s of it loading)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from sdfleet.domain import JobId
from sdfleet.fleet.board import Board
from sdfleet.fleet.cost import Predictor
from sdfleet.fleet.decisions import Dispatch, Planned, Why, waiting_text
from sdfleet.fleet.offers import with_job
from sdfleet.fleet.state import Device, DeviceId, WaitingJob
from sdfleet.fleet.walk import WALKED_JOBS, Patience, Walk, best_of, candidates_of, demand_of

# In a fleet larger than this, most events only weigh what has changed: devices that have just got room and jobs that
# have just come. Walking 96 jobs over all devices costs milliseconds; that is done every so often.
SMALL_FLEET = 16
OFFER_AGAIN_S = 1.0


class Placement:
    """Which job goes to which device now. Knows the devices; is given the waiting jobs, in order, at each event."""

    def __init__(self, predictor: Predictor) -> None:
        self._board = Board(predictor)
        self._patience = Patience()
        self._offered_all_s = float("-inf")

    def upsert(self, device: Device) -> None:
        """Take in a device's newest snapshot. It must hold every job sent there whose compute has not ended."""
        self._board.upsert(device)

    def remove(self, device_id: DeviceId) -> None:
        """The device is gone (its node is dead, revoked, or left)."""
        self._board.remove(device_id)

    def forget(self, job_id: JobId) -> None:
        """The job was cancelled or has ended."""
        self._patience.forget(job_id)

    def decide(self, waiting: Iterable[WaitingJob], *, n_waiting: int, now_s: float) -> tuple[Dispatch, ...]:
        """What to send where, now. To be asked at every event: arrival, slot free, heartbeat change, cancel.

        waiting: in order; only the first are read, so give it lazily. n_waiting: how many wait in all.
        Ask again while something is sent: a call looks at 96 jobs. What is sent counts at once as running on its
        device; the caller's next snapshot of it must have it too.
        A job that cannot be sent after all (the node refuses) is taken back by giving the device without it.
        """
        board = self._board
        if not n_waiting or not board.rooms:
            return ()
        is_thorough = len(board) <= SMALL_FLEET or now_s - self._offered_all_s >= OFFER_AGAIN_S
        if is_thorough:
            self._patience.offered.clear()
            self._offered_all_s = now_s
        walk = Walk(board, self._patience, n_waiting=n_waiting, now_s=now_s, is_thorough=is_thorough)
        return walk.over(waiting)

    def plan(self, waiting: Iterable[WaitingJob], *, n_waiting: int, now_s: float) -> tuple[Planned, ...]:
        """Where the first waiting jobs would go, and when they would be done; changes nothing."""
        board = self._board
        planned = []
        first = list(itertools.islice(waiting, WALKED_JOBS))
        demand = demand_of(board, first, n_waiting=n_waiting)
        try:
            for job in first:
                found = best_of(board, job, demand=demand, now_s=now_s)
                if found is None:
                    planned.append(Planned(job_id=job.job_id, device_id=None, finish_s=None))
                    continue
                seat, offer = found
                planned.append(Planned(job_id=job.job_id, device_id=seat.device.device_id, finish_s=offer.finish_s))
                board.set_plan(seat, with_job(seat, job, offer, now_s=now_s))
        finally:
            board.clear_plans()
        return tuple(planned)

    def explain(self, job: WaitingJob, waiting: Iterable[WaitingJob], *, n_waiting: int, now_s: float) -> Why:
        """Why a waiting job is not sent yet: every device with its numbers, or why it cannot have it."""
        demand = demand_of(self._board, list(itertools.islice(waiting, WALKED_JOBS)), n_waiting=n_waiting)
        candidates = candidates_of(job, self._board.seats.values(), peers=demand.of(job), now_s=now_s)
        text = waiting_text(candidates, n_waiting=n_waiting)
        return Why(job_id=job.job_id, made_s=now_s, n_waiting=n_waiting, candidates=candidates, chosen=None, text=text)
