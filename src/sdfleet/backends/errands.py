"""Jobs that another program or a service draws: waited for by one task each, stopped from outside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from sdfleet.domain import JobId
from sdfleet.errors import BadRequest, EngineDied, SdfleetError

T = TypeVar("T")


class Errands:
    """The jobs of one backend that have not ended. Belongs to one event loop. name: of the backend."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stops: dict[JobId, asyncio.Future[SdfleetError]] = {}
        self.is_closed = False

    def __len__(self) -> int:
        return len(self._stops)

    def check_is_open(self) -> None:
        """Raise EngineDied after `close`."""
        if self.is_closed:
            raise EngineDied(f"the backend {self._name} is closed")

    async def run(self, job_id: JobId, work: Coroutine[Any, Any, T]) -> T:
        """What the work comes to, or raise what it is stopped with. When this returns nothing of it runs any more."""
        try:
            self.check_is_open()
            if job_id in self._stops:
                raise BadRequest(f"job {job_id} is being drawn already")
        except SdfleetError:
            work.close()
            raise
        stop = self._stops[job_id] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise stop.result()
        finally:
            del self._stops[job_id]
            await ended(task)

    def stop(self, job_id: JobId, error: SdfleetError) -> None:
        """Let the job's `run` raise this; unknown ids are ignored."""
        stop = self._stops.get(job_id)
        if stop is not None and not stop.done():
            stop.set_result(error)

    def close(self) -> None:
        """Stop what runs, and take nothing more."""
        self.is_closed = True
        for job_id in list(self._stops):
            self.stop(job_id, EngineDied("the backend was closed before the job was done"))


async def ended(task: asyncio.Task[Any]) -> None:
    """Have a task end, whatever it ends with."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
