"""What is thrown away, and when: nothing, unless the settings name a number of days."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from sdfleet.domain import Output
from sdfleet.errors import InvalidValue, OutputNotWritable, StoreUnavailable
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles

log = logging.getLogger(__name__)

DAY_S = 86_400.0
EVERY_S = 3600.0
# Rows and files of one turn; other work goes on between two.
AT_ONCE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Days to keep finished pictures and the jobs they came from; None keeps for ever."""

    outputs_days: float | None = None
    jobs_days: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was removed."""

    n_jobs: int = 0
    n_outputs: int = 0
    n_bytes: int = 0


class Retention:
    """Removes what is older than `keep` says, at the start and then hourly. Only files that the store knows as ours."""

    def __init__(
        self,
        *,
        store: JobStore,
        files: OutputFiles,
        keep: Keep,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._files = files
        self._keep = keep
        self._every_s = every_s
        self._clock = clock

    async def run(self) -> NoReturn:
        """Prune for ever. A fault of the store or the disk is told and tried again at the next turn."""
        while True:
            try:
                await self.prune()
            except StoreUnavailable as exc:
                log.warning("old outputs could not be pruned", extra={"why": str(exc)})
            await asyncio.sleep(self._every_s)

    async def prune(self) -> Pruned:
        """Remove what is old now; files first, so that no row is gone while its file is not."""
        keep, now_s = self._keep, self._clock()
        pruned = Pruned()
        if keep.outputs_days is None and keep.jobs_days is None:
            usage = await asyncio.to_thread(self._files.usage)
            log.info("outputs are kept for ever", extra={"n_files": usage.n_files, "n_bytes": usage.n_bytes})
            return pruned
        while True:
            expired = await self._store.expired(
                jobs_before_s=None if keep.jobs_days is None else now_s - keep.jobs_days * DAY_S,
                outputs_before_s=None if keep.outputs_days is None else now_s - keep.outputs_days * DAY_S,
                limit=AT_ONCE,
            )
            gone = [output for output in expired.outputs if await asyncio.to_thread(self._delete, output)]
            if not expired.job_ids and not gone:
                break
            await self._store.forget_outputs([output.id for output in gone])
            await self._store.forget_jobs(expired.job_ids)
            pruned = Pruned(
                n_jobs=pruned.n_jobs + len(expired.job_ids),
                n_outputs=pruned.n_outputs + len(gone),
                n_bytes=pruned.n_bytes + sum(output.n_bytes for output in gone),
            )
        if pruned != Pruned():
            facts = {"n_jobs": pruned.n_jobs, "n_outputs": pruned.n_outputs, "n_bytes": pruned.n_bytes}
            log.info("old outputs were pruned", extra=facts)
        return pruned

    def _delete(self, output: Output) -> bool:
        """Whether the file is gone; one that cannot be deleted keeps its row and is told."""
        try:
            self._files.delete(output)
        except (OutputNotWritable, InvalidValue) as exc:
            log.warning("an old output could not be deleted", extra={"output_id": output.id, "why": str(exc)})
            return False
        return True
