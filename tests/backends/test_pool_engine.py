"""The pool over the real engine and a toy checkpoint: what a scripted engine cannot show."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdfleet.backends.pool import EnginePool
from sdfleet.domain import Drawing, ImageResult, JobId
from sdfleet.engine.events import EngineOptions
from tests.backends.test_contract import pixels
from tests.backends.test_local_engine import toy, toy_backend

Checkpoints = Callable[[str], Path]


async def by_both(asked: Drawing) -> tuple[ImageResult, ImageResult]:
    """The same job drawn by one engine, and by a pool of two small engines and a wide one."""
    one = toy_backend()
    pool = EnginePool(EngineOptions(device="cpu", dtype="float32", n_threads=2), n_engines=2)
    try:
        await asyncio.gather(one.start(), pool.start())
        return await one.generate(asked), await pool.generate(asked)
    finally:
        await asyncio.gather(one.close(), pool.close())


@pytest.mark.slow
def test_a_split_job_gives_the_pictures_of_an_unsplit_one(checkpoints: Checkpoints) -> None:
    asked = toy(checkpoints, "sd15", seed=11, steps=6, n_images=4)
    whole, split = asyncio.run(by_both(asked))
    assert [image.seed for image in split.images] == [11, 12, 13, 14]
    for one, other in zip(pixels(whole), pixels(split), strict=True):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1
    assert len(set(pixels(split))) == 4


@pytest.mark.slow
def test_a_reproducible_job_is_the_same_in_company_and_alone(checkpoints: Checkpoints) -> None:
    asked = toy(checkpoints, "sd15", seed=3, steps=6, n_images=3, reproducible=True)

    async def story() -> tuple[ImageResult, ImageResult]:
        pool = EnginePool(EngineOptions(device="cpu", dtype="float32", n_threads=2), n_engines=2)
        try:
            await pool.start()
            alone = await pool.generate(asked)
            company = [
                asyncio.create_task(pool.generate(toy(checkpoints, "sd15", steps=12, seed=i, n_images=2)))
                for i in range(4)
            ]
            await asyncio.sleep(0)
            again = await pool.generate(replace(asked, job_id=JobId("again")))
            await asyncio.gather(*company)
        finally:
            await pool.close()
        return alone, again

    alone, again = asyncio.run(story())
    assert pixels(alone) == pixels(again)


@pytest.mark.slow
def test_the_automatic_trial_ends_with_a_verdict_that_the_next_start_knows(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    asked = toy(checkpoints, "sd15", steps=6)
    options = EngineOptions(device="cpu", dtype="float32", n_threads=2, executor="torch")

    async def told(*, again: bool) -> Any:
        pool = EnginePool(options, notes_folder=tmp_path, pause_s=0.0)
        try:
            async with asyncio.timeout(240):
                for n in range(2):  # what the first one takes is mostly the load
                    await pool.generate(replace(asked, job_id=JobId(str(n))))
                while not (trials := pool.capabilities().facts.get("engine_trials")):  # noqa: ASYNC110  asked for, not told
                    await asyncio.sleep(0)
            assert again or len(pool.pids) == 3
        finally:
            await pool.close()
        return trials

    first = asyncio.run(told(again=False))
    assert len(list(tmp_path.iterdir())) == 1
    assert asyncio.run(told(again=True)) == first
