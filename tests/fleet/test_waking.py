"""A router that was started just now, or was stopped for a while, does not take its own silence for its nodes'."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sdfleet.errors import CheckpointNotFound, NotReady, UnknownName
from sdfleet.fleet.catalog import FleetCatalog
from sdfleet.fleet.members import Members, Settled
from sdfleet.fleet.messages import DEAD_S, Heartbeat, Hello
from tests.fleet import virtual_time
from tests.fleet.fleets import fleet_of


def test_a_model_of_a_node_not_heard_yet_is_to_be_asked_for_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet:
            fleet.nodes["n1"].cut()
            async with fleet.router() as router:
                catalog = FleetCatalog(
                    tmp_path, models=router.fleet.members.models, gathers=lambda: router.fleet.gathers
                )
                with pytest.raises(NotReady):
                    catalog.resolve("starter")
                fleet.nodes["n1"].cut(is_cut=False)
                await asyncio.sleep(5)
                assert catalog.resolve("starter").card.name == "starter"
                with pytest.raises(UnknownName):
                    catalog.resolve("no such model")

    virtual_time.run(story())


def test_a_node_that_never_comes_is_waited_for_only_so_long(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet:
            fleet.nodes["n1"].cut()
            async with fleet.router() as router:
                catalog = FleetCatalog(
                    tmp_path, models=router.fleet.members.models, gathers=lambda: router.fleet.gathers
                )
                await asyncio.sleep(DEAD_S + 1)
                with pytest.raises((CheckpointNotFound, UnknownName)):
                    catalog.resolve("sd15")

    virtual_time.run(story())


def test_a_router_that_was_stopped_gives_its_nodes_time_to_be_heard() -> None:
    now_s = 0.0
    members = Members(clock=lambda: now_s, changed=lambda _: None)
    members.admit([Settled(node="n1", secret=b"s" * 32)])
    members.take_hello("n1", Hello(boot="b", hello=1, name="n1", version="0", device="", slots=1))
    members.take_heartbeat("n1", Heartbeat(boot="b", seq=1, hello=1, slots=1, free=1))
    members.review()
    now_s = 100.0
    members.was_away()
    assert members.review() == ()
    now_s += DEAD_S - 0.1
    assert members.review() == ()
    now_s += 0.2
    assert members.review() == ("n1",)
