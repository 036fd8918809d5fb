"""How drawing went over time, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

from typing import Any

from tests.storage.conftest import ERROR, Play, Stage

# A round time, so that spans are easy to read.
START_S = 1_000_000.0


async def _took(stage: Stage, *, at_s: float, total_s: float, drawing_s: float = 0.5) -> None:
    """A job that was done at `at_s`, `total_s` after it was accepted."""
    stage.clock.now_s = at_s - total_s
    job = await stage.begun()
    stage.clock.now_s = at_s
    assert await stage.finish(job, spent_s=drawing_s)


def test_every_end_is_counted_in_the_span_it_falls_into(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        # The edges: the first moment belongs to a span, the last one to the next.
        for at_s in (START_S - 0.001, START_S, START_S + 9.999, START_S + 10, START_S + 29.9, START_S + 30):
            await _took(stage, at_s=at_s, total_s=1.0)
        stage.clock.now_s = START_S + 15.0
        await stage.in_state("failed")
        await stage.in_state("cancelled")
        await stage.in_state("queued")
        await stage.in_state("running")
        found = await stage.jobs.series(start_s=START_S, width_s=10.0, n_spans=3)
        assert [(one.n_done, one.n_failed, one.n_cancelled) for one in found.spans] == [(2, 0, 0), (1, 1, 1), (1, 0, 0)]
        assert [one.start_s for one in found.spans] == [START_S, START_S + 10, START_S + 20]
        assert (found.whole.n_done, found.whole.n_failed, found.whole.n_cancelled) == (4, 1, 1)

    play(story)


def test_percentiles_are_the_nearest_rank_of_each_span_and_of_all(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        for total_s in range(20, 0, -1):
            await _took(stage, at_s=START_S + 25.0, total_s=total_s, drawing_s=total_s / 4)
        await _took(stage, at_s=START_S + 5.0, total_s=7.0, drawing_s=3.0)
        found = await stage.jobs.series(start_s=START_S, width_s=10.0, n_spans=3)
        first, empty, last = found.spans
        assert (first.total_p50_s, first.total_p95_s, first.drawing_p50_s) == (7.0, 7.0, 3.0)
        assert (empty.total_p50_s, empty.total_p95_s, empty.drawing_p95_s) == (None, None, None)
        assert (last.total_p50_s, last.total_p95_s) == (10.0, 19.0)
        assert (last.drawing_p50_s, last.drawing_p95_s) == (2.5, 4.75)
        # Of 21 the eleventh and the twentieth: 7 s is there twice.
        assert (found.whole.total_p50_s, found.whole.total_p95_s) == (10.0, 19.0)

    play(story)


def test_failures_are_told_by_reason_the_most_frequent_first_in_the_words_of_the_newest(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        for i, (code, message) in enumerate([("a", "old"), ("b", "one"), ("a", "new"), ("c", "too late")]):
            stage.clock.now_s = START_S + 5.0 + i * 5
            job = await stage.accept(model=f"m{i}")
            await stage.jobs.fail(job.id, {**ERROR, "code": code, "message": message})
        found = await stage.jobs.series(start_s=START_S, width_s=10.0, n_spans=2)
        told = [(one.code, one.n, one.message, one.model, one.last_s - START_S) for one in found.reasons]
        assert told == [("a", 2, "new", "m2", 15.0), ("b", 1, "one", "m1", 10.0)]
        assert found.reasons[0].hint == ERROR["hint"]

    play(story)
