"""A real server for tests: uvicorn with the whole app on a free port, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI

from sdfleet import compose
from sdfleet.api.app import Opens, create_app
from sdfleet.api.http import Server, listen
from sdfleet.backends.fake import FakeBackend
from sdfleet.compose import House
from sdfleet.domain import Drawing, SafetyVerdict
from sdfleet.settings import load_settings

T = TypeVar("T")

# Longer than anything a test waits for; reached only where something hangs.
PATIENCE_S = 60.0


class Gate:
    """Holds the jobs of the fake backend before each step, until a test lets them go on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._moved = asyncio.Condition()
        self._n_free: float = 0
        self._arrived = threading.Event()

    async def __call__(self, drawing: Drawing, step: int) -> None:
        self._arrived.set()
        async with self._moved:
            await self._moved.wait_for(lambda: self._n_free > 0)
            self._n_free -= 1

    def wait_for_job(self) -> None:
        """Return when a job stands at the gate."""
        assert self._arrived.wait(PATIENCE_S), "no job came to be drawn"

    def let(self, n_steps: float = math.inf) -> None:
        """Let so many steps be taken; all of them, without a number."""
        asyncio.run_coroutine_threadsafe(self._let(n_steps), self._loop).result(PATIENCE_S)

    async def _let(self, n_steps: float) -> None:
        async with self._moved:
            self._n_free += n_steps
            self._moved.notify_all()


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that answers at `url`. Its objects live on `loop`: reach them through `call`."""

    url: str
    app: FastAPI
    loop: asyncio.AbstractEventLoop

    @property
    def house(self) -> House:
        """What the server is made of."""
        house: House = self.app.state.house
        return house

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    @contextlib.contextmanager
    def holding(self) -> Iterator[Gate]:
        """While inside, the fake backend draws only what the gate lets through."""
        backends, gate = self._backends(), Gate(self.loop)
        for backend in backends:
            backend._before_step = gate
        try:
            yield gate
        finally:
            for backend in backends:
                backend._before_step = None
            gate.let()

    def _backends(self) -> list[FakeBackend]:
        """What makes up the pictures: here, or at the nodes of a router."""
        opens = self.app.state.opens
        found = opens.backends.values() if hasattr(opens, "backends") else (self.house.runtime._backend,)
        fakes = [backend for backend in found if isinstance(backend, FakeBackend)]
        assert fakes
        return fakes

    @contextlib.contextmanager
    def flagging(self, *indexes: int) -> Iterator[None]:
        """While inside, the fake backend's safety checker flags these pictures of every job, unless switched off."""
        backends = self._backends()

        def verdict(drawing: Drawing, index: int) -> SafetyVerdict:
            if drawing.safety_checker == "off":
                return "off"
            return "flagged" if index in indexes else "passed"

        for backend in backends:
            backend._verdict = verdict
        try:
            yield
        finally:
            for backend in backends:
                backend._verdict = None


class _Server(Server):
    """Our server, telling another thread when it serves."""

    def __init__(self, app: FastAPI, *, loop: str) -> None:
        super().__init__(app, loop=loop)
        self.has_begun = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.loop = asyncio.get_running_loop()
        self.has_begun.set()

    def begin(self, sockets: list[socket.socket]) -> None:
        """Serve until `should_exit`; also when it cannot, whoever waits for the beginning is woken."""
        try:
            self.run(sockets=sockets)
        finally:
            self.has_begun.set()


@contextlib.contextmanager
def running(
    home: Path,
    *,
    is_loaded: bool = True,
    loop: str = "auto",
    listen_on: int = 0,
    opens: Opens = compose.server,
    **settings: object,
) -> Iterator[Running]:
    """A server with these settings, its files in `home`. is_loaded: wait until the model is. loop: see uvicorn.

    listen_on: the port; 0 takes one that is free. opens: see create_app.
    """
    given: dict[str, Any] = {"home": home, "backend": "fake", "drain_s": 0.0, **settings}
    app = create_app(load_settings(**given), opens=opens)
    server = _Server(app, loop=loop)
    with listen("127.0.0.1", listen_on) as listening:
        app.state.port = listening.getsockname()[1]
        thread = threading.Thread(target=server.begin, args=([listening],), name="server under test")
        thread.start()
        try:
            assert server.has_begun.wait(PATIENCE_S), "the server did not start"
            assert server.loop is not None, "the server ended at its start, see its log"
            here = Running(url=f"http://127.0.0.1:{listening.getsockname()[1]}", app=app, loop=server.loop)
            if is_loaded:
                here.call(here.house.readiness.wait())
            yield here
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server did not end"
