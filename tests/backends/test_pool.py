"""Several engines that draw as one backend. Real processes, no torch; the first word of a prompt says what happens."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from sdfleet.backends.engine_job import DRAWN_AGAIN
from sdfleet.backends.engine_trial import TrialNotes
from sdfleet.backends.local import LocalBackend
from sdfleet.backends.placement import Trial
from sdfleet.backends.pool import EnginePool
from sdfleet.domain import Progress
from sdfleet.errors import EngineDied, JobCancelled
from tests.backends.drawings import drawing, endless, scripted_backend, scripted_pool
from tests.backends.test_contract import begin, pixels

Story = Callable[[EnginePool, list[LocalBackend]], Awaitable[None]]

SETTING = "2 engines of 1 threads, 2 cores, auto"
GAINS = Trial(
    n_many=8, n_engines=2, wide_one_s=0.3, wide_many_s=0.8, small_one_s=0.4, small_many_s=0.5, executors=("torch",) * 3
)


def tell(story: Story, **more: Any) -> None:
    """Run one story with a pool that stands; afterwards no process and no task is left."""

    async def told() -> None:
        made: list[LocalBackend] = []
        pool = scripted_pool(made=made, **more)
        try:
            async with asyncio.timeout(30):
                await pool.start()
                await story(pool, made)
        finally:
            await pool.close()
        assert pool.pids == ()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(told())


def n_running(made: list[LocalBackend]) -> list[int]:
    return [backend.capabilities().n_running for backend in made]


def facts_of(pool: EnginePool, name: str) -> Any:
    return pool.capabilities().facts[name]


async def facts_change(pool: EnginePool, is_so: Callable[[Mapping[str, object]], bool]) -> None:
    """Wait until the pool says so of itself, which it may at any turn of the loop."""
    while not is_so(pool.capabilities().facts):  # noqa: ASYNC110  facts can be asked for, not waited for
        await asyncio.sleep(0)


# -------------------- split jobs


def test_a_job_of_several_pictures_is_drawn_by_all_small_engines_and_is_the_same() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        asked = drawing(seed=2**64 - 2, n_images=5)
        seen: list[Progress] = []
        n_drawn_wide: list[int] = []

        def watch(progress: Progress) -> None:
            seen.append(progress)
            n_drawn_wide.append(n_running(made)[0])

        split = await pool.generate(asked, watch)
        whole = scripted_backend()
        try:
            expected = await whole.generate(asked)
        finally:
            await whole.close()
        assert pixels(split) == pixels(expected)
        assert [i.seed for i in split.images][:2] == [i.seed for i in expected.images][:2]
        assert {p.image_index for p in seen} == set(range(5))
        assert set(n_drawn_wide) == {0}
        assert split.drawing == asked
        assert split.warnings == expected.warnings

    tell(story)


def test_a_reproducible_job_is_drawn_whole_by_the_wide_engine() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        task = await begin(pool, endless(n_images=4, reproducible=True))
        assert n_running(made) == [1, 0, 0]
        task.cancel()
        await asyncio.wait({task})

    tell(story)


def test_one_picture_alone_is_drawn_by_the_wide_engine_and_company_by_the_small_ones() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        tasks = [await begin(pool, endless()) for _ in range(3)]
        assert n_running(made) == [1, 1, 1]
        assert pool.capabilities().n_running == 3
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert pool.capabilities().n_running == 0

    tell(story)


def test_what_comes_while_the_wide_engine_draws_what_only_it_may_goes_there_too() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        alone = await begin(pool, endless(reproducible=True))
        company = await begin(pool, endless(n_images=4))
        assert n_running(made) == [2, 0, 0]
        for task in (alone, company):
            task.cancel()
        await asyncio.wait({alone, company})

    tell(story)


def test_previews_of_a_split_job_can_be_asked_for_later_and_carry_the_right_index() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        assert len(made) == 3
        with_preview: set[int] = set()
        all_seen = asyncio.Event()

        def watch(progress: Progress) -> None:
            if progress.preview is not None:
                with_preview.add(progress.image_index)
            if with_preview == {0, 1, 2, 3}:
                all_seen.set()

        asked = endless(n_images=4)
        task = asyncio.create_task(pool.generate(asked, watch))
        await asyncio.sleep(0)
        await pool.watch(asked.job_id, previews=True)
        await all_seen.wait()
        await pool.cancel(asked.job_id)
        with pytest.raises(JobCancelled):
            await task

    tell(story)


def test_cancelling_a_split_job_stops_all_its_parts() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        asked = endless(n_images=4)
        task = await begin(pool, asked)
        assert n_running(made) == [0, 1, 1]
        await pool.cancel(asked.job_id)
        with pytest.raises(JobCancelled):
            await task
        assert n_running(made) == [0, 0, 0]
        assert len((await pool.generate(replace(asked, prompt="draw", steps=2))).images) == 4

    tell(story)


def test_a_split_job_can_be_cancelled_before_any_of_its_parts_has_begun() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        asked = endless(n_images=4)
        task = asyncio.create_task(pool.generate(asked))
        await asyncio.sleep(0)  # the job is there, its parts are not yet
        await pool.cancel(asked.job_id)
        with pytest.raises(JobCancelled):
            await task
        assert n_running(made) == [0, 0, 0]

    tell(story)


# -------------------- deaths


def test_killing_one_of_the_engines_loses_nothing(tmp_path: Path) -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        undisturbed = await pool.generate(drawing(seed=5, n_images=4))
        # Endless in the engine that sees it first, so that there is something to kill; the others draw it.
        task = await begin(pool, drawing(f"second-life {tmp_path / 'died'}", seed=5, n_images=4))
        neighbours = [asyncio.create_task(pool.generate(drawing(steps=20, seed=i, n_images=2))) for i in range(4)]
        await asyncio.sleep(0)
        for backend in made[1:]:
            assert backend.pid is not None
            os.kill(backend.pid, signal.SIGKILL)
        again = await task
        assert pixels(again) == pixels(undisturbed)
        assert again.warnings.count(DRAWN_AGAIN) == 1
        for i, result in enumerate(await asyncio.gather(*neighbours)):
            assert [image.seed for image in result.images] == [i, i + 1]

    tell(story)


def test_a_job_that_kills_its_engines_fails_and_its_other_part_is_stopped() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        with pytest.raises(EngineDied, match="2 times"):
            await pool.generate(drawing("die", n_images=4))
        assert n_running(made) == [0, 0, 0]
        assert (await pool.generate(drawing())).images

    tell(story)


# -------------------- whether there are small engines at all


def test_without_memory_for_several_engines_one_draws_everything_and_says_why() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        task = await begin(pool, endless(n_images=4))
        assert n_running(made) == [1, 0, 0]
        assert len(pool.pids) == 1
        assert "2 more engines take 1.2 GB" in facts_of(pool, "why_one_engine")
        task.cancel()
        await asyncio.wait({task})

    tell(story, free_bytes=lambda: 1_500_000_000)


def test_small_engines_that_cannot_start_leave_the_work_to_the_wide_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        for backend in made[1:]:
            monkeypatch.setattr(backend, "_command", ("/nowhere/python",))
            assert backend.pid is not None
            os.kill(backend.pid, signal.SIGKILL)
        result = await pool.generate(drawing(n_images=4))
        assert len(result.images) == 4

    tell(story)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot be told")
def test_an_engine_stays_on_the_cores_it_was_given() -> None:
    async def story() -> None:
        core = min(os.sched_getaffinity(0))
        backend = scripted_backend(cores=[core])
        try:
            await backend.start()
            assert psutil.Process(backend.pid).cpu_affinity() == [core]
        finally:
            await backend.close()

    asyncio.run(story())


# -------------------- trials


def are_ready(facts: Mapping[str, object]) -> bool:
    return [engine["state"] for engine in cast("Any", facts)["engines"]] == ["ready"] * 3


def test_a_small_engine_that_has_not_drawn_yet_keeps_nobody_waiting(tmp_path: Path) -> None:
    TrialNotes(tmp_path).keep(drawing(), GAINS, setting=SETTING)

    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        await pool.generate(drawing())
        await facts_change(pool, are_ready)
        task = await begin(pool, endless(n_images=4))
        assert n_running(made) == [1, 0, 0]
        task.cancel()
        await asyncio.wait({task})

    tell(story, n_engines="auto", notes_folder=tmp_path)


def test_a_known_trial_spreads_jobs_once_the_small_engines_are_warm(tmp_path: Path) -> None:
    TrialNotes(tmp_path).keep(drawing(), GAINS, setting=SETTING)

    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        await pool.generate(drawing())
        await facts_change(pool, are_ready)
        await facts_change(pool, lambda _: all(small.capabilities().facts["checkpoints"] for small in made[1:]))
        task = await begin(pool, endless(n_images=4))
        assert n_running(made) == [0, 1, 1]
        task.cancel()
        await asyncio.wait({task})

    tell(story, n_engines="auto", notes_folder=tmp_path)


def test_a_known_trial_without_a_gain_keeps_one_engine(tmp_path: Path) -> None:
    TrialNotes(tmp_path).keep(drawing(), replace(GAINS, small_many_s=0.75), setting=SETTING)

    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        await pool.generate(drawing())
        task = await begin(pool, endless(n_images=4))
        assert n_running(made) == [1, 0, 0]
        assert len(pool.pids) == 1
        task.cancel()
        await asyncio.wait({task})

    tell(story, n_engines="auto", notes_folder=tmp_path)


def test_the_first_pause_measures_and_keeps_what_it_found(tmp_path: Path) -> None:
    asked = drawing()

    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        assert len(made) == 3
        await pool.generate(asked)
        await facts_change(pool, lambda facts: bool(facts.get("engine_trials")))
        ((name, told),) = facts_of(pool, "engine_trials").items()
        assert name == "toy 32x16"
        assert set(told["seconds"]) == {"wide_one", "wide_many", "small_one", "small_many"}

    tell(story, n_engines="auto", notes_folder=tmp_path)
    assert TrialNotes(tmp_path).find(asked, setting=SETTING) is not None


def test_a_trial_waits_until_no_engine_tries_executors(tmp_path: Path) -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        await pool.generate(drawing())
        await facts_change(pool, lambda facts: bool(facts.get("engine_trials")))
        assert [backend.capabilities().facts["n_disturbed"] for backend in made] == [0, 0, 0]

    tell(story, engine="SettlingEngine", n_engines="auto", notes_folder=tmp_path)


def test_engines_that_do_not_settle_are_not_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sdfleet.backends.pool._SETTLE_DEADLINE_S", 0.0)

    async def story(pool: EnginePool, _made: list[LocalBackend]) -> None:
        await pool.generate(drawing())
        await facts_change(pool, lambda _: "engines could not be tried" in caplog.messages)
        assert len((await pool.generate(drawing(n_images=2))).images) == 2
        assert facts_of(pool, "engine_trials") == {}

    tell(story, engine="SettlingEngine", n_engines="auto", notes_folder=tmp_path)


def test_a_job_does_not_wait_for_a_trial() -> None:
    async def story(pool: EnginePool, made: list[LocalBackend]) -> None:
        await pool.generate(drawing(steps=8))
        await facts_change(pool, lambda _: sum(n_running(made)) > 0)
        assert pool.capabilities().n_running == 0
        result = await pool.generate(drawing(n_images=2, checkpoint="other"))
        assert len(result.images) == 2
        assert facts_of(pool, "engine_trials") == {}

    tell(story, n_engines="auto")


def test_a_note_is_void_for_other_weights_and_sizes_and_a_broken_one_is_measured_again(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    notes = TrialNotes(tmp_path / "notes")
    asked = drawing(checkpoint=str(weights.parent))
    notes.keep(asked, GAINS, setting=SETTING)
    assert TrialNotes(tmp_path / "notes").find(asked, setting=SETTING) == GAINS
    assert notes.find(asked, setting="4 engines") is None
    assert notes.find(replace(asked, width_px=64), setting=SETTING) is None
    weights.write_bytes(b"another")
    assert notes.find(asked, setting=SETTING) is None
    notes.keep(asked, GAINS, setting=SETTING)
    for file in (tmp_path / "notes").iterdir():
        file.write_text("{}")
    assert notes.find(asked, setting=SETTING) is None


def test_cores_are_shared_out_between_the_engines() -> None:
    made: list[LocalBackend] = []
    scripted_pool(made=made, n_cores=16, n_engines="auto")
    assert len(made) == 1 + 8
    made.clear()
    scripted_pool(made=made, n_cores=1, n_engines="auto")
    assert len(made) == 1


if sys.platform == "win32":  # no SIGKILL
    pytestmark = pytest.mark.skip(reason="POSIX only")
