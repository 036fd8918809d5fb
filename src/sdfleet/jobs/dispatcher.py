"""Whose turn it is: what waits leaves the line for the drawer, in the chooser's order, or for being too late."""

from __future__ import annotations

import asyncio
import contextlib
from typing import NoReturn

from sdfleet.errors import DeadlineExceeded
from sdfleet.jobs.board import Board
from sdfleet.jobs.chooser import Chooser
from sdfleet.jobs.drawer import Drawer
from sdfleet.jobs.live import Live

# Jobs in line hear of their new place this often at most.
TELL_EVERY_S = 0.5


class Dispatcher:
    """The desk's two endless tasks. chooser: who begins when. drawer: does the work, and writes down who was late."""

    def __init__(self, board: Board, *, chooser: Chooser, drawer: Drawer) -> None:
        self._board = board
        self._chooser = chooser
        self._drawer = drawer

    async def run(self, tasks: asyncio.TaskGroup) -> NoReturn:
        """Begin jobs as tasks of `tasks`, until cancelled."""
        board = self._board
        while True:
            board.wake.clear()
            now_s = board.clock()
            for late in board.queue.late(now_s):
                tasks.create_task(self._expire(board.lives[late.job_id]))
            while board.is_open and (waiting := self._chooser.next(board.queue, now_s=now_s)) is not None:
                tasks.create_task(self._drawer.work(board.begin(waiting), board.lives[waiting.job_id]))
            deadline_s = board.queue.first_deadline_s()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if deadline_s is None else max(0.0, deadline_s - board.clock())):
                    await board.wake.wait()

    async def tell_places(self) -> NoReturn:
        """Let those who watch a waiting job hear of its place when the line has moved, until cancelled."""
        while True:
            await self._board.line_moved.wait()
            self._board.line_moved.clear()
            for live in self._board.lives.values():
                if live.is_watched and live.job.state == "queued":
                    live.touch()
            await asyncio.sleep(TELL_EVERY_S)

    async def _expire(self, live: Live) -> None:
        error = DeadlineExceeded(f"job {live.job.id} was not begun in the time it had", hint="the queue is long")
        await self._drawer.fail(live, error)
