"""Which checkpoints are on the device, who wants them to stay, and when an idle one leaves.

    used by a job   stays
    pinned          stays until somebody unpins or unloads it; no other checkpoint pushes it out
    idle            leaves after its keep-alive, or earlier where another one needs the room

Nothing of this is written down: after a restart of the server nothing is loaded, pinned or waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from sdfleet.backends.base import Backend
from sdfleet.domain import Drawing
from sdfleet.errors import InUse, SdfleetError, in_use

log = logging.getLogger(__name__)

# A keep-alive longer than a year is for ever; no event loop has timers for any number of seconds.
_FOR_EVER_S = 365 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A checkpoint on the device. expires_s: seconds since 1970 when it leaves if nobody uses it; None: never.

    n_jobs: jobs that draw with it now. n_bytes: of its weights; 0 where the backend does not tell.
    """

    checkpoint: str
    n_bytes: int
    n_jobs: int
    is_pinned: bool
    expires_s: float | None


@dataclass(slots=True, eq=False)
class _Stay:
    """One checkpoint that was asked for. idle_since_s: by the loop's clock; keep_alive_s: None is for ever."""

    keep_alive_s: float | None
    n_jobs: int = 0
    timer: asyncio.TimerHandle | None = None
    expires_s: float | None = None

    def disarm(self) -> None:
        """Nothing happens to it any more by itself."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.expires_s = None


class Residents:
    """Loads, unloads and pins checkpoints of one backend, and lets idle ones go. Belongs to one event loop.

    keep_alive_s: how long a checkpoint stays after its last job: 0 lets it go at once, None never.
    clock: seconds since 1970, for what is told.
    """

    def __init__(
        self, backend: Backend, *, keep_alive_s: float | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._backend = backend
        self._keep_alive_s = keep_alive_s
        self._clock = clock
        self._stays: dict[str, _Stay] = {}
        self._wishes: dict[str, float | None] = {}
        self._states: dict[str, Hashable] = {}
        self._pinned: dict[str, None] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def here(self) -> tuple[Resident, ...]:
        """What is on the device now, as the backend says."""
        facts = self._backend.capabilities().facts
        n_bytes = cast("Mapping[str, int]", facts.get("bytes_by_checkpoint", {}))
        found = []
        for checkpoint in cast("list[str]", facts.get("checkpoints", [])):
            stay = self._stays.get(checkpoint)
            found.append(
                Resident(
                    checkpoint=checkpoint,
                    n_bytes=n_bytes.get(checkpoint, 0),
                    n_jobs=0 if stay is None else stay.n_jobs,
                    is_pinned=checkpoint in self._pinned,
                    expires_s=None if stay is None else stay.expires_s,
                )
            )
        return tuple(found)

    @contextlib.contextmanager
    def used(self, checkpoint: str) -> Iterator[None]:
        """While inside, a job draws with this checkpoint."""
        stay = self._stays.setdefault(checkpoint, _Stay(self._keep_alive_s))
        if checkpoint in self._wishes:
            stay.keep_alive_s = self._wishes.pop(checkpoint)
        stay.disarm()
        stay.n_jobs += 1
        try:
            yield
        finally:
            stay.n_jobs -= 1
            self._arm(checkpoint, stay)

    async def renew(self, checkpoint: str, state: Hashable) -> None:
        """Let go what was loaded of other files than lie there now, after a download or an import under the same name.

        state: of the files, for a job that is about to use them. While jobs draw with the old ones, these stay.
        """
        stay = self._stays.get(checkpoint)
        if stay is not None and stay.n_jobs:
            return
        is_other = self._states.get(checkpoint, state) != state
        self._states[checkpoint] = state
        if is_other:
            log.info("a checkpoint's files have changed and are read again", extra={"checkpoint": checkpoint})
            with contextlib.suppress(InUse):  # another job was faster, with the new files
                await self._backend.unload(checkpoint)

    def keep(self, checkpoint: str, keep_alive_s: float | None, *, after_next_job: bool = False) -> None:
        """Until it leaves, this is the checkpoint's keep-alive: from now on, or from the next job on that uses it."""
        if after_next_job:
            # Not yet: a time of 0 would let it go under a job that is on its way.
            self._wishes[checkpoint] = keep_alive_s
            return
        stay = self._stays.setdefault(checkpoint, _Stay(keep_alive_s))
        stay.keep_alive_s = keep_alive_s
        self._arm(checkpoint, stay)

    async def load(self, drawing: Drawing) -> None:
        """Have the drawing's checkpoint on the device. Raises what drawing it would have met."""
        with self.used(drawing.checkpoint):
            await self._backend.load(drawing)

    async def unload(self, checkpoint: str, *, name: str) -> None:
        """Return when it is off the device; a pin ends with it. Raises InUse, by `name`, while a job draws with it."""
        stay = self._stays.get(checkpoint)
        if stay is not None and stay.n_jobs:
            raise in_use(name, stay.n_jobs)
        await self.unpin(checkpoint)
        self._forget(checkpoint)
        await self._backend.unload(checkpoint)

    async def pin(self, drawing: Drawing) -> None:
        """Load the drawing's checkpoint and let it stay. Raises OutOfMemory, with numbers, where too much is pinned."""
        await self.load(drawing)
        self._pinned[drawing.checkpoint] = None
        self._stays[drawing.checkpoint].disarm()
        await self._backend.pin(tuple(self._pinned))

    async def unpin(self, checkpoint: str) -> None:
        """Let it leave again, by its keep-alive or for another. What is not pinned is left as it is."""
        if checkpoint in self._pinned:
            del self._pinned[checkpoint]
            await self._backend.pin(tuple(self._pinned))
            if checkpoint in self._stays:
                self._arm(checkpoint, self._stays[checkpoint])

    async def close(self) -> None:
        """No checkpoint leaves by itself any more."""
        self._is_closed = True
        for stay in self._stays.values():
            stay.disarm()
        for task in self._leaving:
            task.cancel()
        if self._leaving:
            await asyncio.wait(self._leaving)

    def _arm(self, checkpoint: str, stay: _Stay) -> None:
        stay.disarm()
        keep_alive_s = stay.keep_alive_s
        if stay.n_jobs or checkpoint in self._pinned or self._is_closed:
            return
        if keep_alive_s is not None and keep_alive_s < _FOR_EVER_S:
            stay.expires_s = self._clock() + keep_alive_s
            stay.timer = asyncio.get_running_loop().call_later(keep_alive_s, self._expire, checkpoint, stay)

    def _expire(self, checkpoint: str, stay: _Stay) -> None:
        stay.disarm()
        task = asyncio.create_task(self._leave(checkpoint, stay), name=f"unload {checkpoint}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, checkpoint: str, stay: _Stay) -> None:
        if stay.n_jobs or checkpoint in self._pinned:
            return
        self._forget(checkpoint)
        try:
            await self._backend.unload(checkpoint)
        except InUse:
            pass  # a job was faster
        except SdfleetError as exc:
            log.warning("an idle checkpoint could not be unloaded", extra={"checkpoint": checkpoint, "why": str(exc)})

    def _forget(self, checkpoint: str) -> None:
        stay = self._stays.pop(checkpoint, None)
        if stay is not None:
            stay.disarm()
