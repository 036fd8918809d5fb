"""What retention removes, and what it leaves alone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from sdfleet.domain import Job
from sdfleet.jobs.retention import DAY_S, Keep, Pruned, Retention
from tests.jobs.desks import Place, opened, submission, tell


def retention(place: Place, *, days_later: float, **keep: Any) -> Retention:
    later_s = time.time() + days_later * DAY_S
    return Retention(store=place.store, files=place.files, keep=Keep(**keep), clock=lambda: later_s)


async def done_job(place: Place) -> Job:
    return await place.desk.wait((await place.desk.submit(submission(n_images=2))).id)


def test_by_default_everything_is_kept(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await done_job(place)
            assert await retention(place, days_later=10_000).prune() == Pruned()
            assert await place.desk.picture(job.outputs[0])

    tell(story)


def test_old_outputs_go_and_the_job_stays(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await done_job(place)
            assert await retention(place, days_later=6.9, outputs_days=7).prune() == Pruned()
            pruned = await retention(place, days_later=7.1, outputs_days=7).prune()
            n_bytes = sum(output.n_bytes for output in job.outputs)
            assert pruned == Pruned(n_outputs=2, n_bytes=n_bytes)
            kept = await place.store.job(job.id)
            assert kept is not None
            assert (kept.state, kept.outputs, place.files.usage().n_files) == ("done", (), 0)

    tell(story)


def test_old_jobs_go_and_open_ones_stay(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            old = await done_job(place)
            still_running = await place.desk.submit(submission("hold"))
            pruned = await retention(place, days_later=31, jobs_days=30, outputs_days=30).prune()
            assert (pruned.n_jobs, pruned.n_outputs) == (1, 2)
            assert await place.store.job(old.id) is None
            assert await place.store.job(still_running.id) is not None

    tell(story)


def test_files_that_are_not_ours_are_never_touched(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await done_job(place)
            folder = place.files.path(job.outputs[0]).parent
            strangers = [folder / "mine.png", folder / f"{job.id}-9.png", place.files.folder / "notes.txt"]
            for stranger in strangers:
                stranger.write_bytes(b"mine")
            await retention(place, days_later=100, jobs_days=1, outputs_days=1).prune()
            assert [stranger.read_bytes() for stranger in strangers] == [b"mine"] * 3

    tell(story)


def test_a_file_somebody_removed_does_not_stop_pruning(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            first, second = await done_job(place), await done_job(place)
            place.files.path(first.outputs[0]).unlink()
            pruned = await retention(place, days_later=2, outputs_days=1).prune()
            assert (pruned.n_outputs, place.files.usage().n_files) == (4, 0)
            assert second.outputs

    tell(story)


def test_a_file_that_cannot_be_deleted_keeps_its_row_and_stops_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            stuck, other = await done_job(place), await done_job(place)
            file = place.files.path(stuck.outputs[0])
            file.unlink()
            file.mkdir()
            pruned = await retention(place, days_later=2, outputs_days=1).prune()
            kept, _ = await place.store.outputs()
            assert (pruned.n_outputs, [output.id for output in kept]) == (3, [stuck.outputs[0].id])
            assert other.outputs

    tell(story)


def test_pruning_runs_at_the_start_of_the_desk(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            await done_job(place)
        async with opened(tmp_path, start=False) as place:
            place.desk._retention = retention(place, days_later=2, outputs_days=1)
            await place.desk.start()
            while place.files.usage().n_files:  # noqa: ASYNC110 - a folder cannot be waited for
                await asyncio.sleep(0.01)

    tell(story)
