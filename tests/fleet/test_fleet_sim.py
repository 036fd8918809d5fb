"""The simulation's goals at a small size: the same seeds, the same code as the benchmark."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.fleet_sim import (
    Curveless,
    HerdImage,
    LeastQueue,
    Ours,
    Outcome,
    Pull,
    Serial,
    World,
    cost_of_decisions,
    measured,
)

WORLD = World(load=0.6, n_jobs=800)


def ratios(ours: Outcome, theirs: Outcome) -> tuple[float, float]:
    return ours.mean_s / theirs.mean_s, ours.percentile_s(95) / theirs.percentile_s(95)


def test_jobs_are_done_sooner_than_by_a_static_score_and_by_the_least_queue() -> None:
    ours = measured(Ours, WORLD, n_seeds=2)
    image = measured(HerdImage, WORLD, n_seeds=2)
    for theirs in (image, measured(LeastQueue, WORLD, n_seeds=2)):
        mean, p95 = ratios(ours, theirs)
        assert mean <= 0.65
        assert p95 <= 0.5
    assert ours.loads_per_job <= 0.45 * image.loads_per_job


def test_a_nearly_full_fleet_stays_stable_where_a_static_score_does_not() -> None:
    full = replace(WORLD, load=0.85)
    ours = measured(Ours, full, n_seeds=2)
    mean, _ = ratios(ours, measured(HerdImage, full, n_seeds=2))
    assert mean <= 0.3  # with so few jobs the other's queues have not grown far yet
    mean, _ = ratios(ours, measured(Pull, full, n_seeds=2))
    assert mean <= 1.15


def test_knowing_how_a_step_grows_with_its_pictures_pays() -> None:
    gains = replace(WORLD, n_jobs=400, capacity=4, shared=0.7)
    ours = measured(Ours, gains, n_seeds=2)
    assert ours.mean_s < 0.98 * measured(Serial, gains, n_seeds=2).mean_s
    gains_little = replace(WORLD, n_jobs=400, capacity=4, shared=0.2)
    ours = measured(Ours, gains_little, n_seeds=2)
    assert ours.mean_s < 0.98 * measured(Curveless, gains_little, n_seeds=2).mean_s


def test_a_decision_costs_about_the_same_in_a_hundred_times_larger_fleet() -> None:
    few = cost_of_decisions(20, 100_000, 100).percentile_s(50)
    many = cost_of_decisions(2000, 100_000, 100).percentile_s(50)
    assert many < 10 * few
