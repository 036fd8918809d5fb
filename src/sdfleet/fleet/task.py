"""One job being drawn at a node, from its acceptance to its place in the spool."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from sdfleet.errors import JobCancelled, SdfleetError
from sdfleet.fleet.messages import Failure, JobNews, Outcome, Run, pack_outcome
from sdfleet.fleet.packing import BrokenMessage

# Pixels that are packed in less time than a thread takes to wake.
_SMALL_BYTES = 2**18


@dataclass(slots=True, eq=False)
class Task:
    """A job being drawn here. parts: progress of each picture, 0 to 1."""

    run: Run
    task: asyncio.Task[None] | None = None
    seq: int = 0
    parts: dict[int, float] = field(default_factory=dict)
    eta_s: float | None = None
    news: dict[int, JobNews] = field(default_factory=dict)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    is_drawing: bool = False

    @property
    def n_pictures(self) -> int:
        return self.run.request.n_images

    @property
    def is_cancelled(self) -> bool:
        return self.stop.is_set()

    def check(self) -> None:
        """Raise JobCancelled if nobody wants it any more."""
        if self.is_cancelled:
            raise JobCancelled(f"job {self.run.job} was cancelled")


async def packed_or_failed(outcome: Outcome) -> bytes:
    """The outcome as bytes; one that is too large to send is a failure."""
    n_bytes = 0 if isinstance(outcome, Failure) else sum(len(each.picture.data) for each in outcome.images)
    try:
        return pack_outcome(outcome) if n_bytes < _SMALL_BYTES else await asyncio.to_thread(pack_outcome, outcome)
    except BrokenMessage as exc:
        return pack_outcome(Failure(job_id=outcome.job_id, error=SdfleetError(f"its pictures cannot be sent: {exc}")))
