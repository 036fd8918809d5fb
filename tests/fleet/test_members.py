"""The nodes as the router sees them: who is heard, whose models are the fleet's, what placement is told."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from sdfleet.domain import ImageRequest, JobId, LoraUse
from sdfleet.fleet.members import MOST_SLOTS, Members, Settled
from sdfleet.fleet.messages import DEAD_S, AdapterHere, Heartbeat, Hello, ModelHere
from sdfleet.fleet.state import RunningJob


class _Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _model(name: str, identity: str) -> ModelHere:
    return ModelHere(name=name, identity=identity, n_bytes=1000, card={}, found={})


def _hello(*models: ModelHere, boot: str = "a") -> Hello:
    return Hello(boot=boot, hello=1, name="n", version="1", device="cpu", slots=2, models=models, memory_bytes=10**9)


def _beat(seq: int, *, boot: str = "a", slots: int = 2, free_bytes: int = 10**9) -> Heartbeat:
    return Heartbeat(boot=boot, seq=seq, hello=1, slots=slots, free=slots, memory_free_bytes=free_bytes)


def _members(*nodes: str) -> tuple[Members, _Clock, list[str]]:
    clock, changed = _Clock(), list[str]()
    members = Members(clock=clock, changed=changed.append)
    members.admit(Settled(node=node, secret=b"s") for node in nodes)
    return members, clock, changed


def test_of_two_models_of_one_name_that_of_more_nodes_is_the_fleet_s() -> None:
    members, _, _ = _members("n1", "n2", "n3")
    members.take_hello("n1", _hello(_model("sd", "x")))
    assert members.models()["sd"].identity == "x"
    members.take_hello("n2", _hello(_model("sd", "y"), _model("xl", "z")))
    members.take_hello("n3", _hello(_model("sd", "y")))
    assert members.models()["sd"].identity == "y"
    assert members.at("sd") == ("n2", "n3")
    members.admit([Settled(node="n1", secret=b"s"), Settled(node="n2", secret=b"s")])
    members.take_hello("n2", _hello(boot="b"))
    assert {name: model.identity for name, model in members.models().items()} == {"sd": "x"}
    assert members.at("sd") == ("n1",)


def test_a_thousand_hellos_are_taken_in_within_moments() -> None:
    nodes = [f"n{i}" for i in range(1000)]
    members, _, _ = _members(*nodes)
    models = [_model(f"m{i}", "same") for i in range(20)]
    spent_s = -time.process_time()
    for node in nodes:
        members.take_hello(node, _hello(*models))
    spent_s += time.process_time()
    assert len(members.models()) == 20
    # Each compared with all the others it took a hundred times as long.
    assert spent_s < 2.0


def test_heartbeats_that_say_nothing_new_give_placement_the_same_device() -> None:
    members, clock, _ = _members("n1")
    members.take_hello("n1", _hello(_model("sd", "x")))
    members.take_heartbeat("n1", _beat(1, free_bytes=2**30))
    member = members.get("n1")
    assert member is not None
    before = member.device(clock.now_s)
    clock.now_s += 2
    members.take_heartbeat("n1", _beat(2, free_bytes=2**30 + 12345))
    assert member.device(clock.now_s) == before


def test_a_node_gets_no_more_slots_than_any_device_can_use() -> None:
    members, clock, _ = _members("n1")
    members.take_hello("n1", _hello())
    members.take_heartbeat("n1", _beat(1, slots=10**9))
    member = members.get("n1")
    assert member is not None
    device = member.device(clock.now_s)
    assert device is not None
    assert device.capacity == MOST_SLOTS
    member.settled = replace(member.settled, max_pictures=3)
    device = member.device(clock.now_s)
    assert device is not None
    assert device.capacity == 3


def test_a_silent_node_dies_but_not_while_the_router_itself_hears_nothing() -> None:
    members, clock, _ = _members("n1")
    members.take_hello("n1", _hello())
    members.review()
    members.hear_nothing(is_deaf=True)
    clock.now_s += 100
    assert members.review() == ()
    assert not members.is_silent("n1", since_s=0.0, now_s=clock.now_s)
    members.hear_nothing(is_deaf=False)
    clock.now_s += DEAD_S - 1
    assert members.review() == ()
    clock.now_s += 2
    assert members.review() == ("n1",)
    assert members.is_silent("n1", since_s=0.0, now_s=clock.now_s)


def test_a_node_that_was_never_heard_is_given_its_time() -> None:
    members, clock, _ = _members("n1")
    assert not members.is_silent("n1", since_s=clock.now_s, now_s=clock.now_s + 5)
    assert members.is_silent("n1", since_s=clock.now_s, now_s=clock.now_s + DEAD_S)
    assert members.is_silent("n2", since_s=clock.now_s, now_s=clock.now_s)


def test_the_mean_number_of_pictures_is_counted_over_time() -> None:
    members, _, _ = _members("n1")
    member = members.get("n1")
    assert member is not None

    def job(name: str, n: int) -> RunningJob:
        return RunningJob(
            job_id=JobId(name), model="sd", megapixels=1.0, n_pictures=n, picture_units_left=1.0, as_of_s=0.0
        )

    begun = member.picture_s(0.0)
    member.give(job("a", 1), now_s=0.0)
    member.give(job("b", 4), now_s=10.0)
    assert member.free(JobId("b"), now_s=20.0)
    assert not member.free(JobId("b"), now_s=20.0)
    assert (member.picture_s(40.0) - begun) / 40.0 == (10 * 1 + 10 * 5 + 20 * 1) / 40.0


def test_a_job_with_a_lora_can_be_drawn_where_that_is() -> None:
    members, _, _ = _members("n1", "n2")
    model = _model("sd", "x")
    members.take_hello("n1", _hello(model))
    adapter = AdapterHere(kind="lora", name="ink", n_bytes=1)
    members.take_hello("n2", replace(_hello(model), adapters=(adapter,)))
    request = ImageRequest(prompt="fox", model="sd")
    assert members.able(request) == ("n1", "n2")
    assert members.able(replace(request, loras=(LoraUse(name="ink"),))) == ("n2",)


def test_a_busy_node_is_left_alone_for_a_moment() -> None:
    async def story() -> None:
        members, clock, changed = _members("n1")
        members.take_hello("n1", _hello())
        members.take_heartbeat("n1", _beat(1))
        member = members.get("n1")
        assert member is not None
        members.close_for("n1", 0.01)
        assert member.device(clock.now_s) is None
        clock.now_s += 0.02
        changed.clear()
        async with asyncio.timeout(5):
            while not changed:  # noqa: ASYNC110 - a timer calls it
                await asyncio.sleep(0.005)
        assert member.device(clock.now_s) is not None

    asyncio.run(story())
