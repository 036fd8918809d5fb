"""What the store answers about its jobs, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from sdfleet.domain import Idempotency, JobState, OwnerId, Webhook
from sdfleet.errors import InvalidValue
from tests.storage.conftest import ERROR, STATES, Play, Stage, output, picture, play_on, submit

# --------------------------------------------------------------------------------------------------- what is remembered


def test_a_job_of_another_owner_is_not_there(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.finished(owner="a")
        (made,) = job.outputs
        assert await stage.jobs.job(job.id, owner=OwnerId("b")) is None
        assert await stage.jobs.output(made.id, owner=OwnerId("b")) is None
        assert await stage.jobs.job(job.id, owner=OwnerId("a")) == job
        assert await stage.jobs.output(made.id, owner=OwnerId("a")) == made
        assert await stage.jobs.output(made.id) == made

    play(story)


def test_pages_give_every_job_once_newest_first_also_while_more_come(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        for i in range(7):
            await stage.accept(job_id=f"a{i}")
        found: list[str] = []
        cursor = None
        while True:
            page, cursor = await stage.jobs.page(before=cursor, limit=3)
            found += [job.id for job in page]
            await stage.accept()
            if cursor is None:
                break
        assert found == [f"a{i}" for i in range(6, -1, -1)]

    play(story)


def test_a_full_last_page_has_no_page_after_it(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        for _ in range(4):
            await stage.finished()
        assert (await stage.jobs.page(limit=4))[1] is None
        _, cursor = await stage.jobs.outputs(limit=2)
        rest, end = await stage.jobs.outputs(limit=2, before=cursor)
        assert (len(rest), end) == (2, None)

    play(story)


def test_a_page_is_of_one_owner_and_of_the_states_asked_for(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        mine = await stage.accept(owner="a")
        failed = await stage.accept(owner="a")
        await stage.jobs.fail(failed.id, ERROR)
        await stage.accept(owner="b")
        cases: list[tuple[frozenset[JobState] | None, list[str]]] = [
            (None, [failed.id, mine.id]),
            (frozenset({"failed", "done"}), [failed.id]),
        ]
        for states, wanted in cases:
            page, _ = await stage.jobs.page(owner=OwnerId("a"), states=states)
            assert [job.id for job in page] == wanted

    play(story)


def test_a_page_comes_without_input_pictures_and_with_finished_ones(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.finished(n_outputs=2, image=picture())
        ((found,), _) = await stage.jobs.page()
        assert found.request == replace(job.request, image=None)
        assert found.outputs == job.outputs

    play(story)


@pytest.mark.parametrize(
    ("search", "is_found"),
    [
        ("RED", True), ("ÜBER", True), ("100%_sure", True), ("%", True), ("d_ü", False), ("straße", True),
        ("blue", False), ("\ud800", False), ("x" * 60_000, False),
    ],
)  # fmt: skip
def test_a_search_finds_part_of_a_prompt_in_whatever_case(play: Play[Any], search: str, *, is_found: bool) -> None:
    async def story(stage: Stage) -> None:
        await stage.accept(prompt="A red über-fox, 100%_sure, in the STRASSE")
        page, _ = await stage.jobs.page(search=search)
        assert bool(page) == is_found

    play(story)


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.5", "٣", "9" * 19, "1; DROP TABLE jobs"])
def test_a_cursor_we_never_gave_is_a_bad_request(play: Play[Any], cursor: str) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(InvalidValue, match="cursor"):
            await stage.jobs.page(before=cursor)

    play(story)


# ------------------------------------------------------------------------------------------------ numbers and retention


def test_every_state_is_counted(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        assert await stage.jobs.counts() == dict.fromkeys(STATES, 0)
        for state in STATES:
            await stage.in_state(state)
        assert await stage.jobs.counts() == dict.fromkeys(STATES, 1)

    play(story)


def test_statistics_are_of_jobs_that_ended_in_the_time_asked_for(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        await stage.finished(model="old")
        stage.clock.now_s += 100
        for spent_s in (1.0, 4.0):
            await stage.finished(spent_s=spent_s)
        stage.clock.now_s += 1
        job = await stage.accept(model="other")
        await stage.jobs.fail(job.id, ERROR)
        await stage.in_state("cancelled")
        stats = await stage.jobs.image_stats(since_s=stage.clock.now_s - 50, n_recent=2)
        assert (stats.n_done, stats.n_failed, stats.avg_generation_s) == (2, 1, 2.5)
        assert stats.by_model == {"toy": 2, "other": 1}
        newest, second = stats.recent
        assert (newest.state, newest.model, newest.error, newest.generation_s) == (
            "failed",
            "other",
            "it fell over",
            None,
        )
        assert (second.state, second.generation_s, second.error, second.width_px) == ("done", 4.0, None, 64)

    play(story)


def test_places_are_of_the_last_day_and_up_to_date(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        await stage.finished(model="old")
        stage.clock.now_s += 2 * 24 * 3600
        for spent_s in (1.0, 4.0):
            await stage.finished(spent_s=spent_s)
        (place,) = await stage.jobs.places()
        assert (place.node, place.model, place.by_state, place.avg_generation_s) == ("n1", "toy", {"done": 2}, 2.5)
        job = await stage.accept()
        waiting, drawn = await stage.jobs.places()
        assert (waiting.node, waiting.by_state, drawn.by_state) == ("", {"queued": 1}, {"done": 2})
        await stage.jobs.fail(job.id, ERROR)
        assert [place.by_state for place in await stage.jobs.places()] == [{"failed": 1}, {"done": 2}]
        stage.clock.now_s += 2 * 24 * 3600
        assert await stage.jobs.places() == ()

    play(story)


def test_places_are_read_again_when_something_was_written_or_a_second_is_over(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        await stage.finished()
        first = await stage.jobs.places()
        assert await stage.jobs.places() is first
        stage.clock.now_s += 1
        second = await stage.jobs.places()
        assert second is not first
        await stage.accept()
        assert await stage.jobs.places() is not second

    play(story)


def test_retention_finds_what_is_older_and_no_job_that_has_not_ended(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        old = await stage.finished(n_outputs=2)
        waiting = await stage.accept()
        stage.clock.now_s += 100
        new = await stage.finished()
        border_s = stage.clock.now_s - 50
        found = await stage.jobs.expired(jobs_before_s=border_s, outputs_before_s=border_s)
        assert (found.job_ids, found.outputs) == ((old.id,), old.outputs)
        nothing = await stage.jobs.expired()
        assert (nothing.job_ids, nothing.outputs) == ((), ())
        assert await stage.jobs.forget_jobs([old.id, waiting.id]) == 1
        assert {job.id for job in (await stage.jobs.page())[0]} == {waiting.id, new.id}

    play(story)


def test_finished_pictures_outlive_their_job_until_they_are_forgotten(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.finished(n_outputs=2, image=picture(), webhook=Webhook(url="http://example.org"))
        await stage.jobs.forget_jobs([job.id])
        assert await stage.jobs.job(job.id) is None
        assert (await stage.jobs.outputs())[0] == list(reversed(job.outputs))
        await stage.jobs.forget_outputs([made.id for made in job.outputs])
        assert (await stage.jobs.outputs())[0] == []

    play(story)


def test_thousands_are_forgotten_in_one_call(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.begun()
        made = tuple(output(job.id, i) for i in range(1200))
        assert await stage.jobs.finish(replace(job, outputs=made))
        await stage.jobs.forget_outputs([one.id for one in made])
        found = await stage.jobs.job(job.id)
        assert found is not None
        assert found.outputs == ()

    play(story)


# -------------------------------------------------------------------------------------------------------------- indexes


def test_no_query_reads_a_whole_table(tmp_path: Path) -> None:
    """`counts` alone goes through every job, and does so in an index that holds all it needs."""
    asked: dict[str, Any] = {}

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if not statement.startswith(("INSERT INTO jobs", "INSERT INTO pictures", "INSERT INTO outputs", "BEGIN")):
            asked[statement] = values[0] if isinstance(values, list) else values

    async def story(stage: Stage) -> list[tuple[str, str]]:
        for engine in (stage.database._writer, stage.database._readers):
            event.listen(engine, "before_cursor_execute", note)
        hook, key = Webhook(url="http://example.org"), Idempotency(key="k", fingerprint="f")
        asked_for = submit(owner="a", max_queued=9, image=picture(), webhook=hook, idempotency=key)
        job = await stage.finished(submission=asked_for)
        await stage.jobs.requeue((await stage.in_state("failed")).id)
        await stage.jobs.resume()
        for owner, states in ((None, None), (OwnerId("a"), None), (None, frozenset({"failed"}))):
            await stage.jobs.page(owner=owner, states=states, before="9")  # type: ignore[arg-type]
            await stage.jobs.outputs(owner=owner)
        await stage.jobs.output(job.outputs[0].id)
        await stage.jobs.open_states()
        await stage.jobs.places()
        await stage.jobs.counts()
        await stage.jobs.n_queued(OwnerId("a"))
        await stage.jobs.image_stats(since_s=1.0)
        await stage.jobs.expired(jobs_before_s=1.0, outputs_before_s=1.0)
        for delivery in await stage.webhooks.due(now_s=1e12):
            await stage.webhooks.delivered(delivery.id)
        await stage.webhooks.next_due_s()
        await stage.jobs.forget_jobs([job.id])
        await stage.jobs.forget_outputs([job.outputs[0].id])
        plans: list[tuple[str, str]] = []
        for statement, values in list(asked.items()):
            lines = await stage.database.read(
                lambda c, s=statement, v=values: c.exec_driver_sql(f"EXPLAIN QUERY PLAN {s}", v).all()  # type: ignore[misc]
            )
            plans += [(statement, str(line[-1])) for line in lines]
        return plans

    plans = play_on(f"sqlite:///{tmp_path / 'jobs.db'}", story)
    assert len(plans) > 25
    # A page of everybody's walks down the table by its key, and stops at its limit.
    whole = {(statement, plan) for statement, plan in plans if plan.startswith("SCAN") and "INDEX" not in plan}
    assert {plan for statement, plan in whole if "LIMIT" not in statement} == set()
