"""Placement on made-up time: who goes where, in which order, and that nobody is forgotten."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdfleet.domain import JobId
from sdfleet.fleet.state import Device, DeviceId, Limits, LoadedModel, NodeId, RunningJob
from sdfleet.fleet.walk import MAX_OVERTAKEN, MAX_PASSED, MAX_PASSED_PER_DEVICE
from tests.fleet.placing import ALWAYS_S, GIB, MODEL_BYTES, Fleet, device, job, pairs


def test_a_job_goes_to_the_device_that_finishes_it_first() -> None:
    fleet = Fleet(device("slow", loaded=("a",)), device("fast", loaded=("a",)), speeds={"fast": 4.0})
    assert pairs(fleet.add(job("j"))) == [("j", "fast")]


def test_a_warm_slow_device_is_better_than_loading_for_a_short_job() -> None:
    fleet = Fleet(device("warm", loaded=("a",)), device("cold"), speeds={"cold": 4.0})
    assert pairs(fleet.add(job("short", work_s=5.0))) == [("short", "warm")]


def test_a_long_job_is_worth_the_load_on_a_fast_device() -> None:
    fleet = Fleet(device("warm", loaded=("a",)), device("cold"), speeds={"cold": 4.0})
    assert pairs(fleet.add(job("long", work_s=100.0))) == [("long", "cold")]


def test_a_job_waits_for_a_fast_device_rather_than_take_an_idle_slow_one() -> None:
    fleet = Fleet(device("slow", loaded=("a",)), device("fast", loaded=("a",)), speeds={"fast": 8.0})
    assert pairs(fleet.add(job("1", work_s=40.0))) == [("1", "fast")]
    assert fleet.add(job("2", work_s=40.0)) == []
    assert pairs(fleet.next_end()) == [("2", "fast")]


def test_jobs_of_equal_cost_are_sent_in_the_order_given() -> None:
    fleet = Fleet(device("d", loaded=("a",)))
    fleet.add(*(job(str(n)) for n in range(5)))
    while fleet.ends:
        fleet.next_end()
    assert [one.job_id for one in fleet.sent] == ["0", "1", "2", "3", "4"]


def test_six_equal_jobs_on_two_equal_idle_nodes_finish_in_the_ideal_time() -> None:
    fleet = Fleet(device("x", loaded=("a",)), device("y", loaded=("a",)))
    fleet.add(*(job(str(n), work_s=10.0) for n in range(6)))
    while fleet.ends:
        fleet.next_end()
    assert len(fleet.sent) == 6
    assert fleet.now_s <= 1.1 * 30.0


def busy_for(name: str, left_s: float, *, as_of_s: float = 0.0, **more: Any) -> Device:
    """A device with model a that is done with its job in `left_s`, at speed 1."""
    running = RunningJob(
        job_id=JobId(f"on {name}"), model="a", megapixels=1.0, n_pictures=1, picture_units_left=left_s, as_of_s=as_of_s
    )
    return replace(device(name, loaded=("a",), **more), running=(running,))


def test_a_load_keeps_a_device_from_those_whose_model_is_there() -> None:
    def begin(model: str, n_others: int) -> list[tuple[str, str]]:
        fleet = Fleet(busy_for("busy", 20.0), device("idle", loaded=("b",)))
        return pairs(fleet.add(job("cold", "a"), *(job(f"o{n}", model, work_s=1.0) for n in range(n_others))))

    assert begin("b", 0) == [("cold", "idle")]
    assert ("cold", "idle") not in begin("b", 20)
    assert begin("a", 20) == [("cold", "idle")]


def test_no_device_stands_idle_while_many_wait_for_a_model_that_it_could_load() -> None:
    speeds = {"x": 8.0, "y": 4.0, "z": 1.0}
    fleet = Fleet(*(device(name, loaded=("a" if name == "x" else "b",)) for name in speeds), speeds=speeds)
    fleet.add(*(job(str(n)) for n in range(400)))
    while fleet.ends:
        fleet.next_end()
    assert fleet.now_s <= 1.1 * 400 * 10 / sum(speeds.values())


def test_where_many_wait_a_job_takes_an_idle_slower_device_and_is_slowed_by_so_much_at_most() -> None:
    def first_on_slow(speed: float, n_jobs: int, **more: Any) -> bool:
        fleet = Fleet(busy_for("fast", 8.0), device("slow", loaded=("a",)), speeds={"fast": 8.0, "slow": speed})
        return ("0", "slow") in pairs(fleet.add(*(job(str(n), **more if n else {}) for n in range(n_jobs))))

    # On the fast one it would be done in 1 + 1.25 s.
    assert not first_on_slow(2.0, 1)  # 5 s
    assert first_on_slow(2.0, 20)
    assert not first_on_slow(1.0, 20)  # 10 s, more than three times as long
    assert not first_on_slow(2.0, 20, priority=-1)  # an urgent one owes the others nothing


def test_a_job_that_has_waited_long_may_be_slowed_by_more() -> None:
    def begins(waited_s: float) -> list[tuple[str, str]]:
        fleet = Fleet(busy_for("fast", 8.0), device("slow", loaded=("a",)), speeds={"fast": 8.0, "slow": 1.0})
        fleet.now_s = waited_s
        fleet.waiting = [job(str(n)) for n in range(20)]
        fleet.came_s = {one.job_id: 0.0 for one in fleet.waiting}
        fleet.change(replace(fleet.devices[DeviceId("fast")], running=busy_for("fast", 8.0, as_of_s=waited_s).running))
        return [one for one in pairs(fleet.sent) if one[0] == "0"]

    assert begins(0.0) == []
    assert begins(10.0) == [("0", "slow")]  # 20 s in all, where it would have been 12.25


def test_a_job_that_an_idle_device_would_slow_too_much_is_told_what_it_waits_for() -> None:
    fleet = Fleet(busy_for("fast", 8.0), device("slow", loaded=("a",)), speeds={"fast": 8.0, "slow": 1.0})
    why = fleet.placement.explain(job("0"), [job(str(n)) for n in range(20)], n_waiting=20, now_s=0.0)
    assert why.text.startswith("waits 1.0 s for fast")
    assert why.text.endswith("slow has room now but would need 10.0 s")


def test_where_many_wait_a_job_joins_its_kind_on_a_slow_device_rather_than_have_a_fast_one_to_itself() -> None:
    """Alone it takes the device for as long as it is drawn; sharing steps with one of its kind hardly does."""

    def goes_to(n_jobs: int) -> str | None:
        both = device("both", capacity=4, places=2, loaded=("a", "b"))
        [of_a] = busy_for("both", 10.0).running
        fleet = Fleet(
            replace(both, running=(replace(of_a, model="b"),)),
            busy_for("slow", 6.0, capacity=4),
            speeds={"both": 1.0, "slow": 0.3},
        )
        for name, model in itertools.product(("both", "slow"), "ab"):
            fleet.predictor.note_curve(DeviceId(name), model, {1: 1.0, 4: 1.3})
            fleet.change(fleet.devices[DeviceId(name)])
        return dict(pairs(fleet.add(*(job(str(n)) for n in range(n_jobs))))).get("0")

    assert goes_to(1) is None  # it waits until `both` is free
    assert goes_to(20) == "slow"


def test_a_warm_job_overtakes_one_that_must_load_but_only_a_few_times() -> None:
    fleet = Fleet(device("d", places=2, loaded=("a",)))
    fleet.add(job("running", "a"))
    fleet.add(job("head", "b"), *(job(f"w{n}", "a") for n in range(40)))
    while fleet.ends:
        fleet.next_end()
    order = [one.job_id for one in fleet.sent]
    assert 1 < order.index(job("head").job_id) <= MAX_OVERTAKEN + 1


def test_the_record_says_who_was_overtaken() -> None:
    fleet = Fleet(device("d", places=2, loaded=("a",)))
    [sent] = fleet.add(job("head", "b"), job("warm", "a"))
    assert sent.job_id == "warm"
    assert "before job head" in sent.why.text


def test_a_draining_device_finishes_what_it_has_and_gets_no_more() -> None:
    fleet = Fleet(device("d", loaded=("a",)))
    fleet.add(job("1"))
    fleet.change(replace(fleet.devices[DeviceId("d")], is_draining=True))
    assert fleet.add(job("2")) == []
    assert fleet.next_end() == []
    assert pairs(fleet.change(replace(fleet.devices[DeviceId("d")], is_draining=False))) == [("2", "d")]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (device("d", on_disk={}), "would have to be pulled"),
        (device("d", heartbeat_s=-7.0), "not heard of for 7 s"),
        (device("d", is_draining=True), "draining"),
        (device("d", memory_total_bytes=3 * GIB), "needs 4.0 GiB, there are at most 3.0"),
        (device("d", memory_free_bytes=1 * GIB), "needs 4.0 GiB, there are at most 1.0"),
        (device("d", loaded=("b",), pinned=frozenset({"b"})), "of pinned models"),
        (device("d", limits=Limits(max_steps=9)), "allows 9 steps there, the job has 10"),
        (device("d", limits=Limits(max_megapixels=0.5)), "allows 0.5 megapixels"),
        (device("d", limits=Limits(max_pictures=0)), "allows 0 pictures"),
        (device("d", limits=Limits(only=frozenset({"b"}))), "does not allow a there"),
    ],
)
def test_a_device_that_cannot_have_a_job_never_gets_it_and_says_why(changed: Device, reason: str) -> None:
    fleet = Fleet(changed)
    assert fleet.add(job("j")) == []
    why = fleet.placement.explain(job("j"), [job("j")], n_waiting=1, now_s=0.0)
    assert reason in why.text
    assert why.chosen is None


def test_a_job_does_not_return_to_a_node_where_it_has_failed() -> None:
    fleet = Fleet(device("x", loaded=("a",)), device("y"))
    assert pairs(fleet.add(job("j", not_on=frozenset({NodeId("x")})))) == [("j", "y")]


def test_idle_models_leave_for_another_the_longest_unused_first_and_pinned_ones_stay() -> None:
    one = device("d", places=3, loaded=("b", "c", "d"), pinned=frozenset({"b"}))
    fleet = Fleet(replace(one, on_disk=dict.fromkeys("abcd", MODEL_BYTES)))
    [sent] = fleet.add(job("j", "a"))
    assert sent.evicts == ("c",)
    assert [each.model for each in fleet.devices[DeviceId("d")].loaded] == ["b", "d", "a"]


def test_jobs_that_no_device_can_take_do_not_hold_up_the_others() -> None:
    fleet = Fleet(device("d", loaded=("a",)))
    nowhere = [job(f"n{n}", "nowhere") for n in range(200)]
    too_large = [job(f"l{n}", work_bytes=GIB) for n in range(200)]
    assert pairs(fleet.add(*nowhere, *too_large, job("j"))) == [("j", "d")]


def test_a_device_that_shares_steps_takes_a_second_job_where_the_curve_says_it_pays() -> None:
    def second(shared_s: float) -> list[tuple[str, str]]:
        fleet = Fleet(device("d", capacity=4, loaded=("a",)))
        fleet.predictor.note_curve(DeviceId("d"), "a", {1: 1.0, 2: 2.0 - shared_s})
        fleet.change(fleet.devices[DeviceId("d")])
        fleet.add(job("1"))
        return pairs(fleet.add(job("2")))

    assert second(0.8) == [("2", "d")]
    assert second(0.1) == []


def test_a_short_job_joins_a_long_one_instead_of_waiting_for_its_end() -> None:
    fleet = Fleet(device("d", capacity=4, loaded=("a",)))
    fleet.add(job("long", work_s=1000.0))
    assert pairs(fleet.add(job("short", work_s=5.0))) == [("short", "d")]


def test_a_job_joins_one_that_is_late_instead_of_waiting_for_an_end_nobody_knows() -> None:
    fleet = Fleet(device("d", capacity=4, loaded=("a",)))
    fleet.add(job("late", work_s=1.0))
    fleet.now_s = 60.0
    assert pairs(fleet.add(job("second"))) == [("second", "d")]


def test_a_large_job_is_not_kept_out_for_ever_by_small_ones() -> None:
    fleet = Fleet(device("d", capacity=4, loaded=("a",)))
    fleet.predictor.note_curve(DeviceId("d"), "a", {1: 1.0, 4: 1.1})
    fleet.change(fleet.devices[DeviceId("d")])
    fleet.add(*(job(f"s{n}", work_s=10.0 + n) for n in range(3)))
    fleet.add(job("large", n_pictures=4, work_s=10.0))
    for n in range(200):
        fleet.add(job(f"t{n}", work_s=11.0 + n % 3))
        fleet.next_end()
        if "large" in {one.job_id for one in fleet.sent}:
            break
    assert "large" in {one.job_id for one in fleet.sent}


def test_a_plan_tells_when_waiting_jobs_will_be_done_and_changes_nothing() -> None:
    fleet = Fleet(device("d", loaded=("a",)))
    fleet.add(job("1"), job("2"), job("3"))
    for _ in range(2):
        planned = fleet.placement.plan(fleet.waiting, n_waiting=2, now_s=4.0)
        assert [one.job_id for one in planned] == ["2", "3"]
        assert [one.finish_s for one in planned] == pytest.approx([16.0, 26.0])


def test_a_job_that_the_node_refused_is_sent_again() -> None:
    fleet = Fleet(device("d", loaded=("a",)))
    before = fleet.devices[DeviceId("d")]
    fleet.add(job("j"))
    fleet.placement.upsert(before)
    [sent] = fleet.placement.decide([job("j")], n_waiting=1, now_s=1.0)
    assert sent.job_id == "j"


def test_a_removed_device_gets_nothing() -> None:
    fleet = Fleet(device("d", loaded=("a",)))
    fleet.placement.remove(DeviceId("d"))
    assert fleet.add(job("j")) == []


NAMES = st.sampled_from("abc")
DEVICES = st.lists(
    st.tuples(
        st.floats(0.5, 8.0),  # speed
        st.integers(1, 3),  # places
        st.sampled_from([1, 1, 4]),  # capacity
        st.sampled_from(["ok", "ok", "ok", "draining", "silent", "small", "limited", "without c"]),
    ),
    min_size=1,
    max_size=12,
)
JOBS = st.lists(st.tuples(NAMES, st.floats(0.5, 100.0), st.sampled_from([1, 1, 2, 4])), min_size=1, max_size=60)


def fleet_of(drawn: list[tuple[float, int, int, str]]) -> Fleet:
    devices = []
    for n, (_, places, capacity, kind) in enumerate(drawn):
        one = device(f"{n}-{kind}", places=places, capacity=capacity)
        match kind:
            case "draining":
                one = replace(one, is_draining=True)
            case "silent":
                one = replace(one, heartbeat_s=-100.0)
            case "small":
                one = replace(one, memory_total_bytes=2 * GIB, memory_free_bytes=2 * GIB)
            case "limited":
                one = replace(one, limits=Limits(max_pictures=1))
            case "without c":
                one = replace(one, on_disk={"a": MODEL_BYTES, "b": MODEL_BYTES})
        devices.append(one)
    return Fleet(*devices, speeds={one.name: speed for one, (speed, *_) in zip(devices, drawn, strict=True)})


@settings(max_examples=60, deadline=None)
@given(DEVICES, JOBS)
def test_no_job_ever_goes_where_it_cannot_and_every_other_one_is_drawn(
    drawn: list[tuple[float, int, int, str]], wanted: list[tuple[str, float, int]]
) -> None:
    fleet = fleet_of(drawn)
    jobs = {}
    for n, (model, work_s, n_pictures) in enumerate(wanted):
        one = job(str(n), model, work_s=work_s, n_pictures=n_pictures)
        jobs[one.job_id] = one
        fleet.add(one)
        check(fleet)
    for _ in range(3 * len(jobs)):
        if fleet.ends:
            fleet.next_end()
            check(fleet)
    assert not fleet.ends
    kinds = [kind for *_, kind in drawn]
    for one in fleet.waiting:
        able = {"ok"} | ({"limited"} if one.n_pictures == 1 else set()) | ({"without c"} if one.model != "c" else set())
        assert not able & set(kinds)
    for sent in fleet.sent:
        kind, one = sent.device_id.split("-")[1], jobs[sent.job_id]
        assert kind not in {"draining", "silent", "small"}
        assert kind != "limited" or one.n_pictures == 1
        assert kind != "without c" or one.model != "c"
    assert len({one.job_id for one in fleet.sent}) == len(fleet.sent)


def check(fleet: Fleet) -> None:
    for one in fleet.devices.values():
        assert one.n_pictures <= one.capacity or len(one.running) == 1
        assert sum(each.n_bytes for each in one.loaded) + one.memory_free_bytes == one.memory_total_bytes
        assert {each.model for each in one.running} <= {each.model for each in one.loaded}


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 8.0), st.integers(1, 2)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_every_job_is_sent_after_a_bounded_number_of_later_ones(
    drawn: list[tuple[float, int]], rng: random.Random
) -> None:
    """An overloaded fleet, jobs without end: nobody is passed by more than the bound."""
    choice = rng.choice
    fleet = fleet_of([(speed, places, 1, "ok") for speed, places in drawn])
    numbers = itertools.count()

    def newcomers(n: int) -> None:
        fleet.add(
            *(job(str(next(numbers)), choice("aaaaab" + "c" * (n % 2)), work_s=choice([1, 20])) for _ in range(n))
        )

    newcomers(20)
    for _ in range(250):
        newcomers(1)
        fleet.next_end()
    # A job may still be passed by those that were sent while it stood outside the walk, which never happens here.
    bound = MAX_PASSED + (MAX_PASSED_PER_DEVICE + 2) * len(drawn)
    position = {one.job_id: place for place, one in enumerate(fleet.sent)}
    for number in range(next(numbers)):
        name = job(str(number)).job_id
        end = position.get(name, len(fleet.sent))
        assert sum(int(one.job_id) > number for one in fleet.sent[:end]) <= bound


def test_a_silent_node_gets_jobs_again_once_it_is_heard() -> None:
    fleet = Fleet(device("d", loaded=("a",), heartbeat_s=0.0))
    fleet.now_s = 10.0
    assert fleet.add(job("j")) == []
    assert pairs(fleet.change(replace(fleet.devices[DeviceId("d")], heartbeat_s=ALWAYS_S))) == [("j", "d")]


def test_a_large_fleet_sends_each_job_to_one_of_the_best_devices() -> None:
    devices = [device(f"d{n}", loaded=("a",)) for n in range(300)]
    fleet = Fleet(*devices, speeds={f"d{n}": 1.0 + n % 10 for n in range(300)})
    [sent] = fleet.add(job("j"))
    assert int(sent.device_id[1:]) % 10 == 9


def test_a_large_fleet_loses_no_job() -> None:
    devices = [device(f"d{n}", loaded=("abc"[n % 3],)) for n in range(100)]
    fleet = Fleet(*devices, speeds={f"d{n}": 1.0 + n % 10 for n in range(100)})
    fleet.add(*(job(str(n), "abc"[n % 3], work_s=5.0 + n % 50) for n in range(400)))
    while fleet.ends:
        fleet.next_end()
    assert sorted(int(one.job_id) for one in fleet.sent) == list(range(400))


def test_a_model_in_use_is_not_evicted_for_a_job_that_joins() -> None:
    fleet = Fleet(device("d", capacity=4, loaded=("a",)))
    fleet.add(job("long", work_s=1000.0))
    assert fleet.add(job("other", "b", work_s=1.0)) == []
    assert [one.model for one in fleet.devices[DeviceId("d")].loaded] == ["a"]


def test_a_snapshot_with_a_loaded_model_of_unknown_size_is_taken() -> None:
    unknown = LoadedModel(model="elsewhere", n_bytes=0)
    fleet = Fleet(replace(device("d"), loaded=(unknown,)))
    assert pairs(fleet.add(job("j"))) == [("j", "d")]
