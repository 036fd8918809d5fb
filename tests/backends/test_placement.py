"""Which engines draw a job, decided from injected times."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfleet.backends.placement import Load, Trial, lone_job, shares


def trial(**changes: Any) -> Trial:
    """Two small engines that need 0.5 s for eight pictures, where the wide one needs 0.8 s."""
    times: dict[str, Any] = {"wide_one_s": 0.3, "wide_many_s": 0.8, "small_one_s": 0.35, "small_many_s": 0.5} | changes
    return Trial(n_many=8, n_engines=2, n_steps=10, **times)


@pytest.mark.parametrize(("small_many_s", "is_spread"), [(0.5, True), (0.61, True), (0.62, False), (1.6, False)])
def test_jobs_are_spread_only_where_that_gains_three_tenths(small_many_s: float, *, is_spread: bool) -> None:
    assert trial(small_many_s=small_many_s).is_spread is is_spread


def test_one_picture_alone_goes_where_one_picture_was_faster() -> None:
    assert lone_job(trial(), n_images=1, n_small=2) == "wide"
    assert lone_job(trial(small_one_s=0.2), n_images=1, n_small=2) == "small"


def test_a_lone_job_is_split_when_its_pictures_are_finished_earlier_so() -> None:
    slow_alone = trial(small_one_s=0.45)
    assert lone_job(slow_alone, n_images=2, n_small=2) == "wide"  # 0.37 s, or 0.45 s on two engines
    assert lone_job(slow_alone, n_images=4, n_small=2) == "small"  # 0.51 s, or 0.47 s


def test_without_a_trial_a_lone_job_is_split_when_every_engine_gets_a_picture() -> None:
    assert [lone_job(None, n_images=n, n_small=2) for n in (1, 2, 3)] == ["wide", "small", "small"]


def test_a_picture_goes_to_the_engine_that_is_free_first() -> None:
    busy, idle = Load(work_s=1.0, each_s=0.1), Load(work_s=0.0, each_s=0.1)
    assert shares([busy, idle], n_images=1) == (0, 1)
    assert shares([busy, idle], n_images=5) == (0, 5)
    assert shares([busy, idle], n_images=14) == (2, 12)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(1, 64))
def test_every_picture_is_given_to_somebody_once(work_s: list[float], n_images: int) -> None:
    given_out = shares([Load(work_s=each_s, each_s=0.1) for each_s in work_s], n_images=n_images)
    assert len(given_out) == len(work_s)
    assert sum(given_out) == n_images


def test_work_left_counts_shared_steps_once() -> None:
    known = trial()  # a step of k pictures takes 0.03 + 0.005 * k seconds on a small engine
    assert known.work_s([]) == 0.0
    assert known.work_s([10]) == pytest.approx(0.35)
    assert known.work_s([10, 10]) == pytest.approx(0.40)


def test_times_that_make_no_sense_never_predict_less_than_nothing() -> None:
    odd = trial(small_one_s=0.9, wide_one_s=2.0)
    assert odd.small_s(8) == 0.9
    assert odd.wide_s(8) == 2.0
    assert odd.work_s([5, 5]) == pytest.approx(0.45)
