"""Who is next: fairness, priorities, aging and models, on made-up time."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sdfleet.domain import JobId, OwnerId
from sdfleet.jobs.queue import FairQueue, Waiting


def waiting(name: str, *, owner: str = "ann", arrived_s: float = 0.0, **more: Any) -> Waiting:
    return Waiting(job_id=JobId(name), owner=OwnerId(owner), arrived_s=arrived_s, **more)


def queue_of(*jobs: Waiting, **options: float) -> FairQueue:
    queue = FairQueue(**options)
    for job in jobs:
        queue.add(job)
    return queue


def taken(queue: FairQueue, *, at_s: list[float] | None = None, n: int | None = None) -> list[str]:
    """Who is taken at these moments (or `n` times at 0), each from an empty device."""
    times = at_s if at_s is not None else [0.0] * (len(queue) if n is None else n)
    found = [queue.next(now_s=now_s, room=1) for now_s in times]
    return [each.job_id for each in found if each is not None]


def test_one_owners_jobs_are_taken_in_the_order_of_arrival() -> None:
    queue = queue_of(*(waiting(str(i), arrived_s=i / 10) for i in range(5)))
    assert taken(queue, at_s=[1.0] * 5) == ["0", "1", "2", "3", "4"]


def test_a_flood_of_one_owner_delays_another_by_one_job() -> None:
    flood = [waiting(f"a{i}") for i in range(100)]
    queue = queue_of(*flood)
    assert taken(queue, n=10) == [f"a{i}" for i in range(10)]
    queue.add(waiting("b0", owner="bob"))
    queue.add(waiting("b1", owner="bob"))
    assert "b0" in taken(queue, n=2)
    assert "b1" in taken(queue, n=2)


def test_owners_share_the_device_by_what_their_jobs_cost() -> None:
    large = [waiting(f"a{i}", cost=10.0) for i in range(20)]
    small = [waiting(f"b{i}", owner="bob", cost=1.0) for i in range(200)]
    first = Counter(name[0] for name in taken(queue_of(*large, *small), n=110))
    assert first["b"] in range(98, 103)


def test_a_higher_priority_goes_first_among_owners_and_within_one() -> None:
    jobs = [waiting("low", priority=-1), waiting("mid"), waiting("high", owner="bob", priority=5)]
    assert taken(queue_of(*jobs)) == ["high", "mid", "low"]


def test_a_low_priority_is_reached_under_a_steady_stream_of_higher_ones() -> None:
    queue = queue_of(waiting("low", owner="bob", priority=-3), aging_s=30.0)
    for second in range(400):
        queue.add(waiting(f"a{second}", arrived_s=float(second), priority=3))
        chosen = queue.next(now_s=float(second), room=1)
        assert chosen is not None
        if chosen.job_id == "low":
            assert second <= 6 * 30 + 30
            return
    raise AssertionError("never reached")


def test_an_owners_own_low_priority_is_reached_too() -> None:
    queue = queue_of(waiting("low", priority=0), aging_s=30.0)
    for second in range(100):
        queue.add(waiting(f"a{second}", arrived_s=float(second), priority=1))
        chosen = queue.next(now_s=float(second), room=1)
        assert chosen is not None
        if chosen.job_id == "low":
            assert second <= 31
            return
    raise AssertionError("never reached")


def test_a_long_silence_earns_no_right_to_a_long_turn() -> None:
    queue = queue_of(*(waiting(f"a{i}") for i in range(50)), waiting("b", owner="bob"))
    taken(queue, n=40)
    for i in range(20):
        queue.add(waiting(f"c{i}", owner="bob"))
    next_ten = Counter(name[0] for name in taken(queue, n=10))
    assert next_ten["a"] >= 4


def test_jobs_of_the_model_on_the_device_go_first() -> None:
    jobs = [waiting(f"{i}{model}", arrived_s=i / 10, model=model) for i, model in enumerate("xyxyxy")]
    assert taken(queue_of(*jobs), at_s=[1.0] * 6) == ["0x", "2x", "4x", "1y", "3y", "5y"]


def test_another_model_waits_no_longer_than_the_patience() -> None:
    queue = queue_of(waiting("x", model="x"), waiting("y", owner="bob", model="y"), patience_s=30.0, aging_s=1000.0)
    assert taken(queue, n=1) == ["x"]
    changes: list[tuple[int, str]] = []
    for second in range(200):
        for owner, model in (("ann", "x"), ("bob", "y")):
            queue.add(waiting(f"{model}{second}", owner=owner, arrived_s=float(second), model=model))
        chosen = queue.next(now_s=float(second), room=1)
        assert chosen is not None
        if not changes or changes[-1][1] != chosen.model:
            changes.append((second, chosen.model))
    # 30 s from when its turn came; and its turn comes when the other owner has had as much of the device.
    assert [model for _, model in changes] == ["x", "y", "x", "y"]
    assert all(30 <= later - sooner <= 62 for (sooner, _), (later, _) in itertools.pairwise(changes))


def test_an_urgent_job_of_another_model_does_not_wait_for_the_group() -> None:
    queue = queue_of(waiting("x0", model="x"), waiting("x1", model="x"))
    assert taken(queue, n=1) == ["x0"]
    queue.add(waiting("y", owner="bob", model="y", priority=1))
    assert taken(queue, n=1) == ["y"]


def test_another_model_comes_to_an_empty_device_only() -> None:
    queue = queue_of(waiting("x", model="x"), waiting("y", model="y", arrived_s=1.0))
    assert taken(queue, n=1) == ["x"]
    assert queue.next(now_s=1.0, room=31, n_running=1) is None
    chosen = queue.next(now_s=1.0, room=32, n_running=0)
    assert chosen is not None
    assert chosen.job_id == "y"


def test_a_large_job_is_not_passed_by_small_ones() -> None:
    queue = queue_of(waiting("large", n_pictures=40), waiting("small", arrived_s=1.0))
    assert queue.next(now_s=1.0, room=10, n_running=22) is None
    chosen = queue.next(now_s=1.0, room=32, n_running=0)
    assert chosen is not None
    assert chosen.job_id == "large"


def test_jobs_of_a_service_neither_wait_for_the_device_nor_stand_in_its_way() -> None:
    queue = queue_of(
        waiting("away", model="pro", service="flux-api"),
        waiting("also-away", model="pro", service="flux-api"),
        waiting("here", model="sd"),
        waiting("here-too", model="sd"),
    )
    assert [each.job_id for _ in range(2) if (each := queue.next(now_s=0.0, room=9, n_running=0))] == [
        "here",
        "here-too",
    ]
    assert queue.next(now_s=0.0, room=9) is None
    first = queue.next_for_service(now_s=0.0, room=lambda _: True)
    assert first is not None
    assert first.job_id == "away"
    assert queue.next_for_service(now_s=0.0, room=lambda _: False) is None
    queue.add(waiting("last", model="sd"))
    last = queue.next(now_s=0.0, room=9, n_running=1)
    assert last is not None, "the model on the device is still sd"
    assert queue.order(0.0) == ["also-away"]


def test_late_jobs_are_given_back_and_wait_no_more() -> None:
    queue = queue_of(waiting("a", deadline_s=5.0), waiting("b", deadline_s=9.0), waiting("c"))
    assert queue.first_deadline_s() == 5.0
    assert [each.job_id for each in queue.late(5.0)] == ["a"]
    assert (len(queue), queue.first_deadline_s()) == (2, 9.0)


def test_a_job_waits_once_and_leaves_once() -> None:
    queue = queue_of(waiting("a"))
    assert not queue.add(waiting("a"))
    assert queue.remove(JobId("a")) is not None
    assert queue.remove(JobId("a")) is None
    assert queue.next(now_s=0.0, room=1) is None


owners = st.sampled_from(["ann", "bob", "cy"])
jobs_ = st.lists(
    st.builds(
        waiting,
        st.just("?"),
        owner=owners,
        arrived_s=st.floats(0, 100),
        priority=st.integers(-100, 100),
        model=st.sampled_from(["x", "y"]),
        n_pictures=st.integers(1, 64),
        cost=st.floats(0.01, 100),
    ),
    max_size=30,
)


def named(jobs: list[Waiting]) -> list[Waiting]:
    return [
        waiting(
            str(i), owner=each.owner, arrived_s=each.arrived_s, priority=each.priority, model=each.model,
            n_pictures=each.n_pictures, cost=each.cost,
        )
        for i, each in enumerate(jobs)
    ]  # fmt: skip


@given(jobs_)
def test_every_job_is_taken_once(jobs: list[Waiting]) -> None:
    queue = queue_of(*named(jobs))
    assert sorted(taken(queue)) == sorted(str(i) for i in range(len(jobs)))
    assert len(queue) == 0


@given(jobs_)
def test_the_order_told_is_the_order_taken_when_all_are_of_one_model(jobs: list[Waiting]) -> None:
    queue = queue_of(*(each for each in named(jobs) if each.model == "x"))
    told = queue.order(100.0)
    assert taken(queue, at_s=[100.0] * len(queue)) == told


@given(jobs_, st.lists(st.tuples(st.integers(0, 31), st.integers(0, 64)), max_size=60))
def test_the_device_never_holds_more_than_its_room_nor_two_models(
    jobs: list[Waiting], moves: list[tuple[int, int]]
) -> None:
    """Jobs end in any order while others come; whatever is begun fits beside what runs."""
    queue = queue_of(*named(jobs))
    running: list[Waiting] = []
    for n_ended, _ in moves:
        del running[: n_ended % (len(running) + 1)]
        busy = sum(each.n_pictures for each in running)
        chosen = queue.next(now_s=100.0, room=32 - busy, n_running=busy)
        if chosen is None:
            continue
        assert not running or busy + chosen.n_pictures <= 32
        running.append(chosen)
        assert len({each.model for each in running}) == 1


@given(st.integers(1, 100), st.integers(-100, 100), st.integers(1, 5))
def test_nobody_waits_for_ever_behind_a_flood_of_any_priority(n_flood: int, priority: int, n_pictures: int) -> None:
    """200 points of priority are made up in 200 aging times, whatever the flood."""
    queue = queue_of(waiting("b", owner="bob", priority=-100), aging_s=1.0)
    for second in range(1, 205):
        for i in range(n_flood if second % 50 == 1 else 1):
            queue.add(waiting(f"{second}-{i}", arrived_s=float(second), priority=priority, n_pictures=n_pictures))
        chosen = queue.next(now_s=float(second), room=1)
        if chosen is not None and chosen.job_id == "b":
            return
    raise AssertionError("starved")
