"""Which checkpoints stay, and when an idle one leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sdfleet.backends.fake import FakeBackend
from sdfleet.domain import Drawing
from sdfleet.errors import EngineFailed, InUse
from sdfleet.residents import Resident, Residents
from tests.backends.drawings import drawing

NOW_S = 1_000.0


class _Backend(FakeBackend):
    """The fake one, telling when something left."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.has_left = asyncio.Event()

    async def unload(self, checkpoint: str) -> None:
        await super().unload(checkpoint)
        self.has_left.set()


def tell(story: Callable[[Residents, _Backend], Awaitable[None]], *, keep_alive_s: float | None = None) -> None:
    async def told() -> None:
        backend = _Backend()
        residents = Residents(backend, keep_alive_s=keep_alive_s, clock=lambda: NOW_S)
        async with asyncio.timeout(30):
            await story(residents, backend)
            await residents.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(told())


def names(residents: Residents) -> list[str]:
    return [resident.checkpoint for resident in residents.here()]


def test_an_idle_checkpoint_leaves_after_its_keep_alive() -> None:
    async def story(residents: Residents, backend: _Backend) -> None:
        await residents.load(drawing(checkpoint="a"))
        await backend.has_left.wait()
        assert names(residents) == []

    tell(story, keep_alive_s=0.0)


def test_without_a_keep_alive_nothing_leaves_by_itself() -> None:
    async def story(residents: Residents, _: _Backend) -> None:
        await residents.load(drawing(checkpoint="a"))
        expected = Resident(checkpoint="a", n_bytes=0, n_jobs=0, is_pinned=False, expires_s=None)
        assert residents.here() == (expected,)

    tell(story)


def test_it_is_told_when_a_checkpoint_leaves() -> None:
    async def story(residents: Residents, _: _Backend) -> None:
        await residents.load(drawing(checkpoint="a"))
        (here,) = residents.here()
        assert here.expires_s == NOW_S + 60
        with residents.used("a"):
            (here,) = residents.here()
            assert (here.expires_s, here.n_jobs) == (None, 1)

    tell(story, keep_alive_s=60.0)


def test_a_checkpoint_in_use_stays_and_its_time_counts_from_the_last_job() -> None:
    async def story(residents: Residents, backend: _Backend) -> None:
        with residents.used("a"), residents.used("a"):
            await backend.load(drawing(checkpoint="a"))
            residents.keep("a", 0.0)
            with pytest.raises(InUse, match="toy is being drawn with by 2 jobs"):
                await residents.unload("a", name="toy")
            assert not backend.has_left.is_set()
        await backend.has_left.wait()
        assert names(residents) == []

    tell(story)


def test_a_keep_alive_of_its_own_holds_until_it_leaves() -> None:
    async def story(residents: Residents, backend: _Backend) -> None:
        await residents.load(drawing(checkpoint="a"))
        residents.keep("a", None)
        assert residents.here()[0].expires_s is None
        await residents.load(drawing(checkpoint="a"))
        assert residents.here()[0].expires_s is None
        await residents.unload("a", name="a")
        await residents.load(drawing(checkpoint="a"))
        assert residents.here()[0].expires_s == NOW_S + 60
        assert backend.has_left.is_set()

    tell(story, keep_alive_s=60.0)


def test_a_keep_alive_that_comes_with_a_job_does_not_let_the_checkpoint_go_under_it() -> None:
    async def story(residents: Residents, backend: _Backend) -> None:
        await residents.load(drawing(checkpoint="a"))
        residents.keep("a", 0.0, after_next_job=True)
        for _ in range(5):  # turns of the loop in which a time of 0 would run out
            await asyncio.sleep(0)
        assert names(residents) == ["a"]
        with residents.used("a"):
            assert not backend.has_left.is_set()
        await backend.has_left.wait()

    tell(story, keep_alive_s=60.0)


def test_what_is_pinned_stays_until_it_is_unpinned() -> None:
    async def story(residents: Residents, backend: _Backend) -> None:
        await residents.pin(drawing(checkpoint="a"))
        residents.keep("a", 0.0)
        await residents.load(drawing(checkpoint="a"))
        assert [(r.is_pinned, r.expires_s) for r in residents.here()] == [(True, None)]
        assert backend.capabilities().facts["pinned"] == ["a"]
        await residents.unpin("a")
        await backend.has_left.wait()
        assert (names(residents), backend.capabilities().facts["pinned"]) == ([], [])

    tell(story, keep_alive_s=60.0)


def test_what_was_loaded_of_other_files_is_loaded_anew() -> None:
    async def story(residents: Residents, backend: _Backend) -> None:
        await residents.renew("a", "files of yesterday")
        await residents.load(drawing(checkpoint="a"))
        await residents.renew("a", "files of yesterday")
        assert names(residents) == ["a"]
        with residents.used("a"):
            await residents.renew("a", "files of today")
            assert not backend.has_left.is_set()
        await residents.renew("a", "files of today")
        assert names(residents) == []

    tell(story)


def test_what_cannot_be_loaded_is_not_pinned() -> None:
    class Full(_Backend):
        async def load(self, drawing: Drawing) -> None:
            raise EngineFailed(f"no room for {drawing.checkpoint}")

    async def told() -> None:
        backend = Full()
        residents = Residents(backend)
        with pytest.raises(EngineFailed, match="no room for a"):
            await residents.pin(drawing(checkpoint="a"))
        assert backend.capabilities().facts["pinned"] == []

    asyncio.run(told())


def test_unloading_ends_a_pin() -> None:
    async def story(residents: Residents, backend: _Backend) -> None:
        await residents.pin(drawing(checkpoint="a"))
        await residents.unload("a", name="a")
        assert (names(residents), backend.capabilities().facts["pinned"]) == ([], [])

    tell(story)
