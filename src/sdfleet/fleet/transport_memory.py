"""The fleet's transport inside one process: for tests of the whole fleet under a clock of their own, and for demos.

Everybody shares one `MemoryBroker`. It does what a broker is relied on for, and no more: messages in order for each
pair of sender and subject, lost while a connection is cut; a ledger that outlives routers; one crown.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sdfleet.domain import JobId
from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.transport import HOLD_S, REIGN_S, Entry, Handler, Incoming, LedgerFull, NoAnswer, Reign, hand_over


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject is covered by a pattern, as NATS has it: `*` is one part, a last `>` one or more.

    >>> matches("fleet.up.*.hb", "fleet.up.n1.hb"), matches("fleet.>", "fleet"), matches("fleet.n.a.>", "fleet.n.a.run")
    (True, False, True)
    """
    wanted, parts = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(parts) >= len(wanted) and all(w in ("*", p) for w, p in zip(wanted[:-1], parts, strict=False))
    return len(parts) == len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


@dataclass(slots=True)
class _Written:
    """A job in the ledger. held_until_s: on the loop's clock; 0 while nobody holds it."""

    job: JobId
    body: bytes
    is_urgent: bool
    n_deliveries: int = 0
    held_until_s: float = 0.0
    held_by: int = 0


@dataclass(slots=True)
class MemoryBroker:
    """What all connections share. is_up: False is a broker that was killed: nothing is carried, nothing written.

    max_entries: jobs that the ledger takes.
    """

    max_entries: int = 1_000_000
    is_up: bool = True
    written: dict[JobId, _Written] = field(default_factory=dict)
    known: set[tuple[JobId, int]] = field(default_factory=set)
    reign: Reign | None = None
    reign_until_s: float = 0.0
    epoch: int = 0
    buses: list[MemoryBus] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    tokens: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def stop(self) -> None:
        """As `kill -9` of a broker: every connection is lost, what was written stays."""
        self.is_up = False
        for bus in self.buses:
            bus.tell_connection()

    def start(self) -> None:
        """The broker is back, with what was on its disk."""
        self.is_up = True
        for bus in self.buses:
            bus.tell_connection()

    def connect(self, name: str) -> MemoryBus:
        """A connection of its own."""
        bus = MemoryBus(self, name)
        self.buses.append(bus)
        return bus

    def transport(self, name: str) -> MemoryTransport:
        """A router's connections."""
        return MemoryTransport(bus=self.connect(name), ledger=MemoryLedger(self), crown=MemoryCrown(self))


class MemoryBus:
    """One connection; see `transport.Bus`. is_cut: a network that carries nothing for this one.

    delay_s: how long each message to or from here takes; drops: called with a subject, True loses that message.
    """

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self.is_cut = False
        self.delay_s = 0.0
        self.drops: Callable[[str], bool] = lambda _: False
        self._broker = broker
        self._name = name
        self._ears: list[_Ear] = []
        self._listeners: list[Callable[[bool], None]] = []
        self._n_asked = 0
        self._is_closed = False

    @property
    def is_connected(self) -> bool:
        return self._broker.is_up and not self.is_cut and not self._is_closed

    def on_connection(self, call: Callable[[bool], None]) -> None:
        self._listeners.append(call)

    def cut(self, *, is_cut: bool = True) -> None:
        """Take this connection away, or give it back."""
        self.is_cut = is_cut
        self.tell_connection()

    def tell_connection(self) -> None:
        """Tell whoever asked how the connection is."""
        for call in self._listeners:
            call(self.is_connected)

    async def publish(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        if self._is_closed:
            raise StoreUnavailable("the connection was closed")
        if not self.is_connected or self.drops(subject):
            return
        message = Incoming(subject=subject, data=bytes(data), headers=dict(headers or {}), reply=reply)
        for bus in list(self._broker.buses):
            bus.hear(message, after_s=self.delay_s)

    def hear(self, message: Incoming, *, after_s: float) -> None:
        """Take in what somebody said, if anybody here listens for it."""
        for ear in [ear for ear in self._ears if matches(ear.pattern, message.subject)]:
            ear.put(message, after_s=after_s + self.delay_s)

    async def subscribe(self, subject: str, handler: Handler) -> _Ear:
        ear = _Ear(self, subject, handler)
        self._ears.append(ear)
        return ear

    def deaf(self, ear: _Ear) -> None:
        """A subscription was closed."""
        if ear in self._ears:
            self._ears.remove(ear)

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Incoming:
        self._n_asked += 1
        inbox = f"_INBOX_{self._name}.{id(self):x}.{self._n_asked}"
        answer: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()

        async def take(message: Incoming) -> None:
            if not answer.done():
                answer.set_result(message)

        ear = await self.subscribe(inbox, take)
        try:
            await self.publish(subject, data, headers=headers, reply=inbox)
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as exc:
            raise NoAnswer(f"nobody answered on {subject} within {timeout_s} s") from exc
        finally:
            await ear.close()

    async def flush(self) -> None:
        if not self.is_connected:
            raise StoreUnavailable("the broker cannot be reached")
        await asyncio.sleep(0)

    async def close(self) -> None:
        self._is_closed = True
        for ear in list(self._ears):
            await ear.close()
        if self in self._broker.buses:
            self._broker.buses.remove(self)


class _Ear:
    """A subscription: its messages, one after the other."""

    def __init__(self, bus: MemoryBus, pattern: str, handler: Handler) -> None:
        self.pattern = pattern
        self._bus = bus
        self._handler = handler
        self._waiting: deque[tuple[float, Incoming]] = deque()
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"hear {pattern}")

    def put(self, message: Incoming, *, after_s: float) -> None:
        self._waiting.append((asyncio.get_running_loop().time() + after_s, message))
        self._news.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._news.clear()
                await self._news.wait()
            due_s, message = self._waiting.popleft()
            if due_s > loop.time():
                await asyncio.sleep(due_s - loop.time())
            if not self._bus.is_connected or self._bus.drops(message.subject):
                continue
            await hand_over(message, self._handler)

    async def close(self) -> None:
        self._bus.deaf(self)
        if asyncio.current_task() is not self._task:
            self._task.cancel()
            await asyncio.wait({self._task})


