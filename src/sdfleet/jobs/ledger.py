"""A second place where accepted jobs are written down, outside of the store: the seam for a fleet's broker."""

from __future__ import annotations

from typing import Protocol

from sdfleet.domain import Job


class Ledger(Protocol):
    """Told of a job before its caller is answered. That a job has ended it learns as an `Observer`."""

    async def enter(self, job: Job) -> None:
        """Return when the job is written down; one that is there already is fine. Raises a Busy error if it cannot."""

    async def again(self, job: Job) -> None:
        """Write a job down that had ended and is to be drawn again. Raises as `enter`."""
