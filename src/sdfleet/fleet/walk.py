"""One event: the waiting jobs in order, each put on paper where it costs least, and those that can begin are sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sdfleet.domain import JobId
from sdfleet.fleet.board import Board, Bound, Seat
from sdfleet.fleet.decisions import Candidate, Dispatch, Why, sent_text
from sdfleet.fleet.demand import Demand, Peers
from sdfleet.fleet.offers import Offer, candidate_of, cheapest, offer_now, offer_of, with_job
from sdfleet.fleet.state import DeviceId, RunningJob, WaitingJob

# So many waiting jobs are walked: as many as a fleet of some dozens can begin within seconds.
WALKED_JOBS = 96
# So often a job that must load is overtaken on its device by jobs whose model is there.
MAX_OVERTAKEN = 8
# A job that later ones have passed this often on devices that could have drawn it takes the next that can, at any cost.
# Far above what happens without it, so it bounds the wait and changes nothing else.
MAX_PASSED, MAX_PASSED_PER_DEVICE = 32, 8
# Jobs that no device can take are stepped over, so that they stop nobody; so many at most in one walk.
MAX_HOMELESS = 512
# In a larger fleet only the devices worth weighing are named in the record of a choice.
MAX_CANDIDATES = 16


@dataclass(slots=True)
class Patience:
    """What waiting jobs have put up with: kept from one event to the next.

    overtaken: how often on the device where it stood first. passed: how often by any later job. kept_for: the device
    that a job waits for which has been passed too often. offered: jobs that wanted no device which has room.
    """

    overtaken: dict[JobId, int] = field(default_factory=dict)
    passed: dict[JobId, int] = field(default_factory=dict)
    kept_for: dict[JobId, DeviceId] = field(default_factory=dict)
    offered: set[JobId] = field(default_factory=set)

    def forget(self, job_id: JobId) -> None:
        """The job does not wait any more."""
        self.overtaken.pop(job_id, None)
        self.passed.pop(job_id, None)
        self.kept_for.pop(job_id, None)
        self.offered.discard(job_id)


class _Head(NamedTuple):
    """A job that must load on a device with room: sent at the end of the walk if there still is room."""

    position: int
    job: WaitingJob
    seat: Seat


class Walk:
    """One walk over the waiting jobs. is_thorough: every device with room is offered to every job."""

    def __init__(self, board: Board, patience: Patience, *, n_waiting: int, now_s: float, is_thorough: bool) -> None:
        self._board = board
        self._patience = patience
        self._n_waiting = n_waiting
        self._now_s = now_s
        self._is_thorough = is_thorough
        self._demand = Demand((), n_waiting=0, total_speed=board.total_speed)
        self._walked: list[WaitingJob | None] = []  # None where the job is sent
        self._heads: dict[DeviceId, _Head] = {}
        self._real: dict[DeviceId, Seat] = {}  # devices with what this walk has sent them
        self._closed: set[DeviceId] = set()
        self._n_open = len(board.rooms)
        self._fresh = [board.rooms[device_id] for device_id in board.fresh if device_id in board.rooms]
        self._sent: list[Dispatch] = []

    def over(self, waiting: Iterable[WaitingJob]) -> tuple[Dispatch, ...]:
        """What is sent of these jobs. Reads the first, and no further than to where no device with room is left."""
        rest = iter(waiting)
        first = list(itertools.islice(rest, WALKED_JOBS))
        self._demand = demand_of(self._board, first, n_waiting=self._n_waiting)
        try:
            self._walk(itertools.chain(first, rest))
            for head in self._heads.values():
                self._send(head.position, head.job, head.seat)
        finally:
            self._board.clear_plans()
        self._board.fresh.clear()
        for seat in self._real.values():
            self._board.put(seat)
        return tuple(self._sent)

    def _walk(self, waiting: Iterable[WaitingJob]) -> None:
        n_homeless = 0
        for job in waiting:
            if not self._board.has(job.model):
                n_homeless += 1
            elif self._has_seen_the_others(job):
                self._walked.append(job)
                fresh = self._best_fresh(job)
                if fresh is not None:
                    self._put(job, *fresh)
            else:
                found = best_of(self._board, job, demand=self._demand, now_s=self._now_s)
                if found is None:
                    n_homeless += 1
                else:
                    self._walked.append(job)
                    self._patience.offered.add(job.job_id)
                    if self._is_out_of_patience(job):
                        self._insist(job, *found)
                    else:
                        self._put(job, *found)
            if not self._n_open or len(self._walked) >= WALKED_JOBS or n_homeless >= MAX_HOMELESS:
                return

    def _has_seen_the_others(self, job: WaitingJob) -> bool:
        """Whether the job wanted none of the devices with room a moment ago, but for those that are fresh."""
        if self._is_thorough or job.job_id not in self._patience.offered:
            return False
        return not self._is_out_of_patience(job)

    def _best_fresh(self, job: WaitingJob) -> tuple[Seat, Offer] | None:
        """The fresh device that the job wants before any other; None as soon as one other is known to be better.

        A job that wants none is not put on paper: among so many devices one job more or less before a busy one hardly
        matters, and the next thorough walk takes it in.
        """
        peers = self._demand.of(job)
        offers = [
            (seat, offer_of(seat, job, now_s=self._now_s, peers=peers))
            for seat in self._fresh
            if seat.device.device_id not in self._closed and seat.takes(job, now_s=self._now_s)
        ]
        best = cheapest(offers, waited_s=job.waited_s)
        if best is None:
            return None
        bound = Bound()
        bound.cost_s = best[1].cost_s
        for seat in self._board.near(job, now_s=self._now_s, bound=bound):
            if seat is not best[0]:
                offer = offer_of(seat, job, now_s=self._now_s, peers=peers)
                if offer.cost_s < best[1].cost_s:
                    return None
                offers.append((seat, offer))
        return best if cheapest(offers, waited_s=job.waited_s) is best else None

    def _is_out_of_patience(self, job: WaitingJob) -> bool:
        n_passed = self._patience.passed.get(job.job_id, 0)
        return n_passed >= MAX_PASSED and n_passed >= MAX_PASSED + MAX_PASSED_PER_DEVICE * len(self._board)

    def _put(self, job: WaitingJob, seat: Seat, offer: Offer) -> None:
        """On paper; and sent, where it can begin now and need not load."""
        device_id = seat.device.device_id
        position = len(self._walked) - 1
        head = self._heads.get(device_id)
        if device_id not in self._closed:
            if head is None and offer.joins and offer.load_s:
                self._heads[device_id] = _Head(position, job, seat)
                if self._patience.overtaken.get(job.job_id, 0) >= MAX_OVERTAKEN:
                    self._close(device_id)
            elif head is None:
                if offer.joins:
                    self._send(position, job, seat)
            elif job.model in seat.now.warm and self._send(position, job, seat, overtakes=head.job.job_id):
                n_times = self._patience.overtaken.get(head.job.job_id, 0) + 1
                self._patience.overtaken[head.job.job_id] = n_times
        self._board.set_plan(seat, with_job(seat, job, offer, now_s=self._now_s))

    def _insist(self, job: WaitingJob, seat: Seat, offer: Offer) -> None:
        """Begin wherever it is possible; else keep one device from all later jobs until it has room."""
        patience = self._patience
        position = len(self._walked) - 1
        peers = self._demand.of(job)
        offers = []
        for near in self._board.near(job, now_s=self._now_s):
            device_id = near.device.device_id
            if device_id not in self._closed and device_id not in self._heads:
                at_once = offer_now(self._real.get(device_id, near), job, now_s=self._now_s, peers=peers)
                if at_once is not None:
                    offers.append((at_once.cost_s, near.number, near))
        for _, _, near in sorted(offers, key=lambda one: one[:2]):
            if self._send(position, job, near):
                return
        kept = self._board.seats.get(patience.kept_for.get(job.job_id, seat.device.device_id))
        if kept is None or not kept.takes(job, now_s=self._now_s):
            kept = seat
        patience.kept_for[job.job_id] = kept.device.device_id
        self._close(kept.device.device_id)
        self._board.set_plan(seat, with_job(seat, job, offer, now_s=self._now_s))

    def _send(self, position: int, job: WaitingJob, seat: Seat, *, overtakes: str = "") -> bool:
        """Whether the device has room and memory for the job now; then it is sent."""
        device_id = seat.device.device_id
        real = self._real.get(device_id, seat)
        offer = offer_now(real, job, now_s=self._now_s, peers=self._demand.of(job))
        if offer is None:
            return False
        evicts = real.evictions(real.now, job, is_idle=real.now.n_taken == 0)
        if evicts is None:
            return False
        running = RunningJob(
            job_id=job.job_id,
            model=job.model,
            megapixels=job.megapixels,
            n_pictures=job.n_pictures,
            picture_units_left=job.picture_units,
            as_of_s=self._now_s,
            load_left_s=offer.load_s,
        )
        why = self._why(job, seat, offer, overtakes=overtakes)
        device = real.device
        self._sent.append(
            Dispatch(
                job_id=job.job_id,
                device_id=device_id,
                node_id=device.node_id,
                running=running,
                evicts=evicts,
                why=why,
            )
        )
        self._note_passed(position, seat)
        self._walked[position] = None
        self._patience.forget(job.job_id)
        self._real[device_id] = real = self._board.seat_of(device.with_job(running, evicts=evicts))
        if not real.n_free:
            self._close(device_id)
        return True

    def _close(self, device_id: DeviceId) -> None:
        if device_id not in self._closed:
            self._closed.add(device_id)
            self._n_open -= device_id in self._board.rooms

    def _note_passed(self, position: int, seat: Seat) -> None:
        passed = self._patience.passed
        for earlier in self._walked[:position]:
            if earlier is not None and seat.takes(earlier, now_s=self._now_s):
                passed[earlier.job_id] = passed.get(earlier.job_id, 0) + 1

    def _why(self, job: WaitingJob, seat: Seat, offer: Offer, *, overtakes: str) -> Why:
        board = self._board
        chosen = candidate_of(seat, offer)
        seats = board.seats.values() if len(board) <= MAX_CANDIDATES else board.near(job, now_s=self._now_s)
        others = candidates_of(
            job,
            [other for other in seats if other is not seat],
            peers=self._demand.of(job),
            now_s=self._now_s,
        )
        return Why(
            job_id=job.job_id,
            made_s=self._now_s,
            n_waiting=self._n_waiting,
            candidates=(chosen, *others),
            chosen=chosen.device_id,
            text=sent_text(chosen, others, n_waiting=self._n_waiting, overtakes=overtakes),
        )


def demand_of(board: Board, first: Sequence[WaitingJob], *, n_waiting: int) -> Demand:
    """What the waiting jobs would lose by a choice; those that no device has a model for lose nothing."""
    able = [job for job in first if board.has(job.model)]
    n_able = round(n_waiting * len(able) / len(first)) if first else 0
    return Demand(able, n_waiting=n_able, total_speed=board.total_speed)


def best_of(board: Board, job: WaitingJob, *, demand: Demand, now_s: float) -> tuple[Seat, Offer] | None:
    """Where the job costs least; None if no device can take it."""
    peers, bound = demand.of(job), Bound()
    offers = []
    for seat in board.near(job, now_s=now_s, bound=bound):
        offer = offer_of(seat, job, now_s=now_s, peers=peers)
        bound.cost_s = min(bound.cost_s, offer.cost_s)
        offers.append((seat, offer))
    return cheapest(offers, waited_s=job.waited_s)


def candidates_of(job: WaitingJob, seats: Iterable[Seat], *, peers: Peers, now_s: float) -> tuple[Candidate, ...]:
    """These devices with their numbers, the best first; then those that cannot have the job, with the reason."""
    offers, refused = [], []
    for seat in seats:
        device = seat.device
        refusal = seat.refusal(job, now_s=now_s)
        if not refusal:
            offers.append((seat, offer_of(seat, job, now_s=now_s, peers=peers)))
        else:
            refused.append(
                Candidate(device_id=device.device_id, node_id=device.node_id, name=device.name, refused=refusal)
            )
    best = cheapest(offers, waited_s=job.waited_s)
    offers.sort(key=lambda one: (one is not best, one[1].cost_s))
    return (*(candidate_of(*one) for one in offers), *refused)
