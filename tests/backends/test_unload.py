"""The end of an engine's process that has nothing loaded any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import psutil
import pytest

from sdfleet.backends.local import LocalBackend
from sdfleet.errors import InUse
from tests.backends.drawings import drawing, endless, scripted_backend, scripted_pool


def tell(story: Callable[[LocalBackend], Awaitable[None]], backend: Callable[[], LocalBackend]) -> None:
    async def told() -> None:
        made = backend()
        try:
            async with asyncio.timeout(60):
                await story(made)
        finally:
            await made.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(told())


def test_the_process_ends_when_its_last_checkpoint_leaves_and_a_job_starts_another() -> None:
    async def story(backend: LocalBackend) -> None:
        for name in ("a", "b"):
            await backend.load(drawing(checkpoint=name))
        pid = backend.pid
        assert pid is not None
        await backend.unload("a")
        assert backend.pid == pid
        await backend.unload("b")
        assert not psutil.pid_exists(pid)
        assert backend.capabilities().state == "idle"
        result = await backend.generate(drawing())
        assert (len(result.images), result.warnings) == (1, ("scripted",))
        assert backend.pid not in {None, pid}

    tell(story, scripted_backend)


def test_a_process_that_does_not_end_by_itself_is_ended() -> None:
    async def story(backend: LocalBackend) -> None:
        await backend.load(drawing(checkpoint="a"))
        pid = backend.pid or 0
        await backend.unload("a")
        assert not psutil.pid_exists(pid)

    tell(story, lambda: scripted_backend("LingeringEngine", close_deadline_s=0.1))


def test_a_process_with_another_job_stays() -> None:
    async def story(backend: LocalBackend) -> None:
        begun = asyncio.Event()
        job = endless(checkpoint="b")
        task = asyncio.create_task(backend.generate(job, lambda _: begun.set()))
        await begun.wait()
        await backend.load(drawing(checkpoint="a"))
        pid = backend.pid
        await backend.unload("a")
        assert backend.pid == pid
        with pytest.raises(InUse):
            await backend.unload("b")
        await backend.cancel(job.job_id)
        await asyncio.wait({task})

    tell(story, scripted_backend)


def test_a_process_that_dies_while_it_is_asked_has_nothing_loaded_any_more() -> None:
    async def story(backend: LocalBackend) -> None:
        await backend.load(drawing(checkpoint="a"))
        process = psutil.Process(backend.pid)
        process.suspend()
        asked = asyncio.create_task(backend.unload("a"))
        await asyncio.wait({asked}, timeout=0.05)
        process.kill()
        await asked
        assert (await backend.generate(drawing())).images

    tell(story, scripted_backend)


def test_a_pool_lets_all_its_engines_go_and_draws_again() -> None:
    async def told() -> None:
        made: list[LocalBackend] = []
        pool = scripted_pool(made=made)
        try:
            async with asyncio.timeout(60):
                await pool.start()
                await asyncio.gather(*(pool.generate(drawing(n_images=4, checkpoint="a")) for _ in range(3)))
                await pool.unload("a")
                assert pool.pids == ()
                assert len((await pool.generate(drawing(n_images=4, checkpoint="a"))).images) == 4
        finally:
            await pool.close()

    asyncio.run(told())


def test_a_checkpoint_that_leaves_while_the_small_engines_get_warm_with_it_does_not_come_back() -> None:
    async def told() -> None:
        pool = scripted_pool()
        try:
            async with asyncio.timeout(60):
                await pool.start()
                await pool.generate(drawing(checkpoint="a"))  # a lone picture, which the wide engine draws
                # A task can be looked for, not waited for.
                while not any(task.get_name() == "small engines get warm" for task in asyncio.all_tasks()):  # noqa: ASYNC110
                    await asyncio.sleep(0)
                await pool.unload("a")
                assert pool.pids == ()
        finally:
            await pool.close()

    asyncio.run(told())
