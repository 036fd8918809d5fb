"""A router: the same server as on one machine, with a fleet behind its desk.

    broker -> who may connect (roster, joining) -> nodes (backend) -> who draws what (chooser) -> desk -> house

A router that starts reaches for the crown first. Only then does it take up jobs: another router may be at work on the
same database, and this one waits for it to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import platform
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdfleet import __version__
from sdfleet.compose.house import Ground, House, ground
from sdfleet.errors import InvalidValue, StoreUnavailable
from sdfleet.fleet.books import Books
from sdfleet.fleet.broker import Broker
from sdfleet.fleet.bus_nats import Credentials, connect
from sdfleet.fleet.catalog import FleetCatalog
from sdfleet.fleet.certificates import write_private
from sdfleet.fleet.chooser import PlacedByFleet
from sdfleet.fleet.control import Fleet
from sdfleet.fleet.cost import Predictor
from sdfleet.fleet.discovery import announced, own_addresses, place_of
from sdfleet.fleet.entries import pack_entry, unpack_entry
from sdfleet.fleet.joining import Joining
from sdfleet.fleet.language import FleetLanguage
from sdfleet.fleet.packing import BrokenMessage
from sdfleet.fleet.remote import FleetBackend
from sdfleet.fleet.runtime import FleetRuntime
from sdfleet.fleet.transport import Entry, Transport
from sdfleet.fleet.transport_nats import open_transport
from sdfleet.fleet.trust import Roster
from sdfleet.jobs.readiness import Readiness
from sdfleet.settings import Settings

if TYPE_CHECKING:
    from sdfleet.domain import Job, JobId
    from sdfleet.jobs.desk import JobDesk

log = logging.getLogger(__name__)

# What was learnt about speeds since then is lost when the router is killed: a few jobs teach it again.
SAVE_EVERY_S = 60.0
ENTER_AGAIN_S = 1.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """What a router talks over. broker: its own; None: another's. places: where nodes find it, for join codes."""

    transport: Transport
    broker: Broker | None
    places: tuple[str, ...]


@contextlib.asynccontextmanager
async def router(settings: Settings, *, job_body: Callable[[Job], bytes]) -> AsyncIterator[House]:
    """Everything a router needs, and its own broker unless SD_NATS_URL names another.

    Raises StoreUnavailable (no broker program, its port is taken, a broker that cannot be reached), StorageError.
    """
    async with ground(settings) as here:
        roster = await asyncio.to_thread(Roster.open, settings.home / "fleet", takes_guests=settings.join_requests)
        async with _lines(settings, roster) as lines, fleet_house(here, roster, lines, job_body=job_body) as house:
            if lines.broker is None or not settings.discovery or settings.broker_host in LOOPBACK:
                yield house
                return
            async with announced(
                name=platform.node(), port=settings.broker_port, version=__version__, fingerprint=roster.fingerprint
            ):
                yield house


