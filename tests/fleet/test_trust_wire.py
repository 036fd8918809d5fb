"""What the broker itself refuses: each right that a guest, a node or a stranger does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.bus_nats import NotLetIn, connect
from sdfleet.fleet.keys import NKey
from sdfleet.fleet.rights import guest_key
from sdfleet.fleet.transport import Incoming, NoAnswer
from tests.fleet.trusted import play, trusted

FORBIDDEN_TO_A_NODE = (
    "fleet.up.b.hb",
    "fleet.up.b.res",
    "fleet.n.b.run",
    "fleet.n.a.run",
    "fleet.join.x",
    "fleet.ask.x",
    "fleet.asking.x",
    "fleet.q.hi.1",
    "_INBOX_b.x",
)


def test_a_connection_without_a_key_or_with_a_strange_one_is_turned_away(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            for key in (None, NKey.new()):
                with pytest.raises(NotLetIn):
                    await world.connect_with(key)

    play(test())


def test_a_connection_without_tls_gets_no_word(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            with pytest.raises(StoreUnavailable):
                await connect((f"nats://{world.place}",), name="plain", within_s=0.5)

    play(test())


def test_a_guest_says_nothing_but_that_it_asks(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            await world.joined("a")
            guest = await world.connect_with(guest_key())
            for subject in ("fleet.up.a.hb", "fleet.up.a.res", "fleet.n.a.run", "fleet.join.x", "fleet.q.hi.1"):
                assert not await world.reaches_router(guest, subject, marker="fleet.ask.x"), subject

    play(test())


def test_a_guest_hears_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            guest = await world.connect_with(guest_key())
            for pattern, subject in (
                (">", "fleet.n.a.run"),
                ("fleet.n.a.run", "fleet.n.a.run"),
                ("fleet.ask.*", "fleet.ask.x"),
                ("_INBOX_guest.>", "_INBOX_guest.x"),
                ("_INBOX.>", "_INBOX.x"),
            ):
                assert not await world.hears(guest, pattern, subject), pattern

    play(test())


def test_a_machine_that_asks_hears_its_own_inbox_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            first, second = NKey.new(), NKey.new()
            for key in (first, second):
                world.roster.add_pending((key.public,), "x", "c")
            await world.joining.apply()
            bus = await world.connect_with(first, inbox=f"_INBOX_ask_{first.public}")
            own, other = (f"_INBOX_ask_{key.public}.x" for key in (first, second))
            assert await world.hears(bus, f"_INBOX_ask_{first.public}.*", own)
            for pattern in (other, "*.x", "*.>", ">"):
                assert not await world.hears(bus, pattern, other), pattern
            marker = f"fleet.asking.{first.public}"
            assert not await world.reaches_router(bus, f"fleet.asking.{second.public}", marker=marker)
            assert not await world.reaches_router(bus, "fleet.up.x.hb", marker=marker)

    play(test())


def test_a_node_speaks_as_itself_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            a = await world.connect(await world.joined("a"))
            await world.joined("b")
            for subject in FORBIDDEN_TO_A_NODE:
                assert not await world.reaches_router(a, subject, marker="fleet.up.a.hb"), subject

    play(test())


def test_a_node_hears_what_is_said_to_itself_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            a = await world.connect(await world.joined("a"))
            await world.joined("b")
            assert await world.hears(a, "fleet.n.a.>", "fleet.n.a.run")
            assert await world.hears(a, "_INBOX_a.>", "_INBOX_a.x")
            for pattern, subject in (
                ("fleet.n.b.run", "fleet.n.b.run"),
                ("fleet.n.*.run", "fleet.n.b.run"),
                ("fleet.n.>", "fleet.n.b.run"),
                (">", "fleet.n.b.run"),
                ("fleet.up.b.>", "fleet.up.b.res"),
                ("_INBOX_b.>", "_INBOX_b.x"),
                ("_INBOX.>", "_INBOX.x"),
                ("$JS.>", "$JS.API.INFO"),
            ):
                assert not await world.hears(a, pattern, subject), pattern

    play(test())


def test_a_node_reaches_neither_the_ledger_nor_the_crown_nor_the_broker_s_own_subjects(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            a = await world.connect(await world.joined("a"))
            for subject in (
                "$JS.API.INFO",
                "$JS.API.STREAM.NAMES",
                "$JS.API.STREAM.MSG.GET.JOBS",
                "$JS.API.STREAM.PURGE.JOBS",
                "$JS.API.CONSUMER.MSG.NEXT.JOBS.router_hi",
                "$KV.ctl.leader",
                "$SYS.REQ.SERVER.PING",
            ):
                a.fault = ""
                with pytest.raises(NoAnswer):
                    await a.request(subject, b"", timeout_s=0.1)
                await a.flush()
                assert f'permissions violation for publish to "{subject.lower()}"' in a.fault.lower()

    play(test())


def test_a_node_cannot_make_the_router_say_things_in_its_place(tmp_path: Path) -> None:
    """The reply subject is not checked by the broker: that is the router's to do, see test_trust_liars.py."""

    async def test() -> None:
        async with trusted(tmp_path) as world:
            a = await world.connect(await world.joined("a"))
            b = await world.connect(await world.joined("b"))
            heard: list[Incoming] = []

            async def note(message: Incoming) -> None:
                heard.append(message)

            await b.subscribe("fleet.n.b.>", note)
            await b.subscribe("_INBOX_b.>", note)
            await b.flush()
            replies = ("fleet.n.b.run", "_INBOX_b.x", "_INBOX.x")
            for reply in replies:
                await a.publish("fleet.up.a.joined", b"", reply=reply)
            await world.until(lambda: sum(each.reply in replies for each in world.heard) == len(replies))
            await world.bus.flush()
            await b.flush()
            assert heard == []

    play(test())


def test_the_router_itself_has_no_right_in_the_broker_s_system(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            with pytest.raises(NoAnswer):
                await world.bus.request("$SYS.REQ.SERVER.PING", b"", timeout_s=0.1)
            await world.bus.flush()
            assert "permissions violation" in world.bus.fault.lower()

    play(test())