class MemoryLedger:
    """See `transport.Ledger`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def enter(self, job: JobId, body: bytes, *, turn: int = 0, is_urgent: bool = False) -> None:
        self._check()
        if job in self._broker.written or (job, turn) in self._broker.known:
            return
        if len(self._broker.written) >= self._broker.max_entries:
            raise LedgerFull("the ledger of accepted jobs is full", retry_after_s=10.0)
        self._broker.known.add((job, turn))
        self._broker.written[job] = _Written(job=job, body=bytes(body), is_urgent=is_urgent)
        self._broker.news.set()

    async def next(self, *, timeout_s: float) -> Entry | None:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while True:
            self._check()
            free = [one for one in self._broker.written.values() if one.held_until_s <= loop.time()]
            if free:
                return self._hold(min(free, key=lambda one: not one.is_urgent), loop.time())
            left_s = end_s - loop.time()
            if left_s <= 0:
                return None
            self._broker.news.clear()
            held = [one.held_until_s - loop.time() for one in self._broker.written.values()]
            try:
                async with asyncio.timeout(min([left_s, *held])):
                    await self._broker.news.wait()
            except TimeoutError:
                continue

    def _hold(self, one: _Written, now_s: float) -> Entry:
        one.n_deliveries += 1
        one.held_until_s = now_s + HOLD_S
        one.held_by = next(self._broker.tokens)
        return Entry(job=one.job, body=one.body, n_deliveries=one.n_deliveries, token=one.held_by)

    async def extend(self, entry: Entry) -> None:
        self._check()
        one = self._broker.written.get(entry.job)
        if one is not None and one.held_by == entry.token:
            one.held_until_s = asyncio.get_running_loop().time() + HOLD_S

    async def strike(self, entry: Entry) -> None:
        self._check()
        self._broker.written.pop(entry.job, None)

    async def put_back(self, entry: Entry) -> None:
        self._check()
        one = self._broker.written.get(entry.job)
        if one is not None and one.held_by == entry.token:
            one.held_until_s = 0.0
            self._broker.news.set()

    def _check(self) -> None:
        if not self._broker.is_up:
            raise StoreUnavailable("the broker cannot be reached", retry_after_s=1.0)


class MemoryCrown:
    """See `transport.Crown`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def take(self, router: str, *, above: int = 0) -> Reign | None:
        self._check()
        broker, now_s = self._broker, asyncio.get_running_loop().time()
        if broker.reign is not None and broker.reign_until_s > now_s and broker.reign.router != router:
            return None
        broker.epoch = max(broker.epoch, above) + 1
        broker.reign = Reign(router=router, epoch=broker.epoch)
        broker.reign_until_s = now_s + REIGN_S
        return broker.reign

    async def keep(self, reign: Reign) -> bool:
        self._check()
        now_s = asyncio.get_running_loop().time()
        if self._broker.reign != reign or self._broker.reign_until_s <= now_s:
            return False
        self._broker.reign_until_s = now_s + REIGN_S
        return True

    async def resign(self, reign: Reign) -> None:
        if self._broker.is_up and self._broker.reign == reign:
            self._broker.reign = None

    def _check(self) -> None:
        if not self._broker.is_up:
            raise StoreUnavailable("the broker cannot be reached", retry_after_s=1.0)


@dataclass(slots=True)
class MemoryTransport:
    """See `transport.Transport`."""

    bus: MemoryBus
    ledger: MemoryLedger
    crown: MemoryCrown

    async def close(self) -> None:
        await self.bus.close()
