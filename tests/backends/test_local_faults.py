"""What happens to jobs when their engine's process misbehaves or dies. Real processes, no torch."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from sdfleet.backends.engine_job import DRAWN_AGAIN
from sdfleet.backends.local import LocalBackend
from sdfleet.backends.watchdog import Patience
from sdfleet.domain import Picture, Progress
from sdfleet.errors import EngineDied, EngineFailed, JobCancelled, UnsupportedByModel
from tests.backends.drawings import drawing, endless, scripted_backend
from tests.backends.test_contract import begin, pixels

Story = Callable[[LocalBackend], Awaitable[None]]


def tell(story: Story, backend: LocalBackend | None = None) -> None:
    """Run one story; afterwards the process is gone and no task is left."""

    async def told() -> None:
        local = scripted_backend() if backend is None else backend
        try:
            async with asyncio.timeout(60):
                await story(local)
        finally:
            await local.close()
        assert local.pid is None
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(told())


def kill(backend: LocalBackend, number: int = signal.SIGKILL) -> None:
    assert backend.pid is not None
    os.kill(backend.pid, number)


def program(code: str) -> Sequence[str]:
    """A child that is a few lines of Python after the imports; the options come as arguments that it ignores."""
    return (sys.executable, "-c", f"import os, sys\nfrom sdfleet.engine import wire\n{code}")


def test_a_job_whose_process_was_killed_is_drawn_again_and_is_the_same_picture(tmp_path: Path) -> None:
    async def story(backend: LocalBackend) -> None:
        undisturbed = await backend.generate(drawing(seed=3, n_images=2))
        first_pid = backend.pid
        task = await begin(backend, drawing(f"second-life {tmp_path / 'died'}", seed=3, n_images=2))
        kill(backend)
        again = await task
        assert backend.pid != first_pid
        assert pixels(again) == pixels(undisturbed)
        assert DRAWN_AGAIN in again.warnings
        assert DRAWN_AGAIN not in undisturbed.warnings

    tell(story)


def test_every_job_in_flight_survives_one_death(tmp_path: Path) -> None:
    async def story(backend: LocalBackend) -> None:
        asked = [drawing(f"second-life {tmp_path / str(i)}", seed=i) for i in range(4)]
        tasks = [await begin(backend, each) for each in asked]
        kill(backend)
        results = await asyncio.gather(*tasks)
        assert [result.images[0].seed for result in results] == [0, 1, 2, 3]

    tell(story)


def test_a_job_that_kills_its_process_fails_alone(tmp_path: Path) -> None:
    async def story(backend: LocalBackend) -> None:
        neighbours = [await begin(backend, drawing(f"second-life {tmp_path / str(i)}")) for i in range(3)]
        guilty = asyncio.create_task(backend.generate(drawing("die")))
        newcomer = asyncio.create_task(backend.generate(drawing()))
        with pytest.raises(EngineDied, match="was killed by SIGKILL while it drew this job, 2 times") as caught:
            await guilty
        assert "out of memory" in caught.value.hint
        for task in [*neighbours, newcomer]:
            assert (await task).images
        assert (await backend.generate(drawing())).images

    tell(story)


def test_an_exit_code_and_the_last_words_are_told() -> None:
    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineDied, match="ended with exit code 3 while it drew") as caught:
            await backend.generate(drawing("exit"))
        assert caught.value.hint == "its last words: first words / last words"

    tell(story)


def test_an_exception_that_escapes_a_step_is_told() -> None:
    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineDied, match=r"exit code 70 \(the engine's process met a fault: RuntimeError: boom\)"):
            await backend.generate(drawing("raise"))
        assert (await backend.generate(drawing())).images

    tell(story)


def test_an_engine_that_stays_after_a_fault_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfleet.backends.local.FAULT_DEADLINE_S", 0.1)

    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineDied, match=r"stayed after a fault and was ended .*boom"):
            await backend.generate(drawing("raise"))

    tell(story, scripted_backend("LingeringEngine"))


def test_a_job_in_a_step_that_never_returns_is_drawn_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story(backend: LocalBackend) -> None:
        again = await backend.generate(drawing(f"hang-once {tmp_path / 'hung'}", seed=3))
        undisturbed = await backend.generate(drawing(seed=3))
        assert pixels(again) == pixels(undisturbed)
        assert again.warnings[-1] == DRAWN_AGAIN

    # Silent before the first progress it may be: the job must have been seen to begin.
    tell(story, scripted_backend(patience=Patience(first_s=50.0, least_s=1.0, gaps=0.0)))
    (record,) = [record for record in caplog.records if record.message == "an engine process is silent and is ended"]
    assert record.levelname == "ERROR"


@pytest.mark.parametrize(
    ("prompt", "patience"),
    [
        ("hang", Patience(first_s=50.0, least_s=0.5, gaps=0.0)),
        ("hang-at-once", Patience(first_s=0.5, least_s=50.0, gaps=0.0)),
    ],
)
def test_a_job_that_hangs_every_engine_fails_and_says_why(prompt: str, patience: Patience) -> None:
    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineDied, match=r"had jobs and said nothing for \d+ s and was ended .* 2 times"):
            await backend.generate(drawing(prompt))

    tell(story, scripted_backend(patience=patience))


def test_an_engine_that_hangs_after_its_caller_left_is_ended_too() -> None:
    async def story(backend: LocalBackend) -> None:
        left = await begin(backend, drawing("hang"))
        hung_pid = backend.pid
        left.cancel()
        await asyncio.wait({left})
        while backend.pid == hung_pid:  # noqa: ASYNC110  a death nobody waits for
            await asyncio.sleep(0)

    tell(story, scripted_backend(patience=Patience(first_s=50.0, least_s=0.5, gaps=0.0)))


def test_large_pictures_pass_whole_in_both_directions() -> None:
    side_px = 2048
    image = Picture(width_px=side_px, height_px=side_px, mode="RGB", data=bytes(side_px * side_px * 3))

    async def story(backend: LocalBackend) -> None:
        asked = [drawing(width_px=side_px, height_px=side_px, image=image, seed=seed) for seed in (1, 2)]
        first, second = await asyncio.gather(*map(backend.generate, asked))
        assert len(pixels(first)[0]) == side_px * side_px * 3
        assert pixels(first) != pixels(second)

    tell(story)


def test_a_refused_job_leaves_its_neighbours_alone() -> None:
    async def story(backend: LocalBackend) -> None:
        neighbour = asyncio.create_task(backend.generate(drawing()))
        with pytest.raises(UnsupportedByModel) as caught:
            await backend.generate(drawing("refuse"))
        assert caught.value.hint == "take another"
        assert DRAWN_AGAIN not in (await neighbour).warnings

    tell(story)


def test_what_a_library_prints_disturbs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def story(backend: LocalBackend) -> None:
        assert (await backend.generate(drawing("print"))).images

    with caplog.at_level(logging.DEBUG, "sdfleet.backends.process"):
        tell(story)
    assert "and so does its C code" in {getattr(record, "line", "") for record in caplog.records}


def test_records_of_the_engine_are_logged_here_under_their_own_names(caplog: pytest.LogCaptureFixture) -> None:
    async def story(backend: LocalBackend) -> None:
        assert (await backend.generate(drawing("log"))).images

    tell(story)
    (record,) = [record for record in caplog.records if record.name == "sdfleet.scripted"]
    assert (record.levelname, record.message, vars(record)["rung"]) == ("WARNING", "memory is short", "tile_vae")


def test_an_event_that_cannot_be_sent_fails_its_job_only() -> None:
    async def story(backend: LocalBackend) -> None:
        neighbour = await begin(backend, drawing(steps=50))
        with pytest.raises(EngineFailed, match="could not be sent"):
            await backend.generate(drawing("infinite"))
        assert DRAWN_AGAIN not in (await neighbour).warnings

    tell(story)


def test_a_job_called_done_without_its_pictures_fails() -> None:
    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineFailed, match=r"sent pictures \[0\] of 2"):
            await backend.generate(drawing("unfinished", n_images=2))

    tell(story)


def test_a_process_that_dies_idle_costs_no_job() -> None:
    async def story(backend: LocalBackend) -> None:
        await backend.generate(drawing())
        first_pid = backend.pid
        kill(backend)
        result = await backend.generate(drawing())
        assert backend.pid != first_pid
        assert result.images

    tell(story)


def test_a_job_cancelled_while_its_process_dies_is_not_drawn_again() -> None:
    async def story(backend: LocalBackend) -> None:
        asked = endless()
        task = await begin(backend, asked)
        kill(backend, signal.SIGSTOP)  # so that the answer to the cancel cannot come first
        await backend.cancel(asked.job_id)
        kill(backend)
        with pytest.raises(JobCancelled):
            await task

    tell(story)


def test_a_job_cancelled_before_the_process_is_ready_is_never_sent() -> None:
    async def story(backend: LocalBackend) -> None:
        asked = drawing("die")
        task = asyncio.create_task(backend.generate(asked))
        neighbour = asyncio.create_task(backend.generate(drawing()))
        await asyncio.sleep(0)  # both have begun to wait
        await backend.cancel(asked.job_id)
        with pytest.raises(JobCancelled):
            await task
        assert DRAWN_AGAIN not in (await neighbour).warnings

    tell(story)


def test_previews_can_be_asked_for_later() -> None:
    async def story(backend: LocalBackend) -> None:
        asked = endless()
        begun, shown = asyncio.Event(), asyncio.Event()

        def look(progress: Progress) -> None:
            begun.set()
            if progress.preview is not None:
                shown.set()

        task = asyncio.create_task(backend.generate(asked, look))
        await begun.wait()
        assert not shown.is_set()
        await backend.watch(asked.job_id, previews=True)
        await shown.wait()
        await backend.cancel(asked.job_id)
        await asyncio.wait({task})
        assert isinstance(task.exception(), JobCancelled)

    tell(story)


def test_ctrl_c_in_the_terminal_does_not_end_the_engine() -> None:
    async def story(backend: LocalBackend) -> None:
        task = await begin(backend, drawing(steps=50))
        kill(backend, signal.SIGINT)
        assert DRAWN_AGAIN not in (await task).warnings

    tell(story)


def test_a_process_of_the_engine_that_outlives_it_keeps_nobody_waiting() -> None:
    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineDied, match="exit code 4"):
            await backend.generate(drawing("orphan"))

    tell(story)
