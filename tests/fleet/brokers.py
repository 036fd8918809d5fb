"""The fleet's two transports behind one face for tests: connect, kill the broker, start it again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from sdfleet.fleet.broker import Broker, BrokerConfig, User
from sdfleet.fleet.bus_nats import Credentials, connect
from sdfleet.fleet.transport import Bus, Transport
from sdfleet.fleet.transport_memory import MemoryBroker
from sdfleet.fleet.transport_nats import open_transport

ROUTER = Credentials(user="router", password="a-password-for-tests-only")


class World(Protocol):
    """A broker and whoever connects to it."""

    is_real: bool

    async def bus(self, name: str) -> Bus: ...

    async def transport(self, name: str) -> Transport: ...

    async def kill_broker(self) -> None: ...

    async def broker_is_back(self) -> None: ...


def free_port() -> int:
    """A port that nobody listens on now.

    Below those that systems give to outgoing connections: one of these would be taken now and then by a test that runs
    beside this one, before its server has begun to listen.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class MemoryWorld:
    is_real = False

    def __init__(self) -> None:
        self.broker = MemoryBroker()

    async def bus(self, name: str) -> Bus:
        return self.broker.connect(name)

    async def transport(self, name: str) -> Transport:
        return self.broker.transport(name)

    async def kill_broker(self) -> None:
        self.broker.stop()

    async def broker_is_back(self) -> None:
        self.broker.start()


class NatsWorld:
    is_real = True

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        user = User(user=ROUTER.user, password=ROUTER.password)
        self.broker = Broker(folder, BrokerConfig(port=self.port, users=(user,)))
        self._open: list[Bus | Transport] = []
        self._n_starts = 0

    async def bus(self, name: str) -> Bus:
        bus = await connect((f"nats://127.0.0.1:{self.port}",), name=name, credentials=ROUTER)
        self._open.append(bus)
        return bus

    async def transport(self, name: str) -> Transport:
        transport = await open_transport(
            await connect((f"nats://127.0.0.1:{self.port}",), name=name, credentials=ROUTER)
        )
        self._open.append(transport)
        return transport

    async def kill_broker(self) -> None:
        pid = self.broker.pid
        assert pid is not None
        self._n_starts = self.broker.n_starts
        os.kill(pid, signal.SIGKILL)

    async def broker_is_back(self) -> None:
        async with asyncio.timeout(20):
            while self.broker.n_starts <= self._n_starts:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            for each in self._open:
                bus: Bus = each.bus if hasattr(each, "bus") else each
                while not bus.is_connected:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)

    async def close(self) -> None:
        for each in self._open:
            await each.close()
        await self.broker.close()


@asynccontextmanager
async def listening_in(port: int) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Another port of the broker's on loopback, and what clients have written to it, line by line, as they write."""
    written: list[bytes] = []

    async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter, lines: list[bytes] | None) -> None:
        with contextlib.suppress(OSError):
            while line := await source.readline():
                if lines is not None:
                    lines.append(line.strip())
                sink.write(line)
                await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(relay(reader, broker_writer, written), relay(broker_reader, writer, None))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], written


@asynccontextmanager
async def world(kind: str, folder: Path) -> AsyncIterator[World]:
    """One of both, for the time of a test."""
    if kind == "memory":
        yield MemoryWorld()
        return
    real = NatsWorld(folder)
    await real.broker.start()
    try:
        yield real
    finally:
        await real.close()
