"""One job at one node, from `run` to its outcome, as the router sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sdfleet.domain import JobId, Progress
from sdfleet.fleet.messages import JobNews, RunAnswer
from sdfleet.fleet.receiving import Expected
from sdfleet.runtime import Prepared


@dataclass(slots=True, eq=False)
class Errand:
    """A job that is with a node now. Times are of the router's loop.

    attempt: of all that this router has begun. begun_s: when it was given out; until_s: when nobody wants it any more.
    boot: the process of the node that has it. is_taken: the node has said that it has the job. is_computed: and that it
    has drawn it.
    changed: set whenever something of this is another. answer: the node's last word to `run`, until it is looked at.
    why_lost: set when the node will not bring the job to its end. n_missing: heartbeats in a row without the job.
    picture_s: of the node, when the errand began, see `Member.picture_s`.
    """

    prepared: Prepared
    expected: Expected
    on_progress: Callable[[Progress], None] | None
    node: str
    lease: str
    attempt: int
    begun_s: float
    until_s: float | None = None
    picture_s: float = 0.0
    boot: str = ""
    is_taken: bool = False
    is_computed: bool = False
    is_cancelled: bool = False
    wants_previews: bool = False
    last_seq: int = 0
    n_missing: int = 0
    answer: RunAnswer | None = None
    why_lost: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def job(self) -> JobId:
        return self.prepared.drawing.job_id

    @property
    def is_lost(self) -> bool:
        """Whether another node must have the job."""
        return self.why_lost != ""

    def lose(self, why: str) -> None:
        """The node will not bring this job to its end."""
        self.why_lost = why
        self.changed.set()

    def ask_again(self) -> None:
        """The node must be given the job anew: it does not seem to have it."""
        self.is_taken = False
        self.n_missing = 0
        self.changed.set()

    def answered(self, answer: RunAnswer) -> None:
        """The node has said something to `run`."""
        self.answer = answer
        self.changed.set()

    def take(self, news: JobNews) -> None:
        """Pass a step on, unless a newer one was, or there is no such step."""
        drawing = self.prepared.drawing
        is_new = news.lease == self.lease and news.seq > self.last_seq
        is_sound = 0 <= news.image_index < drawing.n_images and 0 <= news.step <= news.n_steps
        if news.phase != "step" or not (is_new and is_sound):
            return
        self.last_seq = news.seq
        if self.on_progress is not None:
            progress = Progress(
                job_id=self.job, image_index=news.image_index, step=news.step, n_steps=news.n_steps,
                eta_s=news.eta_s, preview=news.preview,
            )  # fmt: skip
            self.on_progress(progress if self.wants_previews else replace(progress, preview=None))
