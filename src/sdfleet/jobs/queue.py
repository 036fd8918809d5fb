"""Who is next: pure, so that every rule can be tested without a clock or a device.

Between owners: the higher priority first, then the owner who has had less of the device, then who came first. An owner
who was not served for a while rises by one point of priority every `aging_s`, so a flood of somebody else's, at
whatever priority, only delays. Within one owner's jobs a point of priority is a head start of `aging_s`.

Models: jobs for the model on the device go before others of the same rank, for `patience_s` from the moment the other
model's turn came; then the device is emptied and changed. So a model is changed at most once in `patience_s` while all
have work of one rank, and nobody waits longer than that for other people's convenience.

>>> queue = FairQueue()
>>> for number, owner in enumerate(["ann", "ann", "ann", "bob"]):
...     _ = queue.add(Waiting(job_id=JobId(f"{owner}{number}"), owner=OwnerId(owner), arrived_s=float(number)))
>>> queue.order(now_s=4.0)
['ann0', 'bob3', 'ann1', 'ann2']
>>> queue.next(now_s=4.0, room=1).job_id
'ann0'
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sdfleet.domain import JobId, OwnerId

# A priority of 100 is a head start of 50 minutes on 0: much for one evening's batch, and still an end.
AGING_S = 30.0
# Loading a checkpoint of several GB takes 5 to 30 s: changing more often would spend most of the time on that.
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What the queue must know of a job.

    n_pictures: how much room it takes on the device. cost: how much of the device it takes, in any unit that is the
    same for all (the desk counts pixels times steps); an owner's turn comes by what its jobs cost.
    arrived_s, deadline_s: on one clock; after `deadline_s` nobody wants it any more.
    megapixels, steps: of one picture, for whoever knows how long that takes where.
    service: who draws it, where that is no machine of ours (see domain.SERVICES): it takes no room on the device.
    """

    job_id: JobId
    owner: OwnerId
    arrived_s: float
    model: str = ""
    priority: int = 0
    n_pictures: int = 1
    cost: float = 1.0
    deadline_s: float | None = None
    megapixels: float = 0.0
    steps: int = 0
    service: str = ""


@dataclass(slots=True)
class _Line:
    """One owner's jobs, best first. share: what it had of the device, so far; see `FairQueue._floor`."""

    share: float
    served_s: float = float("-inf")
    jobs: list[tuple[float, int, Waiting]] = field(default_factory=list)  # (rank, number of arrival, job)


# What decides between two owners' best jobs; the smallest is next.
_Rank = tuple[float, float, float, int]


