"""What the job desk promises, over a real store and the fake backend."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdfleet.backends.base import OnProgress
from sdfleet.backends.fake import FakeBackend
from sdfleet.domain import Drawing, Idempotency, ImageResult, OwnerId
from sdfleet.errors import (
    Conflict,
    DeadlineExceeded,
    EngineDied,
    InvalidValue,
    NotFound,
    OutOfMemory,
    QueueFull,
    SdfleetError,
    ShuttingDown,
    UnknownName,
)
from tests.jobs.desks import begun, opened, submission, tell


def test_a_job_is_accepted_drawn_and_stored(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission(n_images=2, seed=5))
            assert (job.state, job.request.seed, job.request.steps, job.request.width_px) == ("queued", 5, 4, 32)
            done = await place.desk.wait(job.id)
            assert (done.state, done.attempts, [output.seed for output in done.outputs]) == ("done", 1, [5, 6])
            pictures = [await place.desk.picture(output) for output in done.outputs]
            assert all(picture.startswith(b"\x89PNG") for picture in pictures)

    tell(story)


def test_what_is_impossible_is_refused_and_leaves_no_job(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            with pytest.raises(UnknownName):
                await place.desk.submit(submission(model="nobody"))
            assert (await place.store.page())[0] == []

    tell(story)


def test_the_request_of_a_job_prepares_to_the_same_drawing_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission(seed=None, width_px=64, height_px=48))
            assert None not in {job.request.seed, job.request.sampler, job.request.guidance}
            first = await place.desk._runtime.prepare(job.request, job_id=job.id)
            again = await place.desk._runtime.prepare(first.request, job_id=job.id)
            assert (again.drawing, again.request, again.warnings) == (first.drawing, job.request, first.warnings)

    tell(story)


def test_the_same_key_gives_the_same_job_also_when_it_has_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            asked = submission(idempotency=Idempotency(key="k", fingerprint="f"))
            first, second = await asyncio.gather(place.desk.submit(asked), place.desk.submit(asked))
            done = await place.desk.wait(first.id)
            third = await place.desk.submit(asked)
            assert (second.id, third.id, third.state, done.attempts) == (first.id, first.id, "done", 1)
            with pytest.raises(Conflict):
                await place.desk.submit(replace(asked, idempotency=Idempotency(key="k", fingerprint="other")))
            assert place.held.drawn == ["fox"]

    tell(story)


def test_a_full_queue_refuses_and_says_when_to_come_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_queued=2, max_pictures=1) as place:
            first = await place.desk.submit(submission("hold"))
            await begun(place, first.id)
            for _ in range(2):
                await place.desk.submit(submission("hold"))
            with pytest.raises(QueueFull) as refused:
                await place.desk.submit(submission())
            assert refused.value.retry_after_s >= 1
            place.held.gate.set()

    tell(story)


def test_pictures_and_not_jobs_are_counted_on_the_device(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=4) as place:
            jobs = [await place.desk.submit(submission(f"hold {n}", n_images=n)) for n in (3, 1, 1)]
            await begun(place, jobs[1].id)
            assert (place.desk.load().n_running, place.desk.load().n_queued) == (2, 1)
            place.held.gate.set()
            assert [(await place.desk.wait(job.id)).state for job in jobs] == ["done"] * 3

    tell(story)


def test_a_job_larger_than_the_device_is_drawn_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=2) as place:
            job = await place.desk.submit(submission(n_images=5))
            assert len((await place.desk.wait(job.id)).outputs) == 5

    tell(story)


def test_a_waiting_job_is_cancelled_at_once_and_never_drawn(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=1) as place:
            first, second = [await place.desk.submit(submission(f"hold {i}")) for i in range(2)]
            await begun(place, first.id)
            assert (await place.desk.cancel(second.id)).job.state == "cancelled"
            ended = await place.desk.wait(second.id)
            assert ended.error is not None
            assert (ended.state, ended.error["code"], ended.attempts) == ("cancelled", "cancelled", 0)
            place.held.gate.set()
            assert (await place.desk.wait(first.id)).state == "done"
            assert place.held.drawn == ["hold 0"]

    tell(story)


def test_a_running_job_is_cancelled_and_its_neighbour_goes_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            first, second = [await place.desk.submit(submission(f"hold {i}")) for i in range(2)]
            await begun(place, second.id)
            await place.desk.cancel(first.id)
            ended = await place.desk.wait(first.id)
            assert (ended.state, ended.outputs) == ("cancelled", ())
            place.held.gate.set()
            assert (await place.desk.wait(second.id)).state == "done"
            assert place.files.usage().n_files == 1

    tell(story)


def test_a_cancel_between_the_line_and_the_backend_is_not_lost(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            states = set()
            for i in range(30):
                job = await place.desk.submit(submission(f"fox {i}"))
                for _ in range(i):
                    await asyncio.sleep(0)
                status = await place.desk.cancel(job.id)
                ended = await place.desk.wait(job.id)
                states.add(ended.state)
                assert ended.state in {"done", "cancelled"}
                assert (ended.state == "done") == bool(ended.outputs)
                assert not status.job.has_ended or status.job.state == ended.state
            assert "cancelled" in states

    tell(story)


def test_a_job_of_another_owner_is_not_there(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold", owner="ann"))
            bob = OwnerId("bob")
            for ask in (place.desk.status, place.desk.cancel, place.desk.wait, place.desk.retry):
                with pytest.raises(NotFound):
                    await ask(job.id, owner=bob)
            with pytest.raises(NotFound):
                await anext(place.desk.watch(job.id, owner=bob))
            assert (await place.desk.status(job.id, owner=OwnerId("ann"))).job.id == job.id

    tell(story)


def test_a_failed_job_says_why_and_can_be_tried_again_with_the_same_seed(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, script=[OutOfMemory("no room")]) as place:
            job = await place.desk.submit(submission())
            failed = await place.desk.wait(job.id)
            assert failed.error == {"code": "out_of_memory", "message": "no room", "hint": ""}
            again = await place.desk.retry(job.id)
            done = await place.desk.wait(job.id)
            assert (again.state, done.state, done.request) == ("queued", "done", failed.request)
            with pytest.raises(Conflict):
                await place.desk.retry(job.id)

    tell(story)


def test_a_job_whose_engine_died_is_drawn_again_and_fails_in_the_end(tmp_path: Path) -> None:
    async def story() -> None:
        died = EngineDied("killed")
        async with opened(tmp_path, script=[died, None, died, died, died]) as place:
            first = await place.desk.wait((await place.desk.submit(submission())).id)
            assert (first.state, first.attempts) == ("done", 2)
            second = await place.desk.wait((await place.desk.submit(submission())).id)
            assert second.error is not None
            assert (second.state, second.attempts, second.error["code"]) == ("failed", 3, "engine_died")

    tell(story)


def test_a_fault_of_ours_fails_one_job_and_not_the_desk(tmp_path: Path) -> None:
    class Faulty(FakeBackend):
        async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
            if drawing.prompt == "fault":
                raise ZeroDivisionError
            return await super().generate(drawing, on_progress)

    async def story() -> None:
        async with opened(tmp_path, backend=lambda _: Faulty()) as place:
            bad, good = [await place.desk.submit(submission(prompt)) for prompt in ("fault", "fox")]
            failed = await place.desk.wait(bad.id)
            assert failed.error is not None
            assert (failed.state, failed.error["code"]) == ("failed", "internal_error")
            assert (await place.desk.wait(good.id)).state == "done"
            assert place.desk.fault is None

    tell(story)


def test_a_desk_that_died_says_so_to_everyone(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold"))
            waiter = asyncio.create_task(place.desk.wait(job.id))
            await begun(place, job.id)

            def fall() -> float:
                raise ZeroDivisionError

            place.desk._board.clock = fall
            place.desk._board.wake.set()
            with pytest.raises(BaseExceptionGroup):
                await place.desk.stand()
            with pytest.raises(SdfleetError, match="job desk stopped"):
                await waiter
            with pytest.raises(SdfleetError, match="job desk stopped"):
                await place.desk.submit(submission())
            assert place.desk.fault is not None
            with pytest.raises(BaseExceptionGroup):
                await place.desk.close()

    tell(story)


def test_a_deadline_that_passed_in_line_fails_the_job(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=1) as place:
            first = await place.desk.submit(submission("hold"))
            late = await place.desk.submit(submission("late", deadline_s=0.05))
            ended = await place.desk.wait(late.id)
            assert ended.error is not None
            assert (ended.state, ended.error["code"], ended.attempts) == ("failed", "deadline_exceeded", 0)
            place.held.gate.set()
            assert (await place.desk.wait(first.id)).state == "done"

    tell(story)


def test_a_deadline_that_passes_while_drawing_stops_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold", deadline_s=0.2))
            ended = await place.desk.wait(job.id)
            assert ended.error is not None
            assert (ended.state, ended.error["code"], ended.attempts) == ("failed", "deadline_exceeded", 1)
            assert place.backend.capabilities().n_running == 0

    tell(story)


def test_waiting_with_a_deadline_leaves_the_job_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold"))
            with pytest.raises(DeadlineExceeded):
                await place.desk.wait(job.id, deadline_s=0.01)
            place.held.gate.set()
            assert (await place.desk.wait(job.id)).state == "done"

    tell(story)


def test_a_submission_whose_caller_leaves_is_taken_and_put_in_line_all_the_same(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            for n_turns in range(1, 12):
                task = asyncio.create_task(place.desk.submit(submission(f"hold {n_turns}")))
                for _ in range(n_turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
            await asyncio.gather(*place.desk._accepting)
            states = await place.store.open_states()
            assert set(place.desk._board.lives) == set(states)
            assert len(states) == 11

    tell(story)


def test_closing_lets_running_jobs_end_and_keeps_the_rest_for_the_next_start(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=1, drain_s=30.0) as place:
            first, second = [await place.desk.submit(submission(f"hold {i}", seed=i)) for i in range(2)]
            await begun(place, first.id)
            waiter = asyncio.create_task(place.desk.wait(second.id))
            closing = asyncio.create_task(place.desk.close())
            await asyncio.sleep(0)
            with pytest.raises(ShuttingDown):
                await place.desk.submit(submission())
            place.held.gate.set()
            await closing
            with pytest.raises(ShuttingDown):
                await waiter
            states = [await place.store.job(job.id) for job in (first, second)]
            assert [job.state for job in states if job is not None] == ["done", "queued"]
        async with opened(tmp_path) as place:
            place.held.gate.set()
            done = await place.desk.wait(second.id)
            assert (done.state, done.attempts, done.request) == ("done", 1, second.request)

    tell(story)


def test_what_runs_past_the_limit_of_closing_is_drawn_by_the_next_start(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold"))
            await begun(place, job.id)
        async with opened(tmp_path) as place:
            place.held.gate.set()
            done = await place.desk.wait(job.id)
            assert (done.state, done.attempts) == ("done", 2)

    tell(story)


def test_jobs_in_line_have_places_and_times_once_one_was_measured(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=1) as place:
            first = await place.desk.submit(submission("hold"))
            await begun(place, first.id)
            second, third = [await place.desk.submit(submission("hold")) for _ in range(2)]
            places = [await place.desk.status(job.id) for job in (first, second, third)]
            assert [(each.queue_position, each.eta_s) for each in places] == [(None, None), (1, None), (2, None)]
            place.desk._board.forecasts.learn(first, device_s=8.0)
            await asyncio.sleep(0.3)
            places = [await place.desk.status(job.id) for job in (second, third)]
            assert [(each.queue_position, each.eta_s) for each in places] == [(1, 16.0), (2, 24.0)]
            assert place.desk.load().wait_s == 24.0
            place.held.gate.set()

    tell(story)


def test_estimates_survive_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            await place.desk.wait((await place.desk.submit(submission())).id)
        async with opened(tmp_path, max_pictures=1) as place:
            first = await place.desk.submit(submission("hold"))
            await begun(place, first.id)
            second = await place.desk.submit(submission())
            assert (await place.desk.status(second.id)).eta_s is not None
            place.held.gate.set()

    tell(story)


@pytest.mark.parametrize(
    "asked", [{"priority": 101}, {"priority": -101}, {"deadline_s": 0.0}, {"deadline_s": float("nan")}]
)
def test_a_priority_or_deadline_without_sense_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            with pytest.raises(InvalidValue):
                await place.desk.submit(submission(**asked))

    tell(story)
