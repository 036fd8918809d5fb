"""Ends of jobs that somebody wants to be told. Their rows are written where jobs end, in `jobs.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from sqlalchemy import Connection, delete, func, select, update

from sdfleet.domain import JobId, Webhook
from sdfleet.storage import job_rows
from sdfleet.storage.database import Database
from sdfleet.storage.tables import deliveries, jobs

DeliveryId = NewType("DeliveryId", int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One end of one job on its way to a webhook. attempts: how often it was tried in vain."""

    id: DeliveryId
    job_id: JobId
    webhook: Webhook
    attempts: int


class WebhookStore:
    """What is still to be told, in one database. Every method raises StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def due(self, *, now_s: float, limit: int = 50) -> list[Delivery]:
        """What is to be tried by now, longest due first."""
        query = (
            select(deliveries.c.number, deliveries.c.job_id, deliveries.c.attempts, jobs.c.submission)
            .join(jobs, jobs.c.id == deliveries.c.job_id)
            .where(deliveries.c.due_s <= now_s)
            .order_by(deliveries.c.due_s, deliveries.c.number)
            .limit(limit)
        )

        def work(connection: Connection) -> list[Delivery]:
            found = [(row, job_rows.webhook_of(row.submission)) for row in connection.execute(query)]
            return [
                Delivery(id=DeliveryId(row.number), job_id=JobId(row.job_id), webhook=webhook, attempts=row.attempts)
                for row, webhook in found
                if webhook is not None
            ]

        return await self._database.read(work)

    async def next_due_s(self) -> float | None:
        """When the next is to be tried, in seconds since 1970; None if there is none."""
        return await self._database.read(lambda connection: connection.scalar(select(func.min(deliveries.c.due_s))))

    async def delivered(self, delivery_id: DeliveryId) -> None:
        """It was told: forget it."""
        done = delete(deliveries).where(deliveries.c.number == delivery_id)
        await self._database.write(lambda connection: connection.execute(done).rowcount)

    async def postpone(self, delivery_id: DeliveryId, *, due_s: float | None) -> None:
        """It was tried in vain: try again then, or never (None)."""
        change = {"attempts": deliveries.c.attempts + 1, "due_s": due_s}
        later = update(deliveries).where(deliveries.c.number == delivery_id).values(**change)
        await self._database.write(lambda connection: connection.execute(later).rowcount)
