"""A router's broker with TLS and keys, as in a real fleet, and whoever tries to get in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdfleet.fleet.asking import join
from sdfleet.fleet.broker import Broker
from sdfleet.fleet.bus_nats import Credentials, NatsBus, NotLetIn, connect
from sdfleet.fleet.identity import Identity
from sdfleet.fleet.joining import Joining
from sdfleet.fleet.keys import NKey
from sdfleet.fleet.members import Settled
from sdfleet.fleet.transport import Incoming
from sdfleet.fleet.transport_nats import open_transport
from sdfleet.fleet.trust import Roster
from tests.fleet.brokers import free_port


@dataclass(slots=True)
class Clock:
    """A wall clock that stands still until it is moved."""

    now_s: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True, eq=False)
class Trusted:
    """The router's side. heard: every subject that reached the router, in order."""

    folder: Path
    roster: Roster
    broker: Broker
    bus: NatsBus
    joining: Joining
    clock: Clock
    place: str
    admitted: list[Settled] = field(default_factory=list)
    heard: list[Incoming] = field(default_factory=list)
    opened: list[NatsBus] = field(default_factory=list)

    def code(self, *, within_s: float = 900.0, places: Sequence[str] = ()) -> str:
        return self.roster.make_code(tuple(places) or (self.place,), within_s=within_s).text()

    async def joined(self, wish: str = "mac", *, key: NKey | None = None) -> Identity:
        """A node that has joined with a code."""
        code = self.code()
        await self.joining.apply()
        (identity,) = await join(code, keys=[key or NKey.new()], wish=wish)
        return identity

    async def connect(self, identity: Identity, *, within_s: float = 5.0) -> NatsBus:
        """A connection of a node, as a node makes it."""
        bus = await connect(
            identity.urls, name=identity.node, credentials=identity.credentials, tls=identity.tls(),
            inbox=identity.inbox, within_s=within_s,
        )  # fmt: skip
        self.opened.append(bus)
        return bus

    async def connect_with(self, key: NKey | None, *, inbox: str = "_INBOX_guest") -> NatsBus:
        """A connection of somebody who trusts the broker, and has this key or none."""
        known = {user.nkey for user in self.roster.users()}
        while True:
            try:
                bus = await connect(
                    (f"tls://{self.place}",), name="somebody", tls=self.roster.tls(), inbox=inbox, within_s=3.0,
                    credentials=None if key is None else Credentials(seed=key.seed),
                )  # fmt: skip
            except NotLetIn:
                if key is None or key.public not in known:
                    raise  # else the broker was told of it, and reads that in a moment
            else:
                self.opened.append(bus)
                return bus

    async def reaches_router(self, bus: NatsBus, subject: str, *, marker: str) -> bool:
        """Whether what is said on `subject` gets to the router. marker: a subject that does."""
        n_before = len(self.heard)
        await bus.publish(subject, b"x")
        await bus.publish(marker, b"marker")
        await self.until(lambda: any(each.subject == marker for each in self.heard[n_before:]))
        return any(each.subject == subject and each.data == b"x" for each in self.heard[n_before:])

    async def hears(self, bus: NatsBus, pattern: str, subject: str) -> bool:
        """Whether this connection hears what the router says on `subject` when it listens on `pattern`."""
        heard: list[str] = []

        async def note(message: Incoming) -> None:
            heard.append(message.subject)

        ear = await bus.subscribe(pattern, note)
        await bus.flush()
        await self.bus.publish(subject, b"for somebody")
        await self.bus.flush()
        await bus.flush()  # what the broker had for this connection has come before the answer to this
        for _ in range(3):
            await asyncio.sleep(0)
        await ear.close()
        return bool(heard)

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - other parties change it
                await asyncio.sleep(0.005)


@asynccontextmanager
async def trusted(folder: Path, *, takes_guests: bool = True) -> AsyncIterator[Trusted]:
    """A router's broker, roster and joining, for the time of a test."""
    clock = Clock()
    roster = Roster.open(folder / "fleet", clock=clock, takes_guests=takes_guests)
    port = free_port()
    place = f"127.0.0.1:{port}"
    broker = Broker(folder / "broker", roster.broker_config("127.0.0.1", port))
    await broker.start()
    bus = await connect((f"tls://{place}",), name="router", credentials=roster.credentials(), tls=roster.tls())
    admitted: list[Settled] = []

    def admit(settled: object) -> None:
        assert isinstance(settled, tuple)
        admitted[:] = settled

    joining = Joining(bus, roster, broker=broker, admit=admit, places=lambda: (place,))
    world = Trusted(
        folder=folder, roster=roster, broker=broker, bus=bus, joining=joining, clock=clock, place=place,
        admitted=admitted,
    )  # fmt: skip

    async def note(message: Incoming) -> None:
        world.heard.append(message)

    await bus.subscribe("fleet.>", note)
    transport = await open_transport(bus)
    await joining.start()
    following = asyncio.create_task(joining.run())
    try:
        yield world
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        for each in world.opened:
            await each.close()
        await joining.close()
        await transport.close()
        await broker.close()


def play(test: Coroutine[Any, Any, None]) -> None:
    """Run a test on a loop of its own, for a minute at most."""

    async def main() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(main())
