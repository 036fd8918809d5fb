"""A whole fleet in one process: a router with its desk and store, nodes with made-up pictures, one broker in memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from sdfleet.backends.fake import FakeBackend
from sdfleet.catalog.store import Catalog
from sdfleet.domain import Drawing, ImageRequest, Job, JobId, Submission
from sdfleet.fleet.books import Books
from sdfleet.fleet.catalog import FleetCatalog
from sdfleet.fleet.chooser import PlacedByFleet
from sdfleet.fleet.entries import pack_entry, unpack_entry
from sdfleet.fleet.members import Settled
from sdfleet.fleet.node import Node, NodeOptions
from sdfleet.fleet.packing import BrokenMessage
from sdfleet.fleet.remote import FleetBackend
from sdfleet.fleet.runtime import FleetRuntime
from sdfleet.fleet.speaking import Speaker
from sdfleet.fleet.spool import Spool
from sdfleet.fleet.stock import Stock
from sdfleet.fleet.transport import REIGN_S, Entry, Reign
from sdfleet.fleet.transport_memory import MemoryBroker, MemoryBus, MemoryCrown
from sdfleet.jobs.desk import DeskOptions, JobDesk
from sdfleet.jobs.observer import Several
from sdfleet.language.asking import Engine
from sdfleet.language.shelf import Shelf
from sdfleet.runtime import Runtime
from sdfleet.storage.database import Database, open_database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles
from tests.fleet.virtual_time import VirtualLoop

T = TypeVar("T")

SECRET = b"a secret of the router, for leases"


def secret_of(node: str) -> bytes:
    """What the router signs with for a node."""
    return hashlib.sha256(f"secret of {node}".encode()).digest()


@dataclass(slots=True, eq=False)
class NodeInTest:
    """A node and how to hurt it. steps_s: seconds of one step; drawn: jobs that it began, in order."""

    node: str
    home: Path
    broker: MemoryBroker
    step_s: float = 0.1
    slots: int = 1
    drawn: list[JobId] = field(default_factory=list)
    before_step: Callable[[Drawing, int], Awaitable[None]] | None = None
    engines: Sequence[Engine] = ()
    it: Node | None = None
    control: MemoryBus | None = None
    bulk: MemoryBus | None = None
    runtime: Runtime | None = None
    _task: asyncio.Task[None] | None = None

    @property
    def spooled(self) -> list[Path]:
        """What it has drawn and the router has not stored."""
        return list((self.home / "spool").iterdir())

    async def start(self) -> None:
        """A new process of this node."""
        catalog = Catalog(self.home / "models")
        self.runtime = Runtime(catalog=catalog, backend=FakeBackend(before_step=self._step))
        self.control, self.bulk = self.broker.connect(self.node), self.broker.connect(self.node)
        shelf = Shelf(self.engines)
        await shelf.look()
        self.it = Node(
            NodeOptions(node=self.node, name=self.node, secret=secret_of(self.node), slots=self.slots),
            control=self.control,
            bulk=self.bulk,
            runtime=self.runtime,
            spool=Spool(self.home / "spool"),
            stock=Stock(catalog, self.runtime),
            speaker=Speaker(self.node, control=self.control, bulk=self.bulk, language=shelf),
        )
        self._task = asyncio.create_task(self.it.run(), name=self.node)
        while self.it._seq == 0 and not self._task.done():  # noqa: ASYNC110 - it reads its disk, and tells nobody here
            await asyncio.sleep(0.001)

    async def kill(self) -> None:
        """As `kill -9`: nothing is said, what is on the disk stays."""
        assert self._task is not None
        for bus in (self.control, self.bulk):
            assert bus is not None
            bus.is_cut = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for bus in (self.control, self.bulk):
            assert bus is not None
            await bus.close()
        assert self.runtime is not None
        await self.runtime.close()

    def cut(self, *, is_cut: bool = True) -> None:
        """Take its network away, or give it back."""
        for bus in (self.control, self.bulk):
            assert bus is not None
            bus.cut(is_cut=is_cut)

    async def _step(self, drawing: Drawing, step: int) -> None:
        if step == 1:
            self.drawn.append(drawing.job_id)
        if self.before_step is not None:
            await self.before_step(drawing, step)
        await asyncio.sleep(self.step_s)


@dataclass(slots=True, eq=False)
class RouterInTest:
    """One life of a router."""

    fleet: FleetBackend
    desk: JobDesk
    store: JobStore
    runtime: FleetRuntime
    books: Books
    files: OutputFiles

    async def submit(self, prompt: str = "fox", *, steps: int = 4, n: int = 1, seed: int = 5) -> Job:
        """An accepted job."""
        request = ImageRequest(
            prompt=prompt, model="starter", width_px=128, height_px=128, steps=steps, seed=seed, n_images=n
        )
        return await self.desk.submit(Submission(request=request))

    async def pixels(self, job: Job) -> list[bytes]:
        """The stored files of a job that is done."""
        return [self.files.read(output) for output in job.outputs]


@dataclass(slots=True, eq=False)
class FleetInTest:
    """The broker, the nodes, and the router's life now."""

    folder: Path
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    nodes: dict[str, NodeInTest] = field(default_factory=dict)
    settled: dict[str, Settled] = field(default_factory=dict)
    n_routers: int = 0

    async def node(
        self, name: str, *, step_s: float = 0.1, slots: int = 1, engines: Sequence[Engine] = ()
    ) -> NodeInTest:
        """One more node, approved and started."""
        node = NodeInTest(
            node=name, home=self.folder / name, broker=self.broker, step_s=step_s, slots=slots, engines=engines
        )
        self.nodes[name] = node
        self.settled[name] = Settled(node=name, secret=secret_of(name))
        await node.start()
        return node

    @asynccontextmanager
    async def router(self, *, is_killed: bool = False) -> AsyncIterator[RouterInTest]:
        """A life of the router on its one home. is_killed: it ends without a word."""
        self.n_routers += 1
        home = self.folder / "router"
        home.mkdir(exist_ok=True)
        database = await open_database(None, home=home)
        _stop_the_clock_for(database)
        transport = self.broker.transport(f"router{self.n_routers}")
        if is_killed:
            transport.crown = _NeverResigns(self.broker)
        fleet = FleetBackend(transport, secret=SECRET, router=str(home))
        runtime = FleetRuntime(
            catalog=FleetCatalog(home / "models", models=fleet.members.models, adapters=fleet.members.adapters),
            fleet=fleet,
        )
        store, files = JobStore(database), OutputFiles(home / "outputs")

        async def is_open(job: JobId) -> bool | None:
            found = await store.job(job)
            return None if found is None else not found.has_ended

        async def unknown(entry: Entry) -> bool:
            try:
                job_id, submission = unpack_entry(entry.body)
            except BrokenMessage:
                return False
            job, _ = await store.accept(submission, job_id=job_id, max_queued=10**9)
            async for _ in desk.watch(job.id):  # it lines up a job that it did not know
                break
            return job.id == entry.job

        books = Books(
            transport.ledger, body=pack_entry, is_open=is_open, unknown=unknown,
            ended=lambda job, is_done: fleet.ended(job, is_stored=is_done),
            is_live=lambda job: desk.is_open(job),  # noqa: PLW0108 - it is made below
        )  # fmt: skip
        desk = JobDesk(
            store=store, files=files, runtime=runtime, observer=Several(books), chooser=PlacedByFleet(fleet),
            ledger=books, options=DeskOptions(drain_s=0.0, sync_s=None),
        )  # fmt: skip
        fleet.knows_open = desk.is_open
        await fleet.open()
        fleet.admit(self.settled.values())
        begun = asyncio.Event()
        work = asyncio.create_task(_reign(fleet, desk, books, begun))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * REIGN_S):
                await begun.wait()
        try:
            yield RouterInTest(fleet=fleet, desk=desk, store=store, runtime=runtime, books=books, files=files)
        finally:
            if is_killed:
                transport.bus.is_cut = True
            await fleet.close()
            await desk.close()
            work.cancel()
            await asyncio.wait({work})
            await runtime.close()
            await database.close()


def _stop_the_clock_for(database: Database) -> None:
    """A write takes no time, however busy the machine is that runs the test."""
    loop, write = asyncio.get_running_loop(), database.write
    if not isinstance(loop, VirtualLoop):
        return

    async def counted(work: Callable[[Connection], T]) -> T:
        with loop.busy():
            return await write(work)

    database.write = counted  # type: ignore[method-assign]


async def _reign(fleet: FleetBackend, desk: JobDesk, books: Books, begun: asyncio.Event) -> None:
    """What a router does from when it reigns."""
    await fleet.reigned()
    await desk.start()
    begun.set()
    await books.run()


class _NeverResigns(MemoryCrown):
    """As a router that is killed: whoever comes next must wait until its reign is over."""

    async def resign(self, reign: Reign) -> None:
        """Nothing."""


@asynccontextmanager
async def fleet_of(folder: Path, **step_s: float) -> AsyncIterator[FleetInTest]:
    """A fleet with these nodes: name -> seconds of a step."""
    fleet = FleetInTest(folder)
    for name, seconds in step_s.items():
        await fleet.node(name, step_s=seconds)
    try:
        yield fleet
    finally:
        for node in fleet.nodes.values():
            await node.kill()
