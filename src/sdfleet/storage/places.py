"""What stands with each node and model of the last day; read anew only when something was written since."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Connection, func, or_, select

from sdfleet.domain import JobState
from sdfleet.storage.database import Database
from sdfleet.storage.tables import jobs

WINDOW_S = 24 * 3600.0
# Other processes may write to the store too, and the window moves: for so long what was read is believed.
FRESH_S = 1.0


@dataclass(slots=True)
class Place:
    """Jobs of one model that are open, or ended in the last day.

    node: the machine of a fleet that drew them; empty for this one, and for jobs that no node has done.
    avg_generation_s: drawing alone, of those that were done; None where none was.
    """

    node: str
    model: str
    by_state: dict[JobState, int] = field(default_factory=dict)
    avg_generation_s: float | None = None


class Places:
    """All places. `/fleet/status` is asked every second by many, and jobs end less often than that.

    clock: seconds since 1970.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._read: tuple[Place, ...] = ()
        self._read_s = float("-inf")
        self._n_writes = -1

    async def now(self) -> tuple[Place, ...]:
        """Ordered by node and model. Raises StoreUnavailable."""
        now_s, n_writes = self._clock(), self._database.n_writes
        if n_writes != self._n_writes or not 0 <= now_s - self._read_s < FRESH_S:
            self._read = await self._database.read(lambda connection: _read(connection, since_s=now_s - WINDOW_S))
            self._read_s, self._n_writes = now_s, n_writes
        return self._read


def _read(connection: Connection, *, since_s: float) -> tuple[Place, ...]:
    is_open = jobs.c.state.in_(("queued", "running"))
    told = (jobs.c.node, jobs.c.model, jobs.c.state)
    query = select(*told, func.count().label("n"), func.avg(jobs.c.generation_s).label("average_s"))
    places: dict[tuple[str, str], Place] = {}
    for row in connection.execute(query.where(or_(is_open, jobs.c.finished_s >= since_s)).group_by(*told)):
        place = places.setdefault((row.node, row.model), Place(row.node, row.model))
        place.by_state[row.state] = row.n
        if row.state == "done":
            place.avg_generation_s = row.average_s
    return tuple(place for _, place in sorted(places.items()))
