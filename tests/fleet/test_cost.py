"""Predictions: learnt by pair, guessed from device and model, and the steps that several pictures share."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfleet.fleet.cost import Curve, Predictor, Share, ends_s
from sdfleet.fleet.state import DeviceId

A, B = DeviceId("a"), DeviceId("b")


def learn(predictor: Predictor, device: DeviceId, model: str, *, spent_s: float, n: int = 20) -> None:
    for _ in range(n):
        predictor.learn(device, model, units=10.0, n_pictures=1, spent_s=spent_s)


def test_before_any_job_a_device_is_as_fast_as_its_benchmark_says() -> None:
    predictor = Predictor()
    predictor.seed(A, speed=1.0)
    predictor.seed(B, speed=5.0)
    assert predictor.unit_s(A, "x") / predictor.unit_s(B, "x") == pytest.approx(5.0)


def test_after_a_few_jobs_a_prediction_is_what_the_jobs_took() -> None:
    predictor = Predictor()
    learn(predictor, A, "x", spent_s=30.0, n=3)
    assert predictor.draw_s(A, "x", units=10.0) == pytest.approx(30.0)


def test_a_changed_speed_is_learnt_within_ten_jobs() -> None:
    predictor = Predictor()
    learn(predictor, A, "x", spent_s=30.0)
    learn(predictor, A, "x", spent_s=60.0, n=10)
    assert predictor.draw_s(A, "x", units=10.0) == pytest.approx(60.0, rel=0.1)


def test_a_model_never_run_on_a_device_is_known_from_others() -> None:
    predictor = Predictor()
    for _ in range(20):
        learn(predictor, A, "light", spent_s=10.0, n=1)
        learn(predictor, A, "heavy", spent_s=40.0, n=1)
        learn(predictor, B, "light", spent_s=2.0, n=1)
    assert predictor.draw_s(B, "heavy", units=10.0) == pytest.approx(8.0, rel=0.15)


def test_a_benchmark_is_not_believed_against_jobs() -> None:
    predictor = Predictor()
    predictor.seed(A, speed=1.0)
    learn(predictor, A, "x", spent_s=30.0)
    before = predictor.speed(A)
    predictor.seed(A, speed=100.0)
    assert predictor.speed(A) == before


def test_nothing_is_learnt_from_a_job_without_time_or_work() -> None:
    predictor = Predictor()
    learn(predictor, A, "x", spent_s=30.0)
    for spent_s in (0.0, -1.0, float("nan"), float("inf")):
        predictor.learn(A, "x", units=10.0, n_pictures=1, spent_s=spent_s)
    assert predictor.draw_s(A, "x", units=10.0) == pytest.approx(30.0)


def test_a_first_picture_after_a_load_makes_no_device_look_slow() -> None:
    predictor = Predictor()
    learn(predictor, A, "x", spent_s=3.0)
    predictor.learn(B, "x", units=10.0, n_pictures=1, spent_s=30.0, is_cold=True)
    assert predictor.draw_s(B, "x", units=10.0) < 6.0
    predictor.learn(A, "x", units=10.0, n_pictures=1, spent_s=30.0, is_cold=True)
    assert predictor.draw_s(A, "x", units=10.0) == pytest.approx(3.0)


def test_a_device_that_loads_for_every_picture_is_known_by_those() -> None:
    predictor = Predictor()
    for _ in range(6):
        predictor.learn(A, "x", units=10.0, n_pictures=1, spent_s=30.0, is_cold=True)
    assert predictor.draw_s(A, "x", units=10.0) == pytest.approx(30.0)


def test_neighbours_do_not_make_a_device_look_slow() -> None:
    predictor = Predictor()
    predictor.note_curve(A, "x", {1: 0.2, 2: 0.3})
    for _ in range(10):
        predictor.learn(A, "x", units=10.0, n_pictures=1, spent_s=15.0, mean_pictures=2.0)
    assert predictor.draw_s(A, "x", units=10.0) == pytest.approx(10.0)


def test_a_load_not_seen_yet_goes_by_its_bytes_and_the_devices_disk() -> None:
    predictor = Predictor()
    predictor.learn_load(A, "x", n_bytes=10**9, spent_s=4.0)
    assert predictor.load_s(A, "y", n_bytes=3 * 10**9) == pytest.approx(12.0)
    assert predictor.load_s(B, "y", n_bytes=10**9) == pytest.approx(2.0)


def test_the_error_of_predictions_is_about_the_spread_of_jobs() -> None:
    rng, predictor = random.Random(0), Predictor()
    for _ in range(400):
        predictor.learn(A, "x", units=10.0, n_pictures=1, spent_s=30 * rng.lognormvariate(0, 0.25))
    error = predictor.error(A)
    assert error is not None
    assert 0.12 < error < 0.4
    assert predictor.error(B) is None


def test_what_was_learnt_survives_a_restart() -> None:
    predictor = Predictor()
    learn(predictor, A, "x", spent_s=30.0)
    predictor.learn_load(A, "x", n_bytes=10**9, spent_s=4.0)
    predictor.note_curve(A, "x", {1: 0.2, 2: 0.3})
    again = Predictor.from_json(json.loads(json.dumps(predictor.to_json())))
    assert again.to_json() == predictor.to_json()
    assert again.draw_s(A, "x", units=7.0, n_pictures=2) == predictor.draw_s(A, "x", units=7.0, n_pictures=2)


def test_data_of_another_version_is_left_out() -> None:
    assert Predictor.from_json({"v": 99}).to_json() == Predictor().to_json()


def test_a_forgotten_device_leaves_nothing() -> None:
    predictor = Predictor()
    learn(predictor, A, "x", spent_s=30.0)
    predictor.learn_load(A, "x", n_bytes=10**9, spent_s=4.0)
    predictor.forget_device(A)
    told = predictor.to_json()
    assert [told[key] for key in ("slowness", "pairs", "loads", "load_bytes_per_s", "curves")] == [[]] * 5


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 4), st.sampled_from("xy")), min_size=1, max_size=8),
    st.floats(0, 0.95),
)
def test_a_device_that_shares_steps_is_never_slower_than_one_that_takes_turns(
    jobs: list[tuple[float, int, str]], shared: float
) -> None:
    ends = ends_s([Share(left_s, n, kind, Curve(shared=shared)) for left_s, n, kind in jobs])
    assert max(ends) <= sum(left_s * n for left_s, n, _ in jobs) * (1 + 1e-9)
    assert all(end >= left_s * (1 - 1e-9) for end, (left_s, _, _) in zip(ends, jobs, strict=True))


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8), st.floats(0, 0.95))
def test_a_newcomer_never_makes_others_faster(lefts_s: list[float], shared: float) -> None:
    shares = [Share(left_s, 1, "x", Curve(shared=shared)) for left_s in lefts_s]
    after = ends_s([*shares, Share(10.0, 1, "x", Curve(shared=shared))])
    assert all(new >= old * (1 - 1e-9) for old, new in zip(ends_s(shares), after, strict=False))


@given(st.floats(0.01, 10), st.floats(0.001, 10))
def test_a_fitted_curve_gives_back_its_line(base_s: float, each_s: float) -> None:
    curve = Curve.fit({k: base_s + each_s * k for k in (1, 2, 4, 8)})
    expected = min(base_s / (base_s + each_s), 0.97)
    assert curve.shared == pytest.approx(expected, abs=1e-4)
