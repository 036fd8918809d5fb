"""The life of a job in the store, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from sdfleet.domain import Idempotency, Job, JobId, JobState, OwnerId, Submission, Webhook
from sdfleet.errors import Conflict, QueueFull
from tests.storage.conftest import ERROR, STATES, Play, Stage, output, picture, submit


async def _job(stage: Stage, job: Job) -> Job:
    found = await stage.jobs.job(job.id)
    assert found is not None
    return found


# ----------------------------------------------------------------------------------------------------------- acceptance


def test_an_accepted_job_is_there_in_the_next_life(play: Play[Any]) -> None:
    async def first(stage: Stage) -> Job:
        job, is_new = await stage.jobs.accept(
            submit(image=picture(), mask=picture("L"), strength=0.5), job_id=JobId("a1"), max_queued=1, warnings=["w"]
        )
        assert is_new
        return job

    async def second(stage: Stage) -> Job | None:
        return await stage.jobs.job(JobId("a1"))

    job = play(first)
    assert (job.state, job.warnings, job.attempts) == ("queued", ("w",), 0)
    assert play(second) == job


def test_the_same_key_with_the_same_request_is_the_same_job(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        asked = submit(idempotency=Idempotency(key="k", fingerprint="f"), image=picture())
        first, _ = await stage.jobs.accept(asked, job_id=JobId("a1"), max_queued=1)
        await stage.jobs.begin(first.id)
        again, is_new = await stage.jobs.accept(asked, job_id=JobId("a2"), max_queued=0)
        assert (again, is_new) == (await _job(stage, first), False)
        assert await stage.jobs.job(JobId("a2")) is None

    play(story)


def test_a_repeat_that_arrives_at_the_same_moment_is_the_same_job(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        asked = submit(idempotency=Idempotency(key="k", fingerprint="f"))
        answers = await asyncio.gather(
            *(stage.jobs.accept(asked, job_id=JobId(f"a{i}"), max_queued=100) for i in range(20))
        )
        assert len({job.id for job, _ in answers}) == 1
        assert [is_new for _, is_new in answers].count(True) == 1

    play(story)


def test_the_same_key_with_another_request_is_refused(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        await stage.accept(submit(idempotency=Idempotency(key="k", fingerprint="f")))
        with pytest.raises(Conflict, match="job1"):
            await stage.accept(submit(idempotency=Idempotency(key="k", fingerprint="g")))

    play(story)


def test_the_same_key_of_another_owner_is_another_job(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        key = Idempotency(key="k" * 5000 + "\ud800\0", fingerprint="f")
        one = await stage.accept(submit(owner="a", idempotency=key))
        other = await stage.accept(submit(owner="b", idempotency=key))
        assert one.id != other.id

    play(story)


def test_a_job_id_that_is_taken_is_a_conflict_and_changes_nothing(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.accept(job_id="a1")
        with pytest.raises(Conflict):
            await stage.accept(job_id="a1", prompt="another", image=picture())
        assert await _job(stage, job) == job

    play(story)


def test_the_queue_takes_so_many_jobs_and_no_more(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        answers = await asyncio.gather(
            *(stage.jobs.accept(submit(), job_id=JobId(f"a{i}"), max_queued=7) for i in range(20)),
            return_exceptions=True,
        )
        assert sum(isinstance(answer, tuple) for answer in answers) == 7
        assert sum(isinstance(answer, QueueFull) for answer in answers) == 13
        assert (await stage.jobs.counts())["queued"] == 7

    play(story)


def test_one_owner_waits_with_no_more_jobs_than_its_key_allows(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        await stage.accept(owner="other")
        asked = submit(owner="a", max_queued=2)
        first = await stage.accept(asked)
        await stage.accept(asked)
        with pytest.raises(QueueFull, match="of this key"):
            await stage.accept(asked)
        await stage.jobs.begin(first.id)
        await stage.accept(asked)
        assert await stage.jobs.n_queued(OwnerId("a")) == 2

    play(story)


# ----------------------------------------------------------------------------------------------------- changes of state


def test_a_job_is_begun_by_one_of_many(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        asked = submit(image=picture())
        job = await stage.accept(asked)
        begun = await asyncio.gather(*(stage.jobs.begin(job.id) for _ in range(10)))
        (only,) = [found for found in begun if found is not None]
        assert (only.state, only.attempts, only.started_s) == ("running", 1, stage.clock.now_s)
        assert only.submission == asked

    play(story)


def test_a_job_ends_exactly_once_whoever_races(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        for _ in range(10):
            job = await stage.begun()
            ends = await asyncio.gather(
                stage.jobs.cancel(job.id, ERROR), stage.finish(job), stage.jobs.fail(job.id, ERROR), stage.finish(job)
            )
            assert ends.count(True) == 1
            found = await _job(stage, job)
            assert (found.state == "done") == (ends[1] or ends[3])
            assert len(found.outputs) == (1 if found.state == "done" else 0)

    play(story)


def test_a_finished_job_has_its_pictures_and_what_was_found_out(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.begun()
        stage.clock.now_s += 9
        assert await stage.finish(job, n_outputs=3)
        found = await _job(stage, job)
        assert found == replace(
            job,
            state="done",
            finished_s=stage.clock.now_s,
            outputs=tuple(output(job.id, i, created_s=stage.clock.now_s) for i in range(3)),
            warnings=("it is only a toy",),
            timings_s={"load": 5.0, "denoise": 1.0, "total": 6.0},
            device="cpu",
            dtype="float32",
            rungs=("tiled decode",),
            node="n1",
        )

    play(story)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("verb", "from_", "to"),
    [
        ("begin", ("queued",), "running"),
        ("finish", ("running",), "done"),
        ("fail", ("queued", "running"), "failed"),
        ("cancel", ("queued", "running"), "cancelled"),
        ("release", ("running",), "queued"),
        ("requeue", ("failed", "cancelled"), "queued"),
    ],
)
def test_a_change_happens_only_from_the_states_it_names(
    play: Play[Any], state: JobState, verb: str, from_: tuple[str, ...], to: str
) -> None:
    async def story(stage: Stage) -> None:
        job = await _job(stage, await stage.in_state(state))
        match verb:
            case "begin" | "requeue" | "release":
                happened = bool(await getattr(stage.jobs, verb)(job.id))
            case "finish":
                happened = await stage.finish(job)
            case _:
                happened = await getattr(stage.jobs, verb)(job.id, ERROR)
        found = await _job(stage, job)
        assert happened == (state in from_)
        assert found.state == to if happened else found == job

    play(story)


def test_an_error_is_kept_word_for_word_until_the_next_try(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.accept(image=picture())
        told = {**ERROR, "message": "NUL \0, half a pair \ud800, ümlaut"}
        await stage.jobs.fail(job.id, told)
        assert (await _job(stage, job)).error == told
        again = await stage.jobs.requeue(job.id)
        assert again == job

    play(story)


def test_a_retry_is_the_same_job_with_no_attempt_yet(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.begun(image=picture())
        await stage.jobs.cancel(job.id, ERROR)
        again = await stage.jobs.requeue(job.id)
        assert again == replace(job, state="queued", attempts=0, started_s=None)

    play(story)


def test_a_released_job_keeps_its_attempts(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.begun()
        await stage.jobs.release(job.id)
        again = await stage.jobs.begin(job.id)
        assert again is not None
        assert again.attempts == 2

    play(story)


def test_the_next_life_takes_up_what_waited_and_what_ran_in_order(play: Play[Any]) -> None:
    async def first(stage: Stage) -> None:
        for name, priority in [("low", -5), ("ran", 0), ("early", 0), ("high", 9), ("late", 0)]:
            await stage.accept(job_id=name, priority=priority, image=picture())
        await stage.jobs.begin(JobId("ran"))
        for state in ("done", "failed", "cancelled"):
            await stage.in_state(state)

    async def second(stage: Stage) -> list[Job]:
        return await stage.jobs.resume()

    play(first)
    found = play(second)
    assert [job.id for job in found] == ["high", "ran", "early", "late", "low"]
    assert {job.state for job in found} == {"queued"}
    assert found[1].attempts == 1


def test_the_end_of_a_job_is_still_to_be_told_in_the_next_life(play: Play[Any]) -> None:
    hook = Webhook(url="http://example.org/x", secret="s3cret")

    async def first(stage: Stage) -> None:
        await stage.finished(webhook=hook)
        await stage.finished()
        await stage.accept(webhook=hook)
        assert "s3cret" not in repr(await stage.webhooks.due(now_s=stage.clock.now_s))

    async def second(stage: Stage) -> None:
        (delivery,) = await stage.webhooks.due(now_s=stage.clock.now_s)
        assert (delivery.job_id, delivery.webhook, delivery.attempts) == ("job1", hook, 0)
        await stage.webhooks.postpone(delivery.id, due_s=stage.clock.now_s + 60)
        assert await stage.webhooks.due(now_s=stage.clock.now_s) == []
        assert await stage.webhooks.next_due_s() == stage.clock.now_s + 60
        (again,) = await stage.webhooks.due(now_s=stage.clock.now_s + 60)
        assert again.attempts == 1
        await stage.webhooks.delivered(again.id)
        assert await stage.webhooks.next_due_s() is None

    play(first)
    play(second)


def test_a_webhook_that_is_given_up_is_never_due(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        await stage.finished(webhook=Webhook(url="http://example.org"))
        (delivery,) = await stage.webhooks.due(now_s=stage.clock.now_s)
        await stage.webhooks.postpone(delivery.id, due_s=None)
        assert await stage.webhooks.due(now_s=1e12) == []
        assert await stage.webhooks.next_due_s() is None

    play(story)


def test_a_job_cancelled_after_its_retry_is_told_twice(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        asked: Submission = submit(webhook=Webhook(url="http://example.org"))
        job = await stage.accept(asked)
        for _ in range(2):
            assert await stage.jobs.cancel(job.id, ERROR)
            assert not await stage.jobs.cancel(job.id, ERROR)
            await stage.jobs.requeue(job.id)
        assert len(await stage.webhooks.due(now_s=stage.clock.now_s)) == 2

    play(story)
