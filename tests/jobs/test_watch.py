"""Watching a job: places, steps, previews and the end, for fast readers and slow ones."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from sdfleet.backends.fake import FakeBackend
from sdfleet.domain import Drawing, JobEvent, JobId
from tests.jobs.desks import Held, Place, begun, opened, submission, tell


async def seen(place: Place, job_id: JobId, *, after: int = 0, previews: bool = False) -> list[JobEvent]:
    return [event async for event in place.desk.watch(job_id, after=after, previews=previews)]


def test_a_watcher_hears_of_the_line_the_steps_and_the_end(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=1) as place:
            first, second = [await place.desk.submit(submission(f"hold {i}")) for i in range(2)]
            await begun(place, first.id)
            watching = asyncio.create_task(seen(place, second.id))
            await asyncio.sleep(0)
            place.held.gate.set()
            events = await watching
            states = [event.status.job.state for event in events]
            assert (states[0], events[0].status.queue_position, states[-1]) == ("queued", 1, "done")
            assert "running" in states
            assert [event.number for event in events] == sorted({event.number for event in events})
            steps = [event.progress.step for event in events if event.progress is not None]
            assert steps == sorted(steps)
            assert (events[-1].status.step, events[-1].status.n_steps) == (4, 4)
            assert len(events[-1].status.job.outputs) == 1

    tell(story)


def test_any_number_of_watchers_see_the_end(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold"))
            watching = [asyncio.create_task(seen(place, job.id)) for _ in range(200)]
            await begun(place, job.id)
            place.held.gate.set()
            for events in await asyncio.gather(*watching):
                assert events[-1].status.job.state == "done"

    tell(story)


def test_a_slow_reader_gets_the_newest_step_of_each_picture_and_no_backlog(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold", steps=500, n_images=3))
            async with contextlib.aclosing(place.desk.watch(job.id)) as events:
                await anext(events)
                await begun(place, job.id)
                place.held.gate.set()
                await place.desk.wait(job.id)
                left = [event async for event in events]
            assert len(left) <= 4
            steps = {event.progress.image_index: event.progress.step for event in left if event.progress is not None}
            assert steps == {0: 500, 1: 500, 2: 500}
            assert left[-1].status.job.state == "done"

    tell(story)


def test_steps_count_over_all_pictures(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission(n_images=3, steps=5))
            events = await seen(place, job.id)
            assert {event.status.n_steps for event in events} == {15}
            assert events[-1].status.step == 15

    tell(story)


def test_previews_are_computed_only_while_somebody_asks_for_them(tmp_path: Path) -> None:
    async def story() -> None:
        asked: list[bool] = []

        class Noting(FakeBackend):
            async def watch(self, job_id: JobId, *, previews: bool) -> None:
                asked.append(previews)
                await super().watch(job_id, previews=previews)

        drawn: list[bool] = []

        def backend(held: Held) -> FakeBackend:
            async def before_step(drawing: Drawing, step: int) -> None:
                drawn.append(drawing.wants_previews)
                await held.before_step(drawing, step)

            return Noting(before_step=before_step)

        async with opened(tmp_path, backend=backend) as place:
            job = await place.desk.submit(submission("hold"))
            plain = asyncio.create_task(seen(place, job.id))
            await place.held.reached.wait()
            first = place.desk.watch(job.id, previews=True)
            second = place.desk.watch(job.id, previews=True)
            await anext(first)
            await anext(second)
            await first.aclose()
            assert True in asked
            assert False not in asked
            place.held.gate.set()
            with_previews = [event async for event in second]
            assert any(e.progress is not None and e.progress.preview is not None for e in with_previews)
            assert all(e.progress is None or e.progress.preview is None for e in await plain)
            assert (asked[-1], drawn[0]) == (False, False)

    tell(story)


def test_a_job_that_will_be_looked_at_has_previews_from_its_first_step(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission(wants_previews=True, steps=50))
            events = await seen(place, job.id, previews=True)
            steps = [event.progress for event in events if event.progress is not None]
            assert steps
            assert all(step.preview is not None for step in steps)

    tell(story)


def test_a_reader_goes_on_after_the_last_event_it_has_seen(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold"))
            await begun(place, job.id)
            async with contextlib.aclosing(place.desk.watch(job.id)) as events:
                last = (await anext(events)).number
            watching = asyncio.create_task(seen(place, job.id, after=last))
            await asyncio.sleep(0)
            place.held.gate.set()
            assert all(event.number > last for event in await watching)

    tell(story)


def test_a_reader_from_before_a_restart_is_told_all_the_same(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold"))
            watching = asyncio.create_task(seen(place, job.id, after=500))
            await begun(place, job.id)
            place.held.gate.set()
            events = await watching
            assert events[0].number > 500
            assert events[-1].status.job.state == "done"
            (ended,) = await seen(place, job.id, after=900)
            assert (ended.number, ended.status.job.state) == (901, "done")

    tell(story)


def test_waiting_jobs_hear_that_the_line_has_moved(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path, max_pictures=1) as place:
            jobs = [await place.desk.submit(submission(f"hold {i}")) for i in range(3)]
            await begun(place, jobs[0].id)
            async with contextlib.aclosing(place.desk.watch(jobs[2].id)) as events:
                assert (await anext(events)).status.queue_position == 2
                await place.desk.cancel(jobs[1].id)
                async for event in events:
                    if event.status.queue_position == 1:
                        break
            place.held.gate.set()

    tell(story)


def test_jobs_in_events_carry_no_input_pictures(tmp_path: Path) -> None:
    async def story() -> None:
        from sdfleet.domain import Picture

        image = Picture(width_px=32, height_px=32, mode="RGB", data=bytes(32 * 32 * 3))
        async with opened(tmp_path) as place:
            job = await place.desk.submit(submission("hold", image=image, strength=0.5))
            await begun(place, job.id)
            assert (await place.desk.status(job.id)).job.request.image is None
            place.held.gate.set()
            assert (await place.desk.wait(job.id)).request.image is None
            stored = await place.store.job(job.id)
            assert stored is not None
            assert stored.request.image == image

    tell(story)
