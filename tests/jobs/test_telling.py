"""What the desk tells: one line for each change of a state, never a prompt, and the numbers for the metrics."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from sdfleet.domain import Job
from sdfleet.errors import OutOfMemory
from sdfleet.jobs.observer import Silent
from tests.jobs.desks import opened, submission, tell


class Noting(Silent):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, Any]] = []

    def on_accepted(self, job: Job) -> None:
        self.told.append(("accepted", job.state, None))

    def on_started(self, job: Job, *, wait_s: float) -> None:
        self.told.append(("started", job.state, wait_s >= 0))

    def on_finished(self, job: Job, *, draw_s: float, device_s: float, total_s: float) -> None:
        self.told.append(("finished", job.state, 0 <= device_s <= total_s and draw_s <= total_s))

    def on_failed(self, job: Job, *, code: str) -> None:
        self.told.append(("failed", job.state, code))


def test_the_observer_hears_of_every_job_once(tmp_path: Path) -> None:
    async def story() -> None:
        noting = Noting()
        async with opened(tmp_path, script=[None, OutOfMemory("no room")], desk={"observer": noting}) as place:
            for _ in range(2):
                await place.desk.wait((await place.desk.submit(submission())).id)
            job = await place.desk.submit(submission("hold"))
            await place.desk.cancel(job.id)
            await place.desk.wait(job.id)
        told = [each for each in noting.told if each[0] != "started"]
        assert told == [
            ("accepted", "queued", None),
            ("finished", "done", True),
            ("accepted", "queued", None),
            ("failed", "failed", "out_of_memory"),
            ("accepted", "queued", None),
            ("failed", "cancelled", "cancelled"),
        ]
        assert ("started", "running", True) in noting.told

    tell(story)


def test_each_change_of_state_is_one_line_with_the_job_and_without_the_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        with caplog.at_level(logging.INFO, logger="sdfleet"):
            async with opened(tmp_path) as place:
                job = await place.desk.wait((await place.desk.submit(submission("a secret wish"))).id)
        lines = [record for record in caplog.records if vars(record).get("job_id") == job.id]
        assert [line.getMessage() for line in lines] == ["job queued", "job started", "job finished", "job done"]
        assert all("secret" not in str(vars(record)) for record in caplog.records)

    tell(story)