@contextlib.asynccontextmanager
async def fleet_house(
    here: Ground, roster: Roster, lines: Lines, *, job_body: Callable[[Job], bytes]
) -> AsyncIterator[House]:
    """The router's parts over lines that stand already."""
    book = here.settings.home / "fleet" / "speeds.json"
    backend = FleetBackend(
        lines.transport,
        secret=roster.lease_secret,
        router=f"{platform.node()}:{here.settings.home}",  # one at a time: the folder is locked
        predictor=await asyncio.to_thread(_remembered, book),
        epoch=roster.epoch,
        note_epoch=roster.note_epoch,
    )
    runtime = FleetRuntime(
        catalog=FleetCatalog(
            here.settings.models_folder,
            models=backend.members.models,
            adapters=backend.members.adapters,
            gathers=lambda: backend.gathers,
        ),
        fleet=backend,
        safety_checker=here.settings.safety_checker,
    )
    books = Books(
        lines.transport.ledger,
        body=pack_entry,
        is_open=_is_open(here),
        unknown=_into_store(here),
        ended=lambda job, is_done: backend.ended(job, is_stored=is_done),
        is_live=lambda job: desk.is_open(job),  # noqa: PLW0108 - the desk is made below
    )
    desk = here.desk(
        runtime,
        job_body=job_body,
        chooser=PlacedByFleet(backend),
        ledger=books,
        observers=(books,),
        # While the disk is full, results stay in the spools of their nodes.
        output_patience_s=math.inf,
    )
    backend.knows_open = desk.is_open
    joining = Joining(
        lines.transport.bus, roster, broker=lines.broker, admit=backend.admit, places=lambda: lines.places
    )
    life = _Life(here, backend=backend, books=books, desk=desk, joining=joining, book=book)
    fleet = Fleet(
        backend,
        roster=roster,
        bus=lines.transport.bus,
        desk=desk,
        places=lambda: lines.places,
        has_own_broker=lines.broker is not None,
        apply=joining.apply,
        live=life.live,
        end=life.end,
    )
    language = FleetLanguage(backend, lines.transport.bus)
    async with runtime:
        await backend.open()
        await language.open()
        await joining.start()
        await fleet.open()
        try:
            yield here.house(runtime, desk, Readiness(life.prepare), language=language, fleet=fleet)
        finally:
            fleet.closes()
            await desk.close()
            await joining.close()
            await asyncio.to_thread(_remember, book, backend.predictor)


