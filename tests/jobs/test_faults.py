"""A store and a disk that fail now and then, and other processes that write to the same store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sdfleet.domain import ImageResult, Job, JobId, Output, PictureFormat, Submission
from sdfleet.errors import OutputNotWritable, StoreUnavailable
from sdfleet.jobs.follower import Follower
from sdfleet.storage.database import Database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles
from tests.jobs.desks import Place, begun, opened, submission, tell

CANCELLED = {"code": "cancelled", "message": "by another process", "hint": ""}


class Shaky(JobStore):
    """A real store whose calls fail so many times, before they are done or (lost_answers) after."""

    def __init__(self, database: Database, *, fails: dict[str, int], lost_answers: bool = False) -> None:
        super().__init__(database)
        self._fails = fails
        self._after = lost_answers

    def _is_failing(self, name: str) -> bool:
        left = self._fails.get(name, 0)
        self._fails[name] = left - 1
        return left > 0

    def _fail(self, name: str) -> None:
        if self._is_failing(name):
            raise StoreUnavailable("locked")

    async def accept(self, submission: Submission, **more: Any) -> tuple[Job, bool]:
        self._fail("accept")
        return await super().accept(submission, **more)

    async def begin(self, job_id: JobId) -> Job | None:
        if not self._after:
            self._fail("begin")
        job = await super().begin(job_id)
        if self._after:
            self._fail("begin")
        return job

    async def finish(self, done: Job) -> bool:
        if not self._after:
            self._fail("finish")
        is_done = await super().finish(done)
        if self._after:
            self._fail("finish")
        return is_done

    async def fail(self, job_id: JobId, error: Mapping[str, str]) -> bool:
        self._fail("fail")
        return await super().fail(job_id, error)

    async def cancel(self, job_id: JobId, error: Mapping[str, str]) -> bool:
        self._fail("cancel")
        return await super().cancel(job_id, error)


def shaky(*, lost_answers: bool = False, **fails: int) -> Callable[[Database], JobStore]:
    return lambda database: Shaky(database, fails=fails, lost_answers=lost_answers)


@pytest.mark.parametrize("lost_answers", [False, True])
def test_a_store_that_fails_while_a_job_runs_loses_nothing(tmp_path: Path, *, lost_answers: bool) -> None:
    async def story() -> None:
        store = shaky(begin=2, finish=3, lost_answers=lost_answers)
        async with opened(tmp_path, store=store) as place:
            done = await place.desk.wait((await place.desk.submit(submission())).id)
            assert (done.state, done.attempts, len(done.outputs)) == ("done", 1, 1)
            assert await place.desk.picture(done.outputs[0])

    tell(story)


def test_a_store_that_fails_at_acceptance_is_told_to_the_submitter(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, store=shaky(accept=1)) as place:
            with pytest.raises(StoreUnavailable):
                await place.desk.submit(submission())
            assert (await place.desk.wait((await place.desk.submit(submission())).id)).state == "done"

    tell(story)


def test_a_cancel_that_could_not_be_written_leaves_the_job_in_line(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, store=shaky(cancel=1), max_pictures=1) as place:
            first, second = [await place.desk.submit(submission(f"hold {i}")) for i in range(2)]
            await begun(place, first.id)
            with pytest.raises(StoreUnavailable):
                await place.desk.cancel(second.id)
            place.held.gate.set()
            assert (await place.desk.wait(second.id)).state == "done"

    tell(story)


class FullDisk(OutputFiles):
    """Cannot write so many times."""

    n_faults = 0

    def write(
        self,
        job: Job,
        result: ImageResult,
        *,
        format: PictureFormat | None = None,
        quality: int | None = None,
        sampler_label: str | None = None,
    ) -> list[Output]:
        if self.n_faults > 0:
            self.n_faults -= 1
            raise OutputNotWritable("the disk is full")
        return super().write(job, result, format=format, quality=quality, sampler_label=sampler_label)


def _with_disk(place: Place, n_faults: int) -> None:
    files = FullDisk(place.files.folder)
    files.n_faults = n_faults
    place.desk._drawer._files = files


def test_a_finished_picture_waits_for_room_on_the_disk(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            _with_disk(place, 2)
            done = await place.desk.wait((await place.desk.submit(submission())).id)
            assert (done.state, done.attempts) == ("done", 1)

    tell(story)


def test_a_disk_that_stays_full_fails_the_job_with_the_reason(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, output_patience_s=0.0) as place:
            _with_disk(place, 100)
            failed = await place.desk.wait((await place.desk.submit(submission())).id)
            assert failed.error is not None
            assert (failed.state, failed.error["code"]) == ("failed", "output_not_writable")

    tell(story)


def _follower(place: Place) -> Follower:
    return Follower(place.desk._board, store=place.store, runtime=place.desk._runtime)


def test_what_another_process_cancels_in_line_is_never_drawn(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=1) as place:
            first, second = [await place.desk.submit(submission(f"hold {i}")) for i in range(2)]
            await begun(place, first.id)
            waiter = asyncio.create_task(place.desk.wait(second.id))
            await asyncio.sleep(0)
            await place.store.cancel(second.id, CANCELLED)
            await _follower(place).look()
            assert (await waiter).state == "cancelled"
            place.held.gate.set()
            assert (await place.desk.wait(first.id)).state == "done"
            assert place.held.drawn == ["hold 0"]

    tell(story)


def test_what_another_process_cancels_while_it_is_drawn_stops(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold"))
            await begun(place, job.id)
            await place.store.cancel(job.id, CANCELLED)
            await _follower(place).look()
            assert (await place.desk.wait(job.id)).error == CANCELLED
            assert place.backend.capabilities().n_running == 0

    tell(story)


def test_a_picture_that_was_finished_after_a_cancel_elsewhere_is_removed(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold"))
            await begun(place, job.id)
            await place.store.cancel(job.id, CANCELLED)
            place.held.gate.set()
            ended = await place.desk.wait(job.id)
            assert (ended.state, ended.outputs, place.files.usage().n_files) == ("cancelled", (), 0)

    tell(story)


def test_what_another_process_tries_again_is_drawn(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=1) as place:
            first, second = [await place.desk.submit(submission(f"hold {i}")) for i in range(2)]
            await begun(place, first.id)
            await place.desk.cancel(second.id)
            await place.store.requeue(second.id)
            await _follower(place).look()
            place.held.gate.set()
            assert (await place.desk.wait(second.id)).state == "done"

    tell(story)


def test_looking_at_the_store_goes_on_by_itself(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, sync_s=0.01) as place:
            job = await place.desk.submit(submission("hold"))
            await begun(place, job.id)
            await place.store.cancel(job.id, CANCELLED)
            assert (await place.desk.wait(job.id)).state == "cancelled"

    tell(story)
