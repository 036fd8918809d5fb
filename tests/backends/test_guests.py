"""What is around the engines of other projects, with a made-up one: no MLX, no model, a real process.

The real ones are in test_mflux.py and test_diffusionkit.py.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import venv
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sdfleet.backends.base import Backend
from sdfleet.backends.local import LocalBackend
from sdfleet.domain import Drawing, ImageResult, Progress
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import launch
from sdfleet.errors import BadRequest, EngineDied, EngineFailed, JobCancelled, OutOfMemory
from tests.backends.drawings import drawing, guest_backend
from tests.backends.fake_guest import CHECKPOINT_BYTES


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with its standard library and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


def tell(backend: LocalBackend, story: Callable[[Backend], Awaitable[None]]) -> None:
    async def told() -> None:
        try:
            async with asyncio.timeout(60):
                await story(backend)
        finally:
            await backend.close()

    asyncio.run(told())


def held(backend: Backend) -> object:
    return backend.capabilities().facts["checkpoints"]


async def begin(backend: Backend, asked: Drawing) -> asyncio.Task[ImageResult]:
    """The job's task, once its first step was reported."""
    begun = asyncio.Event()
    task = asyncio.create_task(backend.generate(asked, lambda _: begun.set()))
    await begun.wait()
    return task


def test_a_guest_needs_nothing_of_our_environment_but_the_package_itself(bare_python: str) -> None:
    async def story(backend: Backend) -> None:
        result = await backend.generate(drawing(n_images=2))
        assert [image.seed for image in result.images] == [7, 8]
        assert result.device == "fake"

    tell(guest_backend(python=bare_python), story)


def test_what_lies_beside_our_package_is_hidden_from_a_guest() -> None:
    """Its folder's parent is our site-packages: a guest would take our huggingface_hub for its own.

    -S, because this environment may name that folder in a file of its own, as a guest's does not.
    """
    script = (
        f"import runpy, sys; sys.argv = ['launch', '--help']; runpy.run_path({launch.__file__!r}, run_name='__main__')"
    )
    show = f"import atexit, sys; atexit.register(lambda: print(sys.path)); {script}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", show], capture_output=True, text=True, check=True)
    assert "The process that owns one device" in done.stdout
    assert str(Path(launch.__file__).parents[3]) not in done.stdout.splitlines()[-1]


def test_jobs_are_drawn_one_at_a_time_in_the_order_they_came() -> None:
    async def story(backend: Backend) -> None:
        seen: list[Progress] = []
        asked = [drawing(steps=5, n_images=2) for _ in range(3)]
        await asyncio.gather(*(backend.generate(each, seen.append) for each in asked))
        order = list(dict.fromkeys((each.job_id, each.image_index) for each in seen))
        assert order == [(each.job_id, i) for each in asked for i in range(2)]

    tell(guest_backend(), story)


def test_what_is_left_out_is_told_once_and_how_much_of_the_prompt_was_read() -> None:
    async def story(backend: Backend) -> None:
        result = await backend.generate(drawing("draw (me:1.2)", sampler="heun", negative_prompt="no"))
        assert result.warnings == (
            "the negative prompt was left out: this model takes none with mflux",
            "mflux has one sampler, euler: heun was not used",
            "mflux knows no weights within prompts: they were left out, the words stayed",
            "fake",
        )
        assert [(count.encoder, count.n_tokens) for count in result.tokens] == [("fake", 2)]
        assert {"load", "encode", "denoise", "decode", "total"} <= result.timings_s.keys()

    tell(guest_backend(), story)


def test_a_refused_job_fails_alone() -> None:
    async def story(backend: Backend) -> None:
        with pytest.raises(BadRequest, match="multiples of 16"):
            await backend.generate(drawing(width_px=40))
        assert (await backend.generate(drawing())).images

    tell(guest_backend(), story)


