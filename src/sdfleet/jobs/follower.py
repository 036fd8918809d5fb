"""Noticing what other processes did to the store: `sdfleet jobs cancel` and `retry` write there and nowhere else.

No database we serve tells one process of another's commit, so one query for two columns is asked every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from sdfleet.domain import JobId
from sdfleet.errors import StoreUnavailable
from sdfleet.jobs.board import Board, note
from sdfleet.runtime import Runtime
from sdfleet.storage.jobs import JobStore

log = logging.getLogger(__name__)


class Follower:
    """Brings the board to what the store says."""

    def __init__(self, board: Board, *, store: JobStore, runtime: Runtime) -> None:
        self._board = board
        self._store = store
        self._runtime = runtime

    async def run(self, *, every_s: float) -> NoReturn:
        """Look for ever."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except StoreUnavailable as exc:
                log.warning("the store could not be looked at", extra={"why": str(exc)})

    async def look(self) -> None:
        """Look once. Raises StoreUnavailable."""
        known = set(self._board.lives)
        states = await self._store.open_states()
        for job_id in known - set(states):
            await self._notice_end(job_id)
        for job_id, state in states.items():
            if state == "queued" and job_id not in self._board.lives:
                await self._notice_new(job_id)

    async def _notice_end(self, job_id: JobId) -> None:
        job = await self._store.job(job_id)
        live = self._board.lives.get(job_id)
        if live is None or live.has_ended or (job is not None and not job.has_ended):
            return
        if job_id not in self._board.running:
            self._board.follow(live, job)
            note("job was ended by another process", live.job)
        elif job is None or job.state == "cancelled":
            # Its own task meets the end when the backend has let go of it.
            live.is_cancelled = True
            await self._runtime.cancel(job_id)

    async def _notice_new(self, job_id: JobId) -> None:
        job = await self._store.job(job_id)
        if job is not None and job.state == "queued" and self._board.add(job):
            note("job was queued by another process", job)
