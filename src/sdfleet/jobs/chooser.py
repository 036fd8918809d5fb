"""Which waiting job begins now: the seam between the line and what draws.

One machine draws jobs of one model together and is full after so many pictures. A fleet asks where each job would be
done first, and begins only what a device has room for at this moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sdfleet.domain import SERVICES
from sdfleet.jobs.board import Board
from sdfleet.jobs.queue import FairQueue, Waiting


class Chooser(Protocol):
    """Asked again and again by the desk, until it gives None; then after everything that may change its answer."""

    def next(self, queue: FairQueue, *, now_s: float) -> Waiting | None:
        """The job to begin now, taken out of the line; None: nothing begins as things stand."""

    def on_change(self, wake: Callable[[], None]) -> None:
        """Call `wake` whenever the answer may be another for reasons that the desk does not see."""


class OneDevice:
    """The rule for this machine's own backend, and for services, which do not share its room.

    max_pictures: given to it at once, counted and not jobs.
    """

    def __init__(self, board: Board, *, max_pictures: int) -> None:
        self._board = board
        self._max_pictures = max_pictures

    def next(self, queue: FairQueue, *, now_s: float) -> Waiting | None:
        """While the device has room, and finished pictures do not pile up before the disk."""
        board, most = self._board, self._max_pictures
        is_behind = board.n_storing > 2 * most
        room = 0 if is_behind else most - board.device.n_pictures
        if not is_behind and (found := queue.next_for_service(now_s=now_s, room=self._has_room)) is not None:
            return found
        return queue.next(now_s=now_s, room=room, n_running=board.device.n_pictures + is_behind)

    def _has_room(self, waiting: Waiting) -> bool:
        n_there = sum(each.n_pictures for each in self._board.running.values() if each.service == waiting.service)
        return not n_there or n_there + waiting.n_pictures <= SERVICES[waiting.service]

    def on_change(self, wake: Callable[[], None]) -> None:
        """Nothing: the desk sees all that happens to this device."""
