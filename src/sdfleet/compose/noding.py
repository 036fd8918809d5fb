"""One device of a fleet: this machine's runtime, told what to draw by a router.

identity (from joining) -> two connections, control and bulk -> runtime underneath -> node
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sdfleet.compose.language import shelf_of
from sdfleet.compose.machine import hardware, hub, standalone
from sdfleet.errors import JoinRefused
from sdfleet.fleet.bus_nats import NatsBus, NotLetIn, connect
from sdfleet.fleet.identity import Identity
from sdfleet.fleet.node import Node, NodeOptions
from sdfleet.fleet.speaking import Speaker
from sdfleet.fleet.spool import Spool
from sdfleet.fleet.stock import Stock
from sdfleet.fleet.transport import Bus
from sdfleet.language.shelf import Shelf
from sdfleet.runtime import Runtime
from sdfleet.settings import Settings
from sdfleet.storage.lock import alone

# A router that is being started again, or a machine that has just woken up.
CONNECT_WITHIN_S = 3600.0 * 24 * 365


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Which device of this machine a process serves. name: tells several apart; empty where there is one."""

    identity: Identity
    name: str = ""


class ServedNode:
    """A node and its connections."""

    def __init__(self, node: Node, buses: list[NatsBus]) -> None:
        self._node = node
        self._refused = asyncio.Event()
        self._buses = buses
        for bus in buses:
            bus.on_connection(self._look)

    def _look(self, _: bool) -> None:  # noqa: FBT001 - the bus calls it with one argument
        if any(bus.was_refused for bus in self._buses):
            self._refused.set()

    async def run(self) -> NoReturn:
        """Serve until cancelled. Raises JoinRefused once the router has put this node out."""
        serving = asyncio.ensure_future(self._node.run())
        refused = asyncio.ensure_future(self._refused.wait())
        try:
            await asyncio.wait({serving, refused}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            raise _put_out(self._node.options.node)
        finally:
            for task in (serving, refused):
                task.cancel()
            await asyncio.wait({serving, refused})

    async def leave(self, *, within_s: float) -> None:
        """Take no more jobs; return when those here are drawn and sent, or after `within_s`."""
        await self._node.leave(within_s=within_s)


@contextlib.asynccontextmanager
async def node(settings: Settings, device: Device) -> AsyncIterator[ServedNode]:
    """The node, connected; `run` it. Waits for a broker that is away.

    Raises JoinRefused (it was put out while it was away), StoreUnavailable, StorageError.
    """
    identity = device.identity
    folder = settings.home / "fleet" / (f"node-{device.name}" if device.name else "node")
    with alone(folder):
        async with contextlib.AsyncExitStack() as stack:
            buses: list[NatsBus] = []
            for kind in ("control", "bulk"):
                bus = await _connected(identity, kind)
                stack.push_async_callback(bus.close)
                buses.append(bus)
            runtime = await stack.enter_async_context(standalone(settings))
            language = await stack.enter_async_context(shelf_of(settings))
            await language.look()
            made = _made(settings, device, runtime, language, folder, control=buses[0], bulk=buses[1])
            yield ServedNode(made, buses)


async def _connected(identity: Identity, kind: str) -> NatsBus:
    try:
        return await connect(
            identity.urls,
            name=f"{identity.node} {kind}",
            credentials=identity.credentials,
            tls=identity.tls(),
            inbox=identity.inbox,
            within_s=CONNECT_WITHIN_S,
        )
    except NotLetIn as exc:
        raise _put_out(identity.node) from exc


def _put_out(node: str) -> JoinRefused:
    return JoinRefused(f"the router has revoked node {node}", hint="to come back, join anew: sdfleet node --join CODE")


def _made(
    settings: Settings, device: Device, runtime: Runtime, language: Shelf, folder: Path, *, control: Bus, bulk: Bus
) -> Node:
    identity = device.identity
    options = NodeOptions(
        node=identity.node,
        name=settings.node_name or platform.node() or identity.node,
        secret=identity.secret_bytes,
        slots=settings.node_slots,
        device=str(runtime.capabilities().facts.get("device", settings.device)),
        facts=hardware(),
    )
    spool, stock = Spool(folder / "spool"), Stock(runtime.catalog, runtime, hub=lambda source: hub(settings, source))
    speaker = None if language.is_empty else Speaker(identity.node, control=control, bulk=bulk, language=language)
    return Node(options, control=control, bulk=bulk, runtime=runtime, spool=spool, stock=stock, speaker=speaker)
