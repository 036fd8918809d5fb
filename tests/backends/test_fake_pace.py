"""Made-up pictures that take their time, to see how those who wait for them behave."""

from __future__ import annotations

import asyncio

import pytest

from sdfleet.backends.fake import FakeBackend
from sdfleet.errors import JobCancelled
from tests.backends.drawings import drawing
from tests.fleet import virtual_time


def test_a_step_takes_its_seconds_and_the_result_tells_them() -> None:
    async def main() -> None:
        backend, loop = FakeBackend(step_s=5.0), asyncio.get_running_loop()
        begun_s = loop.time()
        result = await backend.generate(drawing(steps=4))
        assert loop.time() - begun_s == pytest.approx(20.0)
        assert result.timings_s["total"] == pytest.approx(20.0)

    virtual_time.run(main())


def test_a_cancelled_job_does_not_wait_for_its_step() -> None:
    async def main() -> None:
        backend, loop = FakeBackend(step_s=100.0), asyncio.get_running_loop()
        one = drawing(steps=4)
        begun_s = loop.time()
        drawn = asyncio.ensure_future(backend.generate(one))
        await asyncio.sleep(1.0)
        await backend.cancel(one.job_id)
        with pytest.raises(JobCancelled):
            await drawn
        assert loop.time() - begun_s == pytest.approx(1.0)

    virtual_time.run(main())
