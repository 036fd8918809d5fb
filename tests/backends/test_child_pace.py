"""What the engine's process tells, and when it tries things out: not so much, or so early, that it costs the jobs."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from sdfleet.backends.local import LocalBackend
from sdfleet.domain import Progress
from tests.backends.drawings import drawing, scripted_backend
from tests.backends.test_local_faults import tell


def test_many_pictures_share_the_steps_that_are_told() -> None:
    """Sixteen pictures of 200 steps of a millisecond or more: 3200 steps in 0.2 s at the least."""
    told: dict[int, list[int]] = defaultdict(list)

    def hear(progress: Progress) -> None:
        told[progress.image_index].append(progress.step)

    async def story(backend: LocalBackend) -> None:
        await backend.start()
        begun_s = asyncio.get_running_loop().time()
        await backend.generate(drawing(n_images=16, steps=200), hear)
        spent_s = asyncio.get_running_loop().time() - begun_s
        # Fifty a second for all, and each picture's first and last.
        assert sum(map(len, told.values())) <= 50 * spent_s + 3 * 16 < 16 * 200
        assert {(steps[0], steps[-1]) for steps in told.values()} == {(1, 200)}
        assert len(told) == 16
        assert all(steps == sorted(steps) for steps in told.values())

    tell(story)


def test_steps_with_a_preview_are_all_told() -> None:
    async def story(backend: LocalBackend) -> None:
        seen: list[Progress] = []
        await backend.generate(drawing(n_images=4, steps=20, wants_previews=True), seen.append)
        with_preview = [progress for progress in seen if progress.preview is not None]
        assert len(with_preview) >= 4 * 19

    tell(story)


def test_nothing_is_tried_out_between_two_jobs_that_follow_each_other() -> None:
    async def story(backend: LocalBackend) -> None:
        for _ in range(5):
            await backend.generate(drawing())
        assert backend.capabilities().facts["n_tries"] == 0

    tell(story, scripted_backend("SettlingEngine"))
