"""A server's parts, joined."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdfleet.catalog.store import Catalog
from sdfleet.compose.language import shelf_of
from sdfleet.compose.machine import standalone
from sdfleet.errors import InUse
from sdfleet.language.asking import Language
from sdfleet.language.counting import Counted
from sdfleet.language.shelf import Shelf
from sdfleet.runtime import Runtime
from sdfleet.settings import Settings

if TYPE_CHECKING:
    from sdfleet.domain import Job
    from sdfleet.fleet.control import Fleet
    from sdfleet.jobs.chooser import Chooser
    from sdfleet.jobs.desk import JobDesk
    from sdfleet.jobs.ledger import Ledger
    from sdfleet.jobs.observer import Observer
    from sdfleet.jobs.readiness import Readiness
    from sdfleet.metrics import Metrics
    from sdfleet.spans import Spans
    from sdfleet.storage.database import Database
    from sdfleet.storage.jobs import JobStore
    from sdfleet.storage.keys import KeyStore
    from sdfleet.storage.output_files import OutputFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """What a server is made of. language: models that write, embed or listen. fleet: where it is a router."""

    settings: Settings
    catalog: Catalog
    runtime: Runtime
    store: JobStore
    keys: KeyStore
    files: OutputFiles
    desk: JobDesk
    readiness: Readiness
    metrics: Metrics
    signing_key: bytes = field(repr=False)
    language: Language = field(default_factory=Shelf)
    fleet: Fleet | None = None

    async def stand(self) -> None:
        """Return when what gives out the work has ended; raise what it died of. For whoever must not go on without."""
        await (self.desk.stand() if self.fleet is None else self.fleet.stand())

    async def drain(self) -> None:
        """Take no more jobs, and give those that run the time of the settings; afterwards none is drawn here."""
        if self.fleet is not None:
            self.fleet.closes()
        await self.desk.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What a command needs that looks after jobs, pictures and keys, beside a server or without one."""

    jobs: JobStore
    keys: KeyStore
    files: OutputFiles


async def check_is_idle(jobs: JobStore, model: str) -> None:
    """Raise InUse while a job waits for this model or is drawn with it."""
    needed = [job_id for job_id, name in (await jobs.open_models()).items() if name == model]
    if needed:
        raise InUse(
            f"{model} is needed by {len(needed)} job{'s' if len(needed) > 1 else ''}, such as {needed[0]}",
            hint="wait until they have ended, or cancel them: sdfleet jobs cancel ID",
        )


@contextlib.asynccontextmanager
async def stores(settings: Settings) -> AsyncIterator[Stores]:
    """What is remembered on this machine; a server may be using it at the same time."""
    from sdfleet.storage.database import open_database
    from sdfleet.storage.jobs import JobStore
    from sdfleet.storage.keys import KeyStore
    from sdfleet.storage.output_files import OutputFiles

    url = None if settings.database_url is None else settings.database_url.get_secret_value()
    database = await open_database(url, home=settings.home)
    try:
        yield Stores(jobs=JobStore(database), keys=KeyStore(database), files=OutputFiles(settings.outputs_folder))
    finally:
        await database.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What any server stands on: its data folder, locked, with all that is remembered there."""

    settings: Settings
    database: Database
    store: JobStore
    files: OutputFiles
    metrics: Metrics
    spans: Spans | None
    signing_key: bytes = field(repr=False)

    def desk(
        self,
        runtime: Runtime,
        *,
        job_body: Callable[[Job], bytes],
        chooser: Chooser | None = None,
        ledger: Ledger | None = None,
        observers: tuple[Observer, ...] = (),
        output_patience_s: float | None = None,
    ) -> JobDesk:
        """A desk over this store, not started. observers: beside the metrics. The others: see `JobDesk`."""
        from sdfleet.jobs.desk import DeskOptions, JobDesk
        from sdfleet.jobs.drawer import OUTPUT_PATIENCE_S
        from sdfleet.jobs.observer import Several
        from sdfleet.jobs.retention import Keep, Retention
        from sdfleet.jobs.webhooks import Webhooks
        from sdfleet.storage.webhooks import WebhookStore

        settings = self.settings
        told: list[Observer] = [self.metrics, *([] if self.spans is None else [self.spans]), *observers]
        return JobDesk(
            store=self.store,
            files=self.files,
            runtime=runtime,
            options=DeskOptions(
                max_pictures=settings.max_pictures,
                max_queued=settings.max_queued,
                drain_s=settings.drain_s,
                output_patience_s=OUTPUT_PATIENCE_S if output_patience_s is None else output_patience_s,
            ),
            observer=Several(*told),
            webhooks=Webhooks(
                store=WebhookStore(self.database),
                jobs=self.store,
                body=job_body,
                secret=self.signing_key.hex(),
                allow_private=settings.allow_private_urls,
            ),
            retention=Retention(
                store=self.store,
                files=self.files,
                keep=Keep(outputs_days=settings.keep_outputs_days, jobs_days=settings.keep_jobs_days),
            ),
            chooser=chooser,
            ledger=ledger,
        )

    def house(
        self,
        runtime: Runtime,
        desk: JobDesk,
        readiness: Readiness,
        *,
        language: Language,
        fleet: Fleet | None = None,
    ) -> House:
        """The whole, for the API."""
        from sdfleet.storage.keys import KeyStore

        return House(
            settings=self.settings,
            catalog=runtime.catalog,
            runtime=runtime,
            store=self.store,
            keys=KeyStore(self.database),
            files=self.files,
            desk=desk,
            readiness=readiness,
            metrics=self.metrics,
            signing_key=self.signing_key,
            language=Counted(language, self.metrics),
            fleet=fleet,
        )


@contextlib.asynccontextmanager
async def ground(settings: Settings) -> AsyncIterator[Ground]:
    """The data folder of a server, for it alone. Raises StorageError if another server uses it."""
    # Here, so that one picture at the command line does not wait 0.4 s for a database and a server's other parts.
    from sdfleet.metrics import Metrics
    from sdfleet.spans import Spans
    from sdfleet.storage.database import open_database
    from sdfleet.storage.jobs import JobStore
    from sdfleet.storage.lock import alone
    from sdfleet.storage.output_files import OutputFiles
    from sdfleet.storage.signing import signing_key

    spans = None if settings.otel_endpoint is None else Spans(settings.otel_endpoint)
    with alone(settings.home):
        url = None if settings.database_url is None else settings.database_url.get_secret_value()
        database = await open_database(url, home=settings.home)
        try:
            yield Ground(
                settings=settings,
                database=database,
                store=JobStore(database),
                files=OutputFiles(settings.outputs_folder),
                metrics=Metrics(),
                spans=spans,
                signing_key=signing_key(settings.home),
            )
        finally:
            await database.close()
            if spans is not None:
                await asyncio.to_thread(spans.close)


@contextlib.asynccontextmanager
async def server(settings: Settings, *, job_body: Callable[[Job], bytes]) -> AsyncIterator[House]:
    """Everything a server needs, with the jobs of its last life taken up again; leaving it stops drawing.

    job_body: what a webhook is sent about a job. The default model is not loaded yet: see `Readiness.load`.
    Raises StorageError if another server uses the same home.
    """
    from sdfleet.jobs.readiness import Readiness, warm_up

    async with ground(settings) as here, standalone(settings) as runtime, shelf_of(settings) as language:
        desk = here.desk(runtime, job_body=job_body)
        await desk.start()
        try:
            yield here.house(runtime, desk, Readiness(warm_up(runtime, model=settings.model)), language=language)
        finally:
            await desk.close()
