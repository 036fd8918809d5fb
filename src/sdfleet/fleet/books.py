"""The router's two books kept alike: its own store of jobs, and the ledger on the broker.

    accepted      row written, then entered in the ledger, then answered
    ended         row written, then struck from the ledger
    at the start  rows that have not ended are entered again; entries that the store does not know are told of

An entry that the router holds is extended until its job ends; one that it holds no more comes to it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NoReturn

from sdfleet.domain import Job, JobId
from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.transport import EXTEND_S, Entry, Ledger

log = logging.getLogger(__name__)

NEXT_S = 1.0
AGAIN_S = 1.0
# From the end of a job to its entry's.
STRIKE_S = 0.05
# Ids; of a job whose entry is not in the ledger at all, nothing ever comes.
MOST_REMEMBERED = 20_000


class Books:
    """The desk's `Ledger` and one of its `Observer`s. `run` it only while this router reigns: entries are its jobs.

    body: what is written down of a job. is_open: asks the store whether a job has not ended; None: it knows no such.
    is_live: the same of the desk, at once; False where it has no such job. unknown: called with an entry whose job the
    store does not know; gives back whether it was taken into the store. ended: told of every job that has ended, and
    whether done.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        body: Callable[[Job], bytes],
        is_open: Callable[[JobId], Awaitable[bool | None]],
        unknown: Callable[[Entry], Awaitable[bool]],
        ended: Callable[[JobId, bool], None],
        is_live: Callable[[JobId], bool] = lambda _: False,
    ) -> None:
        self._ledger = ledger
        self._body = body
        self._is_open = is_open
        self._is_live = is_live
        self._unknown = unknown
        self._ended = ended
        self._held: dict[JobId, Entry] = {}
        self._to_strike: dict[JobId, Entry] = {}
        self._striking: Entry | None = None
        # Jobs that have ended before their entry came by; one that never does (it was refused) is forgotten in time.
        self._done: OrderedDict[JobId, None] = OrderedDict()
        self._news = asyncio.Event()

    async def enter(self, job: Job) -> None:
        """Write an accepted job down. Raises StoreUnavailable, LedgerFull."""
        await self._ledger.enter(job.id, self._body(job), is_urgent=job.submission.priority > 0)

    async def again(self, job: Job) -> None:
        """Write a job down that had ended and is to be drawn again. Raises as `enter`."""
        self._done.pop(job.id, None)
        entry = self._to_strike.pop(job.id, None)
        if entry is not None and self._striking is not entry:
            self._held[job.id] = entry  # it stands there still
            return
        # Another number than that of any turn before, also of one before a restart.
        turn = int(time.time())
        await self._ledger.enter(job.id, self._body(job), turn=turn, is_urgent=job.submission.priority > 0)

    async def resume(self, jobs: list[Job]) -> None:
        """Enter jobs of an earlier life again; those that are there already stay as they are."""
        for job in jobs:
            await self.enter(job)

    async def run(self) -> NoReturn:
        """Hold what comes, extend it, strike what has ended, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hold(), name="ledger: hold")
            tasks.create_task(self._extend(), name="ledger: extend")
            tasks.create_task(self._strike(), name="ledger: strike")
        raise AssertionError

    # ------------------------------------------------------------------------------------------ what the desk observes

    def on_accepted(self, job: Job) -> None:
        """Nothing: `enter` is called for it."""

    def on_started(self, job: Job, *, wait_s: float) -> None:
        """Nothing."""

    def on_finished(self, job: Job, *, draw_s: float, device_s: float, total_s: float) -> None:
        self._let_go(job.id, is_done=True)

    def on_failed(self, job: Job, *, code: str) -> None:
        self._let_go(job.id, is_done=False)

    def on_store_fault(self, *, code: str) -> None:
        """Nothing."""

    def _let_go(self, job: JobId, *, is_done: bool) -> None:
        self._ended(job, is_done)
        entry = self._held.pop(job, None)
        if entry is None:
            self._remember(job)
        else:
            self._to_strike[job] = entry
            self._news.set()

    def _remember(self, job: JobId) -> None:
        self._done[job] = None
        while len(self._done) > MOST_REMEMBERED:
            self._done.popitem(last=False)

    # ----------------------------------------------------------------------------------------------------- the ledger

    async def _hold(self) -> NoReturn:
        while True:
            try:
                entry = await self._ledger.next(timeout_s=NEXT_S)
            except StoreUnavailable as exc:
                log.info("the ledger cannot be read now", extra={"why": str(exc)})
                await asyncio.sleep(AGAIN_S)
                continue
            if entry is None:
                continue
            is_wanted = entry.job not in self._done and (self._is_live(entry.job) or await self._is_wanted(entry))
            # It may have ended while the store was asked.
            if is_wanted and entry.job not in self._done:
                self._held[entry.job] = entry
            else:
                self._done.pop(entry.job, None)
                self._to_strike[entry.job] = entry
                self._news.set()

    async def _is_wanted(self, entry: Entry) -> bool:
        while True:
            try:
                is_open = await self._is_open(entry.job)
                return await self._unknown(entry) if is_open is None else is_open
            except StoreUnavailable as exc:
                log.warning("the store cannot be asked about a job", extra={"job_id": entry.job, "why": str(exc)})
                await asyncio.sleep(AGAIN_S)

    async def _extend(self) -> NoReturn:
        while True:
            await asyncio.sleep(EXTEND_S)
            for entry in list(self._held.values()):
                if not self._is_live(entry.job) and not await self._is_wanted(entry):
                    # Ended by another process that uses the store, of which nobody is told.
                    if self._held.pop(entry.job, None) is not None:
                        self._to_strike[entry.job] = entry
                        self._news.set()
                    continue
                try:
                    await self._ledger.extend(entry)
                except StoreUnavailable:
                    break  # all of them come again when the broker is back

    async def _strike(self) -> NoReturn:
        while True:
            await self._news.wait()
            # Whoever waits for the picture is answered first.
            await asyncio.sleep(STRIKE_S)
            self._news.clear()
            while self._to_strike:
                job, entry = next(iter(self._to_strike.items()))
                self._striking = entry
                try:
                    await self._ledger.strike(entry)
                except StoreUnavailable as exc:
                    # It will come again, and be struck then.
                    log.info("an ended job could not be struck from the ledger yet", extra={"why": str(exc)})
                    self._remember(job)
                self._striking = None
                if self._to_strike.get(job) is entry:
                    del self._to_strike[job]
