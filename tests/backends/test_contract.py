"""What holds for every backend."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from sdfleet.backends.base import Backend
from sdfleet.backends.fake import FakeBackend
from sdfleet.backends.ollama_images import OllamaImages
from sdfleet.backends.pool import EnginePool
from sdfleet.domain import Drawing, ImageResult, JobId, Progress
from sdfleet.errors import BadRequest, EngineDied, InUse, JobCancelled
from tests.backends.bfl_server import BflServer
from tests.backends.drawings import drawing, endless, guest_backend, scripted_backend, scripted_pool
from tests.backends.ollama_server import OllamaServer
from tests.backends.services import bfl_backend
from tests.backends.stand_in import serving

Build = Callable[[], Backend]
HERE: dict[str, Build] = {"fake": FakeBackend, "local": scripted_backend, "pool": scripted_pool, "guest": guest_backend}
SERVICES = ("flux-api", "ollama")


@pytest.fixture(scope="module")
def bfl() -> Iterator[BflServer]:
    with serving(BflServer()) as server:
        yield server


@pytest.fixture(scope="module")
def ollama() -> Iterator[OllamaServer]:
    with serving(OllamaServer(models={name: ["image"] for name in ("toy", "a", "b")})) as server:
        yield server


def _built(name: str, request: pytest.FixtureRequest, folder: Path) -> Build:
    if name in HERE:
        return HERE[name]
    if name == "ollama":
        url = request.getfixturevalue("ollama").url
        return lambda: OllamaImages(url)
    server = request.getfixturevalue("bfl")
    return lambda: bfl_backend(server, folder)


@pytest.fixture(params=[*HERE, *SERVICES])
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Build:
    return _built(request.param, request, tmp_path)


@pytest.fixture(params=HERE)
def holder(request: pytest.FixtureRequest) -> Build:
    """Those that hold checkpoints in memory of this machine; a service says nothing of its own."""
    return HERE[request.param]


def tell(build: Build, story: Callable[[Backend], Awaitable[None]]) -> None:
    """Run one story with a backend of its own; nothing may be left when it is closed."""

    async def told() -> None:
        backend = build()
        try:
            async with asyncio.timeout(60):
                if isinstance(backend, EnginePool):
                    await backend.start()  # so that its small engines stand, and jobs are split
                await story(backend)
        finally:
            await backend.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(told())


async def begin(backend: Backend, asked: Drawing) -> asyncio.Task[ImageResult]:
    """The job's task, once its first step was reported."""
    begun = asyncio.Event()
    task = asyncio.create_task(backend.generate(asked, lambda _: begun.set()))
    await begun.wait()
    return task


def pixels(result: ImageResult) -> list[bytes]:
    return [image.picture.data for image in result.images]


def test_pictures_come_back_in_order_with_their_seeds(build: Build) -> None:
    async def story(backend: Backend) -> None:
        asked = drawing(seed=41, n_images=3)
        result = await backend.generate(asked)
        assert [image.seed for image in result.images] == [41, 42, 43]
        assert len(set(pixels(result))) == 3
        assert (result.job_id, result.drawing, result.model) == (asked.job_id, asked, asked.checkpoint)
        assert {(i.picture.width_px, i.picture.height_px) for i in result.images} == {(32, 16)}

    tell(build, story)


def test_the_same_drawing_gives_the_same_pixels(build: Build) -> None:
    async def story(backend: Backend) -> None:
        first, again, other = [await backend.generate(drawing(seed=seed)) for seed in (5, 5, 6)]
        assert pixels(first) == pixels(again) != pixels(other)

    tell(build, story)


def test_a_picture_is_brought_to_the_size_asked_for(build: Build) -> None:
    async def story(backend: Backend) -> None:
        result = await backend.generate(drawing(resize_to=(48, 24)))
        assert (result.images[0].picture.width_px, result.images[0].picture.height_px) == (48, 24)

    tell(build, story)


@pytest.mark.parametrize("looks", [True, False])
def test_progress_tells_the_first_and_the_last_step_of_every_picture_and_each_one_with_a_preview(
    build: Build,
    looks: bool,  # noqa: FBT001
) -> None:
    async def story(backend: Backend) -> None:
        seen: list[Progress] = []
        asked = drawing(steps=5, n_images=2, wants_previews=looks)
        await backend.generate(asked, seen.append)
        assert {(each.job_id, each.n_steps) for each in seen} == {(asked.job_id, 5)}
        for index in range(2):
            steps = [each.step for each in seen if each.image_index == index]
            assert steps == sorted(set(steps))
            assert {1, 5} <= set(steps)
            assert steps == [1, 2, 3, 4, 5] or not (looks and backend.capabilities().has_previews)

    tell(build, story)


