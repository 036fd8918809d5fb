"""Notices an engine whose step never returns: it has jobs, and says nothing for longer than is believable.

Believable depends on the machine, so it is measured: many times the longest silence between two of its reports. Before
a job's first progress everything may happen (a checkpoint of 24 GB is read from a slow disk, converted, compiled), and
one thread does it all, so that other jobs are silent meanwhile too. An engine without jobs may be silent for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an engine with jobs may be silent, seconds.

    first_s: while a job has not shown its first progress. least_s, gaps: afterwards; at least `least_s`, and `gaps`
    times the longest silence between two reports so far. late_s: an alarm that comes later than this was slept through
    by this process too (a suspended laptop, a stopped server), and says nothing about the engine.

    >>> patience = Patience()
    >>> [patience.allowed_s(all_begun=begun, longest_gap_s=2.0) for begun in (False, True)]
    [3600.0, 900.0]
    >>> patience.allowed_s(all_begun=True, longest_gap_s=40.0)
    2000.0
    """

    first_s: float = 3600.0
    least_s: float = 900.0
    gaps: float = 50.0
    late_s: float = 30.0

    def allowed_s(self, *, all_begun: bool, longest_gap_s: float) -> float:
        """Seconds from one sign of life to the next."""
        if not all_begun:
            return max(self.first_s, self.gaps * longest_gap_s)
        return max(self.least_s, self.gaps * longest_gap_s)


class Clock(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float:
        """Seconds since some moment."""
        ...

    def call_at(self, when: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """Call once, when `time` has come to `when`; the handle can cancel it."""
        ...


class Watchdog:
    """Watches one life of an engine's process. on_hang: called once, with the seconds of silence."""

    def __init__(self, patience: Patience, on_hang: Callable[[float], None], *, clock: Clock | None = None) -> None:
        self._patience = patience
        self._on_hang = on_hang
        self._clock: Clock = asyncio.get_running_loop() if clock is None else clock
        self._alarm: asyncio.TimerHandle | None = None
        self._last_s = 0.0
        self._due_s = 0.0
        self._all_begun = False
        self._longest_gap_s = 0.0

    def note(self, *, is_report: bool, has_jobs: bool, all_begun: bool) -> None:
        """The engine was heard of (is_report), or was given something, which is no sign of life.

        has_jobs: whether the engine has any. all_begun: whether each of them has shown progress.
        """
        now_s = self._clock.time()
        if self._alarm is None:
            self._last_s = now_s
        elif is_report:
            if self._all_begun:
                self._longest_gap_s = max(self._longest_gap_s, now_s - self._last_s)
            self._last_s = now_s
        self._all_begun = all_begun
        self.stop()
        if has_jobs:
            self._arm()

    def stop(self) -> None:
        """Watch no longer, until the next note."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _arm(self) -> None:
        allowed_s = self._patience.allowed_s(all_begun=self._all_begun, longest_gap_s=self._longest_gap_s)
        self._due_s = self._last_s + allowed_s
        self._alarm = self._clock.call_at(self._due_s, self._expire)

    def _expire(self) -> None:
        now_s = self._clock.time()
        if now_s - self._due_s > self._patience.late_s:
            self._last_s = now_s
            self._arm()
            return
        self._alarm = None
        self._on_hang(now_s - self._last_s)
