"""What the fleet relies on, of a broker in the same process and of a real NATS server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sdfleet.domain import JobId
from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.bus_nats import connect
from sdfleet.fleet.transport import Bus, Entry, Incoming, NoAnswer, Transport
from tests.fleet import virtual_time
from tests.fleet.brokers import ROUTER, NatsWorld, World, listening_in, world

Test = Callable[[World], Awaitable[None]]


@pytest.fixture(params=["memory", "nats"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Test], None]:
    """Runs a coroutine against one of both transports; in memory under a clock that jumps."""

    async def main(test: Test) -> None:
        async with world(request.param, tmp_path / "broker") as here, asyncio.timeout(60):
            await test(here)

    def run(test: Test) -> None:
        if request.param == "memory":
            virtual_time.run(main(test))
        else:
            asyncio.run(main(test))

    return run


async def _eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - other parties change it
            await asyncio.sleep(0.01)


async def _listen(bus: Bus, subject: str) -> list[Incoming]:
    heard: list[Incoming] = []

    async def take(message: Incoming) -> None:
        heard.append(message)

    await bus.subscribe(subject, take)
    await bus.flush()
    return heard


def test_what_is_said_is_heard_in_order_with_its_headers(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        alice, bob = await here.bus("alice"), await here.bus("bob")
        heard = await _listen(bob, "fleet.up.*.hb")
        for number in range(50):
            await alice.publish("fleet.up.n1.hb", b"%d" % number, headers={"number": str(number)}, reply="fleet.x")
        await _eventually(lambda: len(heard) == 50)
        assert [(m.subject, m.data, m.headers["number"], m.reply) for m in heard] == [
            ("fleet.up.n1.hb", b"%d" % number, str(number), "fleet.x") for number in range(50)
        ]

    play(test)


def test_after_a_flush_the_broker_has_read_what_was_said_before_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with world("nats", tmp_path / "broker") as here:
            assert isinstance(here, NatsWorld)
            async with listening_in(here.port) as (port, written):
                bus = await connect((f"nats://127.0.0.1:{port}",), name="bob", credentials=ROUTER)
                await _listen(bus, "a")
                before = list(written)
                await bus.close()
            (asked,) = (number for number, line in enumerate(before) if line.startswith(b"SUB a "))
            assert b"PING" in before[asked:]

    asyncio.run(main())


def test_a_broker_that_goes_while_tls_begins_is_no_fault_and_other_faults_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with world("nats", tmp_path / "broker") as here:
            await here.bus("alice")
            loop = asyncio.get_running_loop()
            for words in (
                "unable to perform operation on <TCPTransport closed=True>; the handler is closed",
                "another",
            ):
                loop.call_exception_handler({"message": "Exception in callback", "exception": RuntimeError(words)})

    asyncio.run(main())
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info and record.exc_info[1]] == [
        ("another",)
    ]


def test_wildcards_cover_what_they_should_and_nothing_else(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        alice, bob = await here.bus("alice"), await here.bus("bob")
        one, rest, exact = [await _listen(bob, s) for s in ("a.*.c", "a.>", "a.b")]
        for subject in ("a.b", "a.b.c", "a.b.c.d", "b.b.c"):
            await alice.publish(subject, b"")
        await alice.flush()
        await _eventually(lambda: len(rest) == 3)
        assert [m.subject for m in one] == ["a.b.c"]
        assert [m.subject for m in rest] == ["a.b", "a.b.c", "a.b.c.d"]
        assert [m.subject for m in exact] == ["a.b"]

    play(test)


def test_a_request_is_answered_once_and_silence_is_no_answer(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        alice, bob = await here.bus("alice"), await here.bus("bob")

        async def answer(message: Incoming) -> None:
            await bob.publish(message.reply, message.data.upper())
            await bob.publish(message.reply, b"again")

        async def say_nothing(_: Incoming) -> None:
            return

        await bob.subscribe("ask", answer)
        await bob.subscribe("mute", say_nothing)
        await bob.flush()
        assert (await alice.request("ask", b"hello", timeout_s=5)).data == b"HELLO"
        for subject in ("mute", "nobody"):
            with pytest.raises(NoAnswer):
                await alice.request(subject, b"", timeout_s=0.2)

    play(test)


def test_a_handler_that_raises_ends_only_its_message(
    play: Callable[[Test], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(here: World) -> None:
        alice, bob = await here.bus("alice"), await here.bus("bob")
        taken: list[bytes] = []

        async def take(message: Incoming) -> None:
            if message.data == b"bad":
                raise ValueError("no")
            taken.append(message.data)

        await bob.subscribe("a", take)
        await bob.flush()
        for data in (b"1", b"bad", b"2"):
            await alice.publish("a", data)
        await _eventually(lambda: taken == [b"1", b"2"])

    play(test)
    assert "a message met a fault of ours" in caplog.text


def test_a_closed_subscription_hears_nothing_more(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        alice, bob = await here.bus("alice"), await here.bus("bob")
        heard: list[bytes] = []

        async def take(message: Incoming) -> None:
            heard.append(message.data)

        ear = await bob.subscribe("a", take)
        witness = await _listen(bob, "a")
        await alice.publish("a", b"1")
        await _eventually(lambda: len(witness) == 1)
        await ear.close()
        await ear.close()
        await bob.flush()
        await alice.publish("a", b"2")
        await _eventually(lambda: len(witness) == 2)
        assert heard == [b"1"]

    play(test)


def test_connections_come_back_after_the_broker_was_killed(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        alice, bob = await here.bus("alice"), await here.bus("bob")
        heard = await _listen(bob, "a")
        told: list[bool] = []
        alice.on_connection(told.append)
        await here.kill_broker()
        await _eventually(lambda: not alice.is_connected)
        await alice.publish("a", b"lost")
        if not here.is_real:  # the real one is started again within milliseconds
            with pytest.raises(StoreUnavailable):
                await alice.flush()
        await here.broker_is_back()
        await _eventually(lambda: alice.is_connected and bob.is_connected)
        await bob.flush()
        await alice.publish("a", b"kept")
        await _eventually(lambda: bool(heard))
        assert [m.data for m in heard] == [b"kept"]
        assert told == [False, True]

    play(test)


# --------------------------------------------------------------------------------------------------------- the ledger


async def _all(transport: Transport, *, within_s: float = 0.5) -> list[Entry]:
    found = []
    while (entry := await transport.ledger.next(timeout_s=within_s)) is not None:
        found.append(entry)
    return found


def test_a_job_is_held_once_and_leaves_when_struck(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        router = await here.transport("r1")
        await router.ledger.enter(JobId("j1"), b"one")
        entry = await router.ledger.next(timeout_s=5)
        assert entry is not None
        assert (entry.job, entry.body, entry.n_deliveries) == ("j1", b"one", 1)
        assert await _all(router) == []
        await router.ledger.strike(entry)
        await router.close()
        later = await here.transport("r2")
        assert await _all(later) == []

    play(test)


def test_the_same_job_is_entered_once_and_again_in_another_turn(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        router = await here.transport("r1")
        for _ in range(3):
            await router.ledger.enter(JobId("j1"), b"one")
        (entry,) = await _all(router)
        await router.ledger.strike(entry)
        await router.ledger.enter(JobId("j1"), b"one")
        assert await _all(router) == []
        await router.ledger.enter(JobId("j1"), b"one", turn=1)
        assert [each.job for each in await _all(router)] == ["j1"]

    play(test)


def test_urgent_jobs_are_held_first(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        router = await here.transport("r1")
        for number in range(4):
            await router.ledger.enter(JobId(f"j{number}"), b"", is_urgent=number % 2 == 1)
        assert [each.job for each in await _all(router)] == ["j1", "j3", "j0", "j2"]

    play(test)


def test_jobs_survive_the_broker_and_the_router(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        router = await here.transport("r1")
        for number in range(20):
            await router.ledger.enter(JobId(f"j{number}"), b"%d" % number)
        struck = await router.ledger.next(timeout_s=5)
        assert struck is not None
        await router.ledger.strike(struck)
        await here.kill_broker()
        if not here.is_real:
            with pytest.raises(StoreUnavailable):
                await router.ledger.enter(JobId("away"), b"")
        await here.broker_is_back()
        await router.ledger.enter(JobId("back"), b"")
        entries: list[Entry] = []
        async with asyncio.timeout(50):
            while len({entry.job for entry in entries}) < 20:
                entries += await _all(router)
        assert {entry.job for entry in entries} == {f"j{n}" for n in range(20)} - {struck.job} | {"back"}

    play(test)


def test_who_extends_keeps_a_job_and_who_is_silent_loses_it(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        if here.is_real:
            pytest.skip("30 s of real time; the server's own rule")
        first = await here.transport("r1")
        await first.ledger.enter(JobId("kept"), b"")
        await first.ledger.enter(JobId("lost"), b"")
        kept, _ = await _all(first)
        second = await here.transport("r2")
        for _ in range(4):
            await asyncio.sleep(10)
            await first.ledger.extend(kept)
        assert [(each.job, each.n_deliveries) for each in await _all(second)] == [("lost", 2)]

    play(test)


def test_a_job_that_was_put_back_is_held_by_another(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        router = await here.transport("r1")
        await router.ledger.enter(JobId("j1"), b"")
        entry = await router.ledger.next(timeout_s=5)
        assert entry is not None
        await router.ledger.put_back(entry)
        again = await router.ledger.next(timeout_s=5)
        assert again is not None
        assert (again.job, again.n_deliveries) == ("j1", 2)

    play(test)


# ---------------------------------------------------------------------------------------------------------- the crown


def test_one_router_reigns_and_every_reign_has_a_higher_number(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        first, second = await here.transport("r1"), await here.transport("r2")
        reign = await first.crown.take("r1")
        assert reign is not None
        assert await second.crown.take("r2") is None
        assert await first.crown.keep(reign)
        await first.crown.resign(reign)
        next_reign = await second.crown.take("r2")
        assert next_reign is not None
        assert next_reign.epoch > reign.epoch
        assert not await first.crown.keep(reign)

    play(test)


@pytest.mark.slow
def test_a_silent_router_loses_the_crown(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        first, second = await here.transport("r1"), await here.transport("r2")
        reign = await first.crown.take("r1")
        assert reign is not None
        await asyncio.sleep(11)
        assert not await first.crown.keep(reign)
        next_reign = await second.crown.take("r2")
        assert next_reign is not None
        assert next_reign.epoch > reign.epoch

    play(test)


def test_a_router_that_was_killed_has_its_crown_back_at_once(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        killed, again, other = await here.transport("r1"), await here.transport("r1"), await here.transport("r2")
        reign = await killed.crown.take("r1")
        assert reign is not None
        next_reign = await again.crown.take("r1")
        assert next_reign is not None
        assert next_reign.epoch > reign.epoch
        assert await other.crown.take("r2") is None
        assert not await killed.crown.keep(reign)
        assert await again.crown.keep(next_reign)

    play(test)


def test_a_router_that_remembers_a_higher_epoch_goes_on_above_it(play: Callable[[Test], None]) -> None:
    async def test(here: World) -> None:
        router = await here.transport("r1")
        reign = await router.crown.take("r1", above=500)
        assert reign is not None
        assert reign.epoch == 501

    play(test)