@pytest.mark.parametrize("wants", [True, False])
def test_previews_come_only_when_they_are_wanted(build: Build, wants: bool) -> None:  # noqa: FBT001
    async def story(backend: Backend) -> None:
        seen: list[Progress] = []
        await backend.generate(drawing(wants_previews=wants), seen.append)
        assert {each.preview is not None for each in seen} == {wants and backend.capabilities().has_previews}

    tell(build, story)


def test_many_jobs_run_at_once_and_none_gets_the_picture_of_another(build: Build) -> None:
    async def story(backend: Backend) -> None:
        asked = [drawing(seed=100 * i, n_images=1 + i % 3) for i in range(20)]
        results = await asyncio.gather(*map(backend.generate, asked))
        for each, result in zip(asked, results, strict=True):
            assert [image.seed for image in result.images] == [each.seed + i for i in range(each.n_images)]
        assert backend.capabilities().n_running == 0

    tell(build, story)


def test_a_cancelled_job_raises_and_its_neighbour_goes_on(build: Build) -> None:
    async def story(backend: Backend) -> None:
        asked = endless()
        task = await begin(backend, asked)
        neighbour = asyncio.create_task(backend.generate(drawing(n_images=2)))
        await backend.cancel(asked.job_id)
        with pytest.raises(JobCancelled):
            await task
        assert len((await neighbour).images) == 2

    tell(build, story)


def test_cancelling_an_unknown_job_is_not_an_error(build: Build) -> None:
    async def story(backend: Backend) -> None:
        await backend.cancel(JobId("nobody"))
        assert (await backend.generate(drawing())).images

    tell(build, story)


def test_a_caller_that_leaves_stops_its_job_which_may_be_asked_for_again(build: Build) -> None:
    async def story(backend: Backend) -> None:
        asked = endless()
        task = await begin(backend, asked)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert backend.capabilities().n_running == 0
        result = await backend.generate(drawing(job_id=asked.job_id))
        assert result.job_id == asked.job_id

    tell(build, story)


def test_a_fault_in_a_progress_callback_ends_that_job_only(build: Build) -> None:
    async def story(backend: Backend) -> None:
        def fail(_: Progress) -> None:
            raise ZeroDivisionError

        neighbour = asyncio.create_task(backend.generate(drawing(n_images=2)))
        with pytest.raises(ZeroDivisionError):
            await backend.generate(endless(), fail)
        assert len((await neighbour).images) == 2

    tell(build, story)


def test_a_job_id_in_use_is_refused(build: Build) -> None:
    async def story(backend: Backend) -> None:
        asked = endless()
        task = await begin(backend, asked)
        with pytest.raises(BadRequest, match="already"):
            await backend.generate(asked)
        await backend.cancel(asked.job_id)
        await asyncio.wait({task})
        assert isinstance(task.exception(), JobCancelled)

    tell(build, story)


def test_closing_fails_running_jobs_and_later_ones(build: Build) -> None:
    async def story(backend: Backend) -> None:
        task = await begin(backend, endless())
        await backend.close()
        await backend.close()
        with pytest.raises(EngineDied, match="closed"):
            await task
        with pytest.raises(EngineDied, match="closed"):
            await backend.generate(drawing())
        assert backend.capabilities().state == "closed"

    tell(build, story)


def test_capabilities_say_how_it_stands(build: Build) -> None:
    async def story(backend: Backend) -> None:
        assert backend.capabilities().state in {"idle", "ready"}
        task = await begin(backend, endless())
        now = backend.capabilities()
        assert (now.state, now.reason, now.n_running, now.n_waiting) == ("ready", "", 1, 0)
        assert now.tasks[:2] == ("txt2img", "img2img")
        assert "device" in now.facts
        task.cancel()
        await asyncio.wait({task})

    tell(build, story)


def held(backend: Backend) -> object:
    """The checkpoints on its device."""
    return backend.capabilities().facts.get("checkpoints", [])