class FairQueue:
    """Jobs that wait. `now_s` and the jobs' times are on one clock, which the caller chooses."""

    def __init__(self, *, aging_s: float = AGING_S, patience_s: float = PATIENCE_S) -> None:
        self._aging_s = aging_s
        self._patience_s = patience_s
        self._lines: dict[OwnerId, _Line] = {}
        self._keys: dict[JobId, tuple[float, int, Waiting]] = {}
        self._n_arrived = 0
        self._n_for_services = 0
        # Start-time fair queueing: who begins to wait starts where the last one served stood, so that neither a long
        # silence nor a long use in the past counts.
        self._floor = 0.0
        self._model: str | None = None
        self._due_since: dict[str, float] = {}  # model -> when it was first passed over for the model on the device
        self.version = 0  # another number, another order

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._keys

    def __iter__(self) -> Iterator[Waiting]:
        return (waiting for _, _, waiting in self._keys.values())

    def by_owner(self) -> dict[OwnerId, int]:
        """How many jobs of each owner wait."""
        return {owner: len(line.jobs) for owner, line in self._lines.items() if line.jobs}

    def add(self, waiting: Waiting) -> bool:
        """Let the job wait; False if it does already."""
        if waiting.job_id in self._keys:
            return False
        line = self._lines.setdefault(waiting.owner, _Line(share=self._floor))
        if not line.jobs:
            line.share = max(line.share, self._floor)
        self._n_arrived += 1
        key = (waiting.arrived_s - self._aging_s * waiting.priority, self._n_arrived, waiting)
        bisect.insort(line.jobs, key, key=lambda entry: entry[:2])
        self._keys[waiting.job_id] = key
        self._n_for_services += bool(waiting.service)
        self.version += 1
        return True

    def remove(self, job_id: JobId) -> Waiting | None:
        """Take the job out, wherever it stands; None if it does not wait."""
        key = self._keys.pop(job_id, None)
        if key is None:
            return None
        jobs = self._lines[key[2].owner].jobs
        del jobs[bisect.bisect_left(jobs, key[:2], key=lambda entry: entry[:2])]
        self._n_for_services -= bool(key[2].service)
        self.version += 1
        return key[2]

    def next(self, *, now_s: float, room: int, n_running: int = 0) -> Waiting | None:
        """The job whose turn it is, taken out; None if nobody waits or it must wait for the device.

        room: how many more pictures the device takes. n_running: how many it is drawing; with 0 anything fits.
        A large job is not passed by small ones, and another model waits until the device is empty. Jobs of services
        are none of its business, see `next_for_service`.
        """
        best = self._best(now_s)
        if best is None:
            return None
        chosen = self._grouped(best, now_s)
        if n_running and (chosen.n_pictures > room or chosen.model != self._model):
            return None
        self._take(chosen, now_s)
        return chosen

    def next_for_service(self, *, now_s: float, room: Callable[[Waiting], bool]) -> Waiting | None:
        """The first job of a service that has room for it, taken out; None if there is none."""
        if not self._n_for_services:
            return None
        found = next((each for each in self.in_order(now_s) if each.service and room(each)), None)
        if found is not None:
            self._take(found, now_s)
        return found

    def late(self, now_s: float) -> list[Waiting]:
        """Jobs whose deadline has passed, taken out."""
        late = [each for each in self if each.deadline_s is not None and each.deadline_s <= now_s]
        for each in late:
            self.remove(each.job_id)
        return late

    def first_deadline_s(self) -> float | None:
        """When `late` will next have something to give."""
        return min((each.deadline_s for each in self if each.deadline_s is not None), default=None)

    def take(self, job_id: JobId, *, now_s: float) -> Waiting | None:
        """Take a job out because its turn has come, wherever it stands; None if it does not wait."""
        key = self._keys.get(job_id)
        if key is None:
            return None
        self._take(key[2], now_s)
        return key[2]

    def order(self, now_s: float) -> list[JobId]:
        """All jobs in the order in which they will be taken if nobody else comes and all are of one model."""
        return [waiting.job_id for waiting in self.in_order(now_s)]

    def in_order(self, now_s: float) -> Iterator[Waiting]:
        """The jobs of `order`, as far as they are asked for; the queue must not change meanwhile."""
        shares = {owner: line.share for owner, line in self._lines.items()}
        places = dict.fromkeys(self._lines, 0)

        def entry(owner: OwnerId, served_s: float) -> tuple[_Rank, OwnerId]:
            key = self._lines[owner].jobs[places[owner]]
            return self._rank(key, share=shares[owner], served_s=served_s, now_s=now_s), owner

        heap = [entry(owner, line.served_s) for owner, line in self._lines.items() if line.jobs]
        heapq.heapify(heap)
        while heap:
            owner = heapq.heappop(heap)[1]
            waiting = self._lines[owner].jobs[places[owner]][2]
            yield waiting
            shares[owner] += waiting.cost
            places[owner] += 1
            if places[owner] < len(self._lines[owner].jobs):
                heapq.heappush(heap, entry(owner, now_s))

    def _rank(self, key: tuple[float, int, Waiting], *, share: float, served_s: float, now_s: float) -> _Rank:
        _, number, waiting = key
        neglected_s = max(0.0, now_s - max(waiting.arrived_s, served_s))
        return (-(waiting.priority + neglected_s // self._aging_s), share, waiting.arrived_s, number)

    def _best(self, now_s: float, *, model: str | None = None) -> tuple[_Rank, Waiting] | None:
        """The first in rank of each owner's first job (of this model), and its rank."""
        found: tuple[_Rank, Waiting] | None = None
        for line in self._lines.values():
            fits = (each for each in line.jobs if not each[2].service and (model is None or each[2].model == model))
            key = next(fits, None)
            if key is None:
                continue
            rank = self._rank(key, share=line.share, served_s=line.served_s, now_s=now_s)
            if found is None or rank < found[0]:
                found = rank, key[2]
        return found

    def _grouped(self, best: tuple[_Rank, Waiting], now_s: float) -> Waiting:
        """The job of the model on the device that goes before the best of another, if there is one and it may."""
        rank, waiting = best
        if self._model is None or waiting.model == self._model:
            return waiting
        due_since = self._due_since.setdefault(waiting.model, now_s)
        same = self._best(now_s, model=self._model) if now_s - due_since < self._patience_s else None
        return waiting if same is None or same[0][0] > rank[0] else same[1]

    def _take(self, waiting: Waiting, now_s: float) -> None:
        self.remove(waiting.job_id)
        if not waiting.service and waiting.model != self._model:
            self._model = waiting.model
            self._due_since.pop(waiting.model, None)
        line = self._lines[waiting.owner]
        self._floor = max(self._floor, line.share)
        line.share += waiting.cost
        line.served_s = now_s
        # Whoever waits for nothing and stands no worse than a newcomer would need not be remembered.
        for owner in [o for o, each in self._lines.items() if not each.jobs and each.share <= self._floor]:
            del self._lines[owner]
