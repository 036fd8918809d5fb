"""A router's house for tests of the API: the real parts over a broker in memory, with nodes that make up pictures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from sdfleet.backends.fake import FakeBackend
from sdfleet.catalog.store import Catalog
from sdfleet.compose.house import House, ground
from sdfleet.compose.machine import hub
from sdfleet.compose.routing import Lines, fleet_house
from sdfleet.domain import Job
from sdfleet.fleet.keys import NKey
from sdfleet.fleet.node import Node, NodeOptions
from sdfleet.fleet.speaking import Speaker
from sdfleet.fleet.spool import Spool
from sdfleet.fleet.stock import Stock
from sdfleet.fleet.transport_memory import MemoryBroker, MemoryBus
from sdfleet.fleet.trust import Enrolled, Roster
from sdfleet.language.asking import Engine
from sdfleet.language.shelf import Shelf
from sdfleet.runtime import Runtime
from sdfleet.settings import Settings

PLACE = "127.0.0.1:4222"


class RouterInMemory:
    """`opens` of an app. nodes: their names. broker: shared by routers that are rivals.

    language: the engines that a node has, by its name.
    """

    def __init__(
        self,
        *nodes: str,
        broker: MemoryBroker | None = None,
        language: Mapping[str, Callable[[], Sequence[Engine]]] | None = None,
    ) -> None:
        self.names = nodes
        self._language = language or {}
        self.buses: dict[str, tuple[MemoryBus, MemoryBus]] = {}
        self.broker = MemoryBroker() if broker is None else broker
        self.backends: dict[str, FakeBackend] = {}

    @asynccontextmanager
    async def __call__(self, settings: Settings, *, job_body: Callable[[Job], bytes]) -> AsyncIterator[House]:
        roster = Roster.open(settings.home / "fleet")
        lines = Lines(transport=self.broker.transport("router"), broker=None, places=(PLACE,))
        async with contextlib.AsyncExitStack() as stack:
            for name in self.names:
                code = roster.make_code((PLACE,))
                (enrolled,) = roster.enrol_by_code(code.id, (NKey.new().public,), name)
                await stack.enter_async_context(self._node(enrolled, settings, settings.home / f"home-of-{name}"))
            async with ground(settings) as here, fleet_house(here, roster, lines, job_body=job_body) as house:
                yield house

    @asynccontextmanager
    async def _node(self, enrolled: Enrolled, settings: Settings, home: Path) -> AsyncIterator[None]:
        backend = self.backends[enrolled.node] = FakeBackend()
        catalog = Catalog(home / "models")
        engines = self._language.get(enrolled.node, list)()
        async with Runtime(catalog=catalog, backend=backend) as runtime, Shelf(engines) as shelf:
            await shelf.look()
            options = NodeOptions(
                node=enrolled.node, name=enrolled.node, secret=bytes.fromhex(enrolled.secret), slots=4
            )
            control, bulk = self.broker.connect(enrolled.node), self.broker.connect(enrolled.node)
            self.buses[enrolled.node] = control, bulk
            spool, stock = Spool(home / "spool"), Stock(catalog, runtime, hub=partial(hub, settings))
            speaker = Speaker(enrolled.node, control=control, bulk=bulk, language=shelf) if engines else None
            node = Node(options, control=control, bulk=bulk, runtime=runtime, spool=spool, stock=stock, speaker=speaker)
            task = asyncio.ensure_future(node.run())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait({task})
                for bus in (control, bulk):
                    await bus.close()
