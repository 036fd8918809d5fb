"""One view of everything for all who look at it live: made once, however many look, and only while somebody does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What changes faster than this, a person does not read.
PERIOD_S = 1.0
# Making one may take a fortieth of the time and no more: with many jobs in the store they come less often.
REST = 39.0
MAX_PERIOD_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """number: counts up with each. text: it as JSON."""

    number: int
    text: str


class Snapshots:
    """The newest snapshot for whoever has not seen it yet.

    The reader who comes first makes it, the others wait for that one: there is no task that must be stopped.
    clock: seconds, of any beginning.
    """

    def __init__(self, *, period_s: float = PERIOD_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._period_s = period_s
        self._clock = clock
        self._lock = asyncio.Lock()
        self._closing = asyncio.Event()
        self._newest: Snapshot | None = None
        self._due_s = 0.0

    def close(self) -> None:
        """Let every reader go: the server ends."""
        self._closing.set()

    async def after(self, number: int, make: Callable[[], Awaitable[Mapping[str, Any]]]) -> Snapshot | None:
        """The newest one, as soon as there is another than `number`; None when the server ends. Raises what make does.

        number: of the one that the reader has seen last, perhaps of an earlier life of the server; 0 for none.
        """
        async with self._lock:
            newest = self._newest
            if newest is not None and newest.number > number and self._clock() < self._due_s:
                return newest
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._due_s - self._clock())):
                    await self._closing.wait()
            if self._closing.is_set():
                return None
            begun_s = self._clock()
            try:
                told = await make()
                text = await asyncio.to_thread(json.dumps, told, ensure_ascii=False, separators=(",", ":"))
            finally:
                spent_s = self._clock() - begun_s
                self._due_s = begun_s + min(MAX_PERIOD_S, max(self._period_s, spent_s * (1 + REST)))
            # Milliseconds since 1970, so that numbers of an earlier life of the server are smaller.
            last = 0 if newest is None else newest.number
            self._newest = Snapshot(number=max(last + 1, round(time.time() * 1000)), text=text)
            return self._newest
