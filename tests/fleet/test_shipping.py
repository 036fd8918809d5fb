"""A node's finished jobs on their way: tried again for as long as it takes, and never in a hurry."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sdfleet.domain import JobId
from sdfleet.fleet.shipping import N_AT_ONCE, Shipping
from sdfleet.fleet.spool import Spool, Spooled
from sdfleet.fleet.transport_memory import MemoryBroker
from tests.fleet import virtual_time

LEASE = "1." + "a" * 32
# Of a hundred seconds with a router that is silent; a loop that spins asks as often in a millisecond.
MOST_LOOKS = 1000


class _Watched(Spool):
    n_looks = 0

    def all(self) -> tuple[Spooled, ...]:
        self.n_looks += 1
        assert self.n_looks < MOST_LOOKS, "it spins"
        return super().all()


def test_more_jobs_than_are_sent_at_once_wait_without_spinning(tmp_path: Path) -> None:
    async def story() -> None:
        spool = _Watched(tmp_path)
        for number in range(N_AT_ONCE + 2):
            spool.put(JobId(f"{number:012x}"), LEASE, b"pixels")
        bus = MemoryBroker().connect("n1")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await Shipping("n1", bus=bus, spool=spool, on_change=lambda: None).run()
        await bus.close()
        assert len(spool.all()) == N_AT_ONCE + 2

    virtual_time.run(story())