def test_loading_brings_a_checkpoint_and_draws_nothing(holder: Build) -> None:
    async def story(backend: Backend) -> None:
        seen: list[Progress] = []
        await backend.load(drawing(checkpoint="a"))
        assert (held(backend), seen) == (["a"], [])
        assert backend.capabilities().n_running == 0

    tell(holder, story)


def test_what_is_unloaded_has_left_when_the_call_returns_and_comes_back_when_it_is_asked_for(holder: Build) -> None:
    async def story(backend: Backend) -> None:
        for name in ("a", "b"):
            await backend.load(drawing(checkpoint=name))
        await backend.unload("a")
        assert held(backend) == ["b"]
        await backend.unload("b")
        assert held(backend) == []
        assert (await backend.generate(drawing(checkpoint="a"))).images
        assert held(backend) == ["a"]

    tell(holder, story)


def test_unloading_what_is_not_there_is_not_an_error(holder: Build) -> None:
    async def story(backend: Backend) -> None:
        await backend.unload("nothing")
        assert (await backend.generate(drawing())).images
        await backend.unload("nothing")
        assert held(backend) == ["toy"]

    tell(holder, story)


def test_a_checkpoint_is_not_taken_away_from_a_job(holder: Build) -> None:
    async def story(backend: Backend) -> None:
        asked = endless(checkpoint="a")
        task = await begin(backend, asked)
        with pytest.raises(InUse, match="1 job") as refused:
            await backend.unload("a")
        assert "wait until they have ended" in refused.value.hint
        await backend.unload("b")
        await backend.cancel(asked.job_id)
        await asyncio.wait({task})
        await backend.unload("a")
        assert held(backend) == []

    tell(holder, story)


def test_unloading_when_a_caller_has_left_does_not_wait_for_anything_else(build: Build) -> None:
    async def story(backend: Backend) -> None:
        task = await begin(backend, endless(checkpoint="a"))
        task.cancel()
        await asyncio.wait({task})
        await backend.unload("a")
        assert held(backend) == []

    tell(build, story)


def test_what_is_pinned_is_known_to_the_engine_also_after_it_was_started_again(holder: Build) -> None:
    async def story(backend: Backend) -> None:
        await backend.load(drawing(checkpoint="a"))
        await backend.pin(("a", "b"))
        await backend.unload("a")
        await backend.load(drawing(checkpoint="b"))
        assert backend.capabilities().facts["pinned"] == ["a", "b"]
        await backend.pin(())
        assert (await backend.generate(drawing())).images
        assert backend.capabilities().facts["pinned"] == []

    tell(holder, story)


def test_jobs_that_come_while_the_last_checkpoint_leaves_are_drawn(holder: Build) -> None:
    async def story(backend: Backend) -> None:
        await backend.load(drawing(checkpoint="a"))
        leaving = asyncio.create_task(backend.unload("a"))
        results = [await backend.generate(drawing(checkpoint="b")) for _ in range(20)]
        await leaving
        assert [len(result.images) for result in results] == [1] * 20
        assert not any("drawn again" in text for result in results for text in result.warnings)

    tell(holder, story)


def test_fake_pictures_say_that_they_are() -> None:
    async def story(backend: Backend) -> None:
        assert not backend.capabilities().is_real
        assert "made up" in (await backend.generate(drawing())).warnings[0]

    tell(FakeBackend, story)


def test_fake_faults_follow_their_script() -> None:
    async def story(backend: Backend) -> None:
        assert (await backend.generate(drawing())).images
        with pytest.raises(EngineDied, match="scripted"):
            await backend.generate(drawing())
        assert (await backend.generate(drawing())).images

    tell(lambda: FakeBackend(script=[None, EngineDied("scripted")]), story)


def test_a_fake_job_can_be_held_before_a_step() -> None:
    async def story(_: Backend) -> None:
        may_go_on = asyncio.Event()

        async def hold(_: Drawing, step: int) -> None:
            if step == 2:
                await may_go_on.wait()

        backend = FakeBackend(before_step=hold)
        held, cancelled = drawing(), drawing()
        tasks = [await begin(backend, held), await begin(backend, cancelled)]
        await backend.cancel(cancelled.job_id)
        with pytest.raises(JobCancelled):
            await tasks[1]
        may_go_on.set()
        assert (await tasks[0]).images

    tell(FakeBackend, story)
