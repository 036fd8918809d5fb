"""The plan of a pull says memory and time, found by a process of its own; and never keeps anybody waiting for long."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sdfleet.api.forecasts import Forecasts
from sdfleet.engine.forecast import Question

SMALL = Question(
    architecture="sd15", family="sd", width_px=64, height_px=64, steps=4, guidance=5.0, sampler="euler", device="cpu",
    dtype="float32", n_threads=1, budget_s=60.0,
)  # fmt: skip


@pytest.mark.slow
def test_who_asks_too_soon_gets_nothing_and_the_next_gets_the_answer() -> None:
    async def asked() -> None:
        # No claim about speed: on a machine with much else to do the process alone may take minutes.
        forecasts = Forecasts(longest_s=900)
        assert await forecasts.find(SMALL, wait_s=0) is None
        found = await forecasts.find(SMALL, wait_s=900)
        assert found is not None
        assert {(need["mode"], need["fits"]) for need in found["memory"]} == {("fast", True), ("eco", True)}
        assert found["time"]["picture_s"] > 0
        # Kept, however much may be measured by then.
        assert await forecasts.find(replace(SMALL, budget_s=0.0), wait_s=0) is found

    asyncio.run(asked())


def test_a_process_that_takes_too_long_is_ended() -> None:
    async def asked() -> None:
        assert await Forecasts(longest_s=0.01).find(SMALL, wait_s=60) is None

    asyncio.run(asked())


def test_a_question_that_cannot_be_answered_has_no_answer() -> None:
    async def asked() -> None:
        assert await Forecasts().find(replace(SMALL, architecture="unheard-of"), wait_s=60) is None

    asyncio.run(asked())
