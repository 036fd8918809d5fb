"""Stories of a whole fleet under a clock that jumps, and what they wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from sdfleet.domain import JobId
from tests.fleet import virtual_time
from tests.fleet.fleets import FleetInTest

Story = Callable[[], Coroutine[Any, Any, None]]


def play(story: Story, *, within_s: float = 3600.0) -> None:
    """Run a story; `within_s` of the clock that jumps."""

    async def main() -> None:
        async with asyncio.timeout(within_s):
            await story()

    virtual_time.run(main())


async def emptied(fleet: FleetInTest) -> None:
    """Return when the ledger and all spools are empty: nobody waits for anything."""
    async with asyncio.timeout(120):
        while fleet.broker.written or any(node.spooled for node in fleet.nodes.values()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.5)


async def begun(fleet: FleetInTest, *jobs: JobId) -> str:
    """The node that has begun the last of these jobs, when all are begun."""
    async with asyncio.timeout(60):
        while True:
            at = {job: name for name, node in fleet.nodes.items() for job in node.drawn}
            if all(job in at for job in jobs):
                return at[jobs[-1]]
            await asyncio.sleep(0.02)