class _Life:
    """A router at work: from the crown to the end."""

    def __init__(
        self, here: Ground, *, backend: FleetBackend, books: Books, desk: JobDesk, joining: Joining, book: Path
    ) -> None:
        self._here = here
        self._backend = backend
        self._books = books
        self._desk = desk
        self._joining = joining
        self._book = book
        self._begun = asyncio.Event()
        self._ends = asyncio.Event()

    async def prepare(self, note: Callable[[str], None]) -> None:
        """Return when jobs are given out. See `Readiness`."""
        note("waiting for the crown: another router, or this one's last life, may hold it for some seconds")
        await self._begun.wait()
        note("this router gives out work")

    def end(self) -> None:
        """Let `live` return."""
        self._ends.set()

    async def live(self) -> None:
        """Return when the desk is closed; raise what one of the parts died of."""
        async with asyncio.TaskGroup() as tasks:
            chores: list[asyncio.Task[None]] = [tasks.create_task(self._joining.run(), name="joining")]
            try:
                await self._reign(tasks, chores)
            finally:
                for chore in chores:
                    chore.cancel()

    async def _reign(self, tasks: asyncio.TaskGroup, chores: list[asyncio.Task[None]]) -> None:
        waits = {asyncio.ensure_future(self._backend.reigned()), asyncio.ensure_future(self._ends.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
            await asyncio.wait(waits)
        if self._ends.is_set():
            return
        await self._desk.start()
        self._begun.set()
        chores.append(tasks.create_task(self._books.run(), name="ledger"))
        chores.append(tasks.create_task(self._enter_again(), name="jobs of an earlier life"))
        chores.append(tasks.create_task(self._remember(), name="speeds"))
        chores.append(tasks.create_task(self._end_with_the_reign(), name="crown"))
        await self._desk.stand()

    async def _end_with_the_reign(self) -> None:
        """Raise StoreUnavailable when another router reigns: it has taken up this one's jobs."""
        await self._backend.dethroned()
        raise StoreUnavailable(
            "another router reigns now", hint="this one ends; started again, it waits until it is needed"
        )

    async def _enter_again(self) -> None:
        """Jobs that are in the store and may be missing in the ledger: it was lost, or the router before it wrote."""
        cursor: str | None = None
        while True:
            jobs, following = await self._here.store.page(
                states=frozenset({"queued", "running"}), before=cursor, limit=100
            )
            try:
                await self._books.resume(jobs)
            except StoreUnavailable as exc:
                log.warning("jobs could not be entered in the ledger again yet", extra={"why": str(exc)})
                await asyncio.sleep(ENTER_AGAIN_S)
                continue
            if following is None:
                return
            cursor = following

    async def _remember(self) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            await asyncio.to_thread(_remember, self._book, self._backend.predictor)


def _is_open(here: Ground) -> Callable[[JobId], Awaitable[bool | None]]:
    async def is_open(job: JobId) -> bool | None:
        found = await here.store.job(job)
        return None if found is None else not found.has_ended

    return is_open


def _into_store(here: Ground) -> Callable[[Entry], Awaitable[bool]]:
    """For jobs that were accepted by a router whose database is gone. The desk finds them there within seconds."""

    async def take(entry: Entry) -> bool:
        try:
            job_id, submission = unpack_entry(entry.body)
        except BrokenMessage as exc:
            log.warning(
                "an accepted job of another router cannot be taken up", extra={"job_id": entry.job, "why": str(exc)}
            )
            return False
        job, _ = await here.store.accept(submission, job_id=job_id, max_queued=2**31)
        log.warning("an accepted job that this router did not know was taken up", extra={"job_id": job.id})
        return not job.has_ended

    return take


@contextlib.asynccontextmanager
async def _lines(settings: Settings, roster: Roster) -> AsyncIterator[Lines]:
    if settings.nats_url:
        async with _another(settings, roster) as transport:
            yield Lines(transport=transport, broker=None, places=settings.nats_url)
        return
    broker = Broker(
        settings.home / "fleet" / "broker", roster.broker_config(settings.broker_host, settings.broker_port)
    )
    await broker.start()
    try:
        host = settings.broker_host if settings.broker_host not in {"0.0.0.0", "::"} else "127.0.0.1"  # noqa: S104
        bus = await connect(
            (f"tls://{place_of(host, settings.broker_port)}",),
            name="router",
            credentials=roster.credentials(),
            tls=roster.tls(),
        )
        try:
            transport = await open_transport(bus)
            yield Lines(transport=transport, broker=broker, places=places_of(settings))
        finally:
            await bus.close()
    finally:
        await broker.close()


@contextlib.asynccontextmanager
async def _another(settings: Settings, roster: Roster) -> AsyncIterator[Transport]:
    """A broker that somebody else runs. Raises StoreUnavailable, InvalidValue."""
    seed = None if settings.nats_seed is None else settings.nats_seed.get_secret_value()
    bus = await connect(
        settings.nats_url,
        name="router",
        credentials=roster.credentials() if seed is None else Credentials(seed=seed),
        tls=_trusting(settings.nats_ca),
        is_pinned=False,
    )
    try:
        yield await open_transport(bus, replicas=settings.nats_replicas)
    finally:
        await bus.close()


def _trusting(authority: Path | None) -> ssl.SSLContext | None:
    if authority is None:
        return None
    try:
        return ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as exc:
        raise InvalidValue("nats_ca", f"{authority} cannot be used: {exc}") from exc


def places_of(settings: Settings) -> tuple[str, ...]:
    """Where nodes find the router's own broker, the likeliest first."""
    if settings.broker_host in LOOPBACK:
        names: tuple[str, ...] = ("127.0.0.1",)
    elif settings.broker_names:
        names = settings.broker_names
    elif settings.broker_host not in {"0.0.0.0", "::"}:  # noqa: S104 - what is listened on, not where we listen
        names = (settings.broker_host,)
    else:
        # The last two for nodes of this machine, and for networks whose names outlive its addresses.
        names = (*own_addresses()[:4], socket.gethostname(), "127.0.0.1")
    return tuple(dict.fromkeys(place_of(name, settings.broker_port) for name in names if name))[:6]


def _remembered(book: Path) -> Predictor:
    try:
        return Predictor.from_json(json.loads(book.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Predictor()
    except (OSError, ValueError, KeyError, TypeError) as exc:
        log.warning("what was learnt about the nodes' speeds cannot be read", extra={"why": str(exc)})
        return Predictor()


def _remember(book: Path, predictor: Predictor) -> None:
    try:
        write_private(book, json.dumps(predictor.to_json()).encode())
    except OSError as exc:
        log.warning("what was learnt about the nodes' speeds cannot be kept", extra={"why": str(exc)})
