"""The jobs between the desk and the nodes: assigned, given out, homeless, or found at a node after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from sdfleet.domain import JobId
from sdfleet.errors import SdfleetError
from sdfleet.fleet.errand import Errand
from sdfleet.fleet.receiving import Expected
from sdfleet.fleet.state import WaitingJob
from sdfleet.runtime import Prepared


@dataclass(slots=True, eq=False)
class Homeless:
    """A job that was begun and has no node now. home: the next one, from the chooser or from the node that has it."""

    job: WaitingJob
    home: asyncio.Future[str]

    def moves_to(self, node: str) -> None:
        """Its next node is known."""
        if not self.home.done():
            self.home.set_result(node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """A job that the desk is about to begin, and where. until_s: on the router's loop, when nobody wants it more."""

    node: str
    until_s: float | None = None


class UnderWay:
    """Everything that the router keeps of such jobs. A job that has ended leaves nothing behind (`forget`).

    expected: what may come of a job; also after its pictures have, until they are stored.
    not_on: nodes that will not draw a job, and why. offers: jobs that a node has and that wait in line here, or may yet
    come from the ledger.
    """

    def __init__(self) -> None:
        self.prepared: dict[JobId, Prepared] = {}
        self.assigned: dict[JobId, Assigned] = {}
        self.errands: dict[JobId, Errand] = {}
        self.expected: dict[JobId, Expected] = {}
        self.homeless: dict[JobId, Homeless] = {}
        self.not_on: dict[JobId, dict[str, SdfleetError]] = {}
        self.offers: dict[JobId, str] = {}
        # Every heartbeat looks at the jobs of its node: in a fleet of a thousand nodes not at all of them.
        self._at: dict[str, dict[JobId, Errand]] = {}

    def begin(self, errand: Errand) -> None:
        """The job is with this node now, and with no other."""
        self.stop(errand.job)
        self.errands[errand.job] = errand
        self._at.setdefault(errand.node, {})[errand.job] = errand

    def stop(self, job: JobId) -> None:
        """The job is with no node any more."""
        errand = self.errands.pop(job, None)
        if errand is not None:
            here = self._at[errand.node]
            here.pop(job, None)
            if not here:
                del self._at[errand.node]

    def at(self, node: str) -> tuple[Errand, ...]:
        """What a node was given."""
        return tuple(self._at.get(node, {}).values())

    def forget(self, job: JobId) -> None:
        """The job has ended."""
        self.stop(job)
        for kept in (self.prepared, self.assigned, self.expected, self.homeless, self.not_on, self.offers):
            kept.pop(job, None)

    def withdraw(self, node: str) -> None:
        """The node is gone, and what it offered with it."""
        for job in [job for job, at in self.offers.items() if at == node]:
            del self.offers[job]

    def idle(self) -> Iterator[JobId]:
        """Jobs that something is kept of and that nobody is drawing or carrying."""
        kept = {*self.prepared, *self.assigned, *self.expected}
        return (job for job in kept if job not in self.errands and job not in self.homeless)
