"""Who is silent too long, by a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from sdfleet.backends.watchdog import Patience, Watchdog

PATIENCE = Patience(first_s=3600.0, least_s=900.0, gaps=50.0, late_s=30.0)


class Clock:
    """An event loop's clock, moved by hand; one alarm at a time."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._due: tuple[float, Callable[[], object]] | None = None

    def time(self) -> float:
        return self.now_s

    def call_at(self, when: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        self._due = (when, callback)
        return cast("asyncio.TimerHandle", self)

    def cancel(self) -> None:
        self._due = None

    @property
    def is_armed(self) -> bool:
        return self._due is not None

    def pass_s(self, seconds: float, *, asleep: bool = False) -> None:
        """Time goes by, and alarms that fall into it ring; all of them only at its end, when everybody was asleep."""
        end_s = self.now_s + seconds
        while self._due is not None and self._due[0] <= end_s:
            when, callback = self._due
            self._due = None
            self.now_s = end_s if asleep else when
            callback()
        self.now_s = end_s


class Watched:
    """A watchdog, its clock, and the silences it found."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.found: list[float] = []
        self._dog = Watchdog(PATIENCE, self.found.append, clock=self.clock)

    def given(self, *, all_begun: bool = False) -> None:
        self._dog.note(is_report=False, has_jobs=True, all_begun=all_begun)

    def heard(self, *, has_jobs: bool = True, all_begun: bool = True) -> None:
        self._dog.note(is_report=True, has_jobs=has_jobs, all_begun=all_begun)

    def reports(self, n: int, *, every_s: float) -> None:
        for _ in range(n):
            self.clock.pass_s(every_s)
            self.heard()


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_job_may_take_an_hour_to_its_first_progress(watched: Watched) -> None:
    watched.given()
    watched.clock.pass_s(3599)
    assert watched.found == []
    watched.clock.pass_s(2)
    assert watched.found == [3600]


def test_a_step_may_take_a_quarter_of_an_hour(watched: Watched) -> None:
    watched.given()
    watched.reports(5, every_s=2)
    watched.clock.pass_s(899)
    assert watched.found == []
    watched.clock.pass_s(2)
    assert watched.found == [900]


def test_slow_steps_are_given_fifty_times_their_length(watched: Watched) -> None:
    watched.given()
    watched.reports(3, every_s=60)
    watched.clock.pass_s(50 * 60 - 1)
    assert watched.found == []
    watched.clock.pass_s(2)
    assert watched.found == [3000]


def test_the_load_of_a_checkpoint_is_no_step(watched: Watched) -> None:
    watched.given()
    watched.clock.pass_s(1800)
    watched.reports(5, every_s=1)
    watched.clock.pass_s(901)
    assert watched.found == [900]


def test_an_idle_engine_may_be_silent_for_ever(watched: Watched) -> None:
    """Whatever it tries, converts or compiles meanwhile."""
    watched.given()
    watched.reports(3, every_s=1)
    watched.heard(has_jobs=False)
    assert not watched.clock.is_armed
    watched.clock.pass_s(100_000)
    watched.given()
    watched.clock.pass_s(3599)
    assert watched.found == []


def test_others_may_wait_while_a_job_is_loaded(watched: Watched) -> None:
    watched.given()
    watched.reports(3, every_s=1)
    watched.given(all_begun=False)
    watched.clock.pass_s(3500)
    assert watched.found == []


def test_a_hung_engine_is_found_though_jobs_keep_coming(watched: Watched) -> None:
    watched.given()
    watched.reports(3, every_s=1)
    for _ in range(40):
        watched.clock.pass_s(100)
        watched.given(all_begun=False)
        if watched.found:
            break
    assert watched.found == [3600]


def test_a_night_asleep_is_no_silence(watched: Watched) -> None:
    watched.given()
    watched.reports(3, every_s=1)
    watched.clock.pass_s(30_000, asleep=True)
    assert watched.found == []
    watched.clock.pass_s(901)
    assert watched.found == [900]
