"""What those who wait would lose by a choice, in seconds: the price that a job's cost has in it.

A device's seconds are worth what the waiting jobs could do with them. While N jobs wait, S seconds of a device that is
the part s of the fleet's speed would bring each of them forward by S * s, so who takes them costs the others N * s * S.
Two things follow where machines differ by a factor of eight:

- Drawing costs that much on any device that somebody else would use. On one that stands idle with the model in memory
  it costs nobody anything, and a job that begins there shortens the line for all others.
- Loading keeps a device from the jobs whose models it has in memory; where none of them waits, it keeps it from nobody.

The job that is weighed counts among the N itself, for those who come while it is drawn.

Lin and Kumar (1984), "Optimal control of a queueing system with two heterogeneous servers", show why the sum gains when
slow servers are used earlier than each job alone would choose.

>>> from sdfleet.domain import JobId
>>> jobs = [WaitingJob(job_id=JobId(str(n)), model=model, megapixels=1, steps=1) for n, model in enumerate("aab")]
>>> demand = Demand(jobs, n_waiting=6, total_speed=4.0).of(jobs[0])
>>> demand.drawing_s(10.0, speed=2.0), demand.loading_s(10.0, {"b": 1}, speed=2.0)
(30.0, 15.0)
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sdfleet.fleet.state import WaitingJob


@dataclass(frozen=True, slots=True)
class Peers:
    """Those who wait and are at least as urgent as one job. n: how many. n_of: of them, by model.

    total_speed: the fleet's, in units of a device of speed 1.
    """

    n: float
    n_of: Mapping[str, float]
    total_speed: float

    def drawing_s(self, taken_s: float, *, speed: float) -> float:
        """What they lose, summed, while a device of this speed draws for `taken_s`."""
        return taken_s * speed / self.total_speed * self.n

    def loading_s(self, load_s: float, warm: Iterable[str], *, speed: float) -> float:
        """What those of them lose, summed, whose models are in the memory of a device that loads for `load_s`."""
        n = 1.0
        for model in warm:
            n += self.n_of.get(model, 0.0)
        return load_s * speed / self.total_speed * n


class Demand:
    """Who waits. first: the first of them, in order, from which the others are judged. n_waiting: all of them."""

    def __init__(self, first: Iterable[WaitingJob], *, n_waiting: int, total_speed: float) -> None:
        by_urgency = sorted(Counter((job.priority, job.model) for job in first).items(), reverse=True)
        each = n_waiting / max(1, sum(n for _, n in by_urgency))
        self._peers: dict[int, Peers] = {}
        so_far: Counter[str] = Counter()
        for priority, alike in itertools.groupby(by_urgency, key=lambda one: one[0][0]):
            for (_, model), n in alike:
                so_far[model] += n
            n_of = {model: n * each for model, n in so_far.items()}
            self._peers[priority] = Peers(so_far.total() * each, n_of, total_speed or 1.0)
        self._nobody = Peers(0.0, {}, total_speed or 1.0)

    def of(self, job: WaitingJob) -> Peers:
        """Those whose loss counts for this job: an urgent one owes nothing to the less urgent."""
        known = self._peers.get(job.priority)
        if known is not None:
            return known
        # Of a priority that none of the first has.
        above = [priority for priority in self._peers if priority > job.priority]
        return self._peers[min(above)] if above else self._nobody