def test_a_cancelled_job_stops_between_two_steps_and_its_model_stays() -> None:
    async def story(backend: Backend) -> None:
        asked = drawing("endless", steps=100_000)
        task = await begin(backend, asked)
        await backend.cancel(asked.job_id)
        with pytest.raises(JobCancelled):
            await task
        result = await backend.generate(drawing())
        assert result.timings_s["load"] < 0.1
        assert held(backend) == ["toy"]

    tell(guest_backend(), story)


def test_a_waiting_job_is_cancelled_while_another_is_drawn() -> None:
    async def story(backend: Backend) -> None:
        first, second = drawing("endless", steps=100_000), drawing()
        drawn = await begin(backend, first)
        waiting = asyncio.create_task(backend.generate(second))
        await asyncio.sleep(0)
        await backend.cancel(second.job_id)
        with pytest.raises(JobCancelled):
            await waiting
        assert not drawn.done()
        drawn.cancel()
        await asyncio.wait({drawn})

    tell(guest_backend(), story)


def test_previews_start_when_somebody_begins_to_look() -> None:
    async def story(backend: Backend) -> None:
        asked = drawing("endless", steps=100_000)
        looked = asyncio.Event()
        task = asyncio.create_task(backend.generate(asked, lambda step: looked.set() if step.preview else None))
        await asyncio.sleep(0)
        await backend.watch(asked.job_id, previews=True)
        await looked.wait()
        task.cancel()
        await asyncio.wait({task})

    tell(guest_backend(), story)


def test_a_job_that_kills_the_process_fails_and_the_next_is_drawn() -> None:
    async def story(backend: Backend) -> None:
        with pytest.raises(EngineDied, match="SIGKILL"):
            await backend.generate(drawing("die"))
        assert (await backend.generate(drawing())).images

    tell(guest_backend(), story)


def test_a_fault_of_the_library_fails_its_job_and_the_model_is_loaded_anew() -> None:
    async def story(backend: Backend) -> None:
        with pytest.raises(EngineFailed, match="fake 1 met a fault: RuntimeError: the library fell over"):
            await backend.generate(drawing("fault"))
        assert held(backend) == []
        assert (await backend.generate(drawing())).images

    tell(guest_backend(), story)


def test_without_memory_other_checkpoints_leave_and_the_job_begins_again() -> None:
    async def story(backend: Backend) -> None:
        await backend.load(drawing(checkpoint="a"))
        result = await backend.generate(drawing("short", checkpoint="b"))
        assert (result.rungs, held(backend)) == (("drop_idle_components",), ["b"])
        with pytest.raises(OutOfMemory, match="fake 1 has no memory left"):
            await backend.generate(drawing("starved", checkpoint="b"))

    tell(guest_backend(), story)


def test_what_was_used_longest_ago_leaves_to_make_room_and_what_is_pinned_stays() -> None:
    async def story(backend: Backend) -> None:
        for name in ("a", "b", "a"):
            await backend.load(drawing(checkpoint=name))
        await backend.load(drawing(checkpoint="c"))
        assert held(backend) == ["a", "c"]
        await backend.pin(("a",))
        await backend.load(drawing(checkpoint="d"))
        assert held(backend) == ["a", "d"]

    tell(guest_backend("open_narrow"), story)


def test_weights_above_the_limit_of_a_person_are_refused_with_a_way_out() -> None:
    async def story(backend: Backend) -> None:
        with pytest.raises(OutOfMemory, match="SD_MEMORY_LIMIT") as refused:
            await backend.generate(drawing())
        assert "SD_WEIGHTS=int8" in refused.value.hint

    tell(guest_backend(options=EngineOptions(memory_limit_bytes=CHECKPOINT_BYTES - 1)), story)


def test_under_memory_pressure_what_nobody_needs_leaves_after_a_job() -> None:
    async def story(backend: Backend) -> None:
        assert (await backend.generate(drawing())).images
        assert held(backend) == []

    tell(guest_backend("open_pressed"), story)
