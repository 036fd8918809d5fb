"""Where objects are built and joined; nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

from sdfleet.backends.base import Backend
from sdfleet.backends.fake import FakeBackend
from sdfleet.backends.local import LocalBackend
from sdfleet.backends.pool import EnginePool
from sdfleet.catalog.store import Catalog
from sdfleet.engine.events import EngineOptions
from sdfleet.errors import InUse, InvalidValue
from sdfleet.runtime import Runtime
from sdfleet.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import SecretStr

    from sdfleet.catalog.hubs.hub import Hub, Source
    from sdfleet.catalog.single_file.layout import Prediction
    from sdfleet.catalog.store import Entry
    from sdfleet.domain import Job
    from sdfleet.jobs.desk import JobDesk
    from sdfleet.jobs.readiness import Readiness
    from sdfleet.metrics import Metrics
    from sdfleet.storage.jobs import JobStore
    from sdfleet.storage.keys import KeyStore
    from sdfleet.storage.output_files import OutputFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """What a server is made of."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What a command needs that looks after jobs, pictures and keys, beside a server or without one."""

    jobs: JobStore
    keys: KeyStore
    files: OutputFiles


def engine_options(settings: Settings) -> EngineOptions:
    """How the engine uses the device of this machine."""
    return EngineOptions(
        device=settings.device,
        dtype=settings.dtype,
        weights=settings.weights,
        memory_mode=settings.memory_mode,
        max_rows=settings.max_rows,
        memory_limit_bytes=settings.memory_limit,
        n_threads=settings.threads,
        executor=settings.executor,
        compile=settings.compile,
        cache_folder=str(settings.cache_folder / "openvino"),
    )


def catalog(settings: Settings) -> Catalog:
    """The checkpoints of this machine."""
    return Catalog(settings.models_folder)


def import_checkpoint(
    settings: Settings, path: Path, *, name: str | None, base: str | None, prediction: Prediction | None
) -> tuple[Entry, tuple[str, ...]]:
    """Make a folder in the diffusers layout, or a single file, known; and what a person should know of it.

    name: its own, in small letters, where None. Raises as `Catalog.add` and `import_file`.
    """
    from sdfleet.catalog.single_file.importing import import_file, name_from

    def check(folder: Path) -> None:
        from sdfleet.engine.single_file import check as check_weights

        check_weights(folder)

    known, name = catalog(settings), name_from(path) if name is None else name
    if not path.expanduser().is_file():
        if base is not None or prediction is not None:
            raise InvalidValue("path", f"{path} is no single file", hint="--base and --prediction are for single files")
        return known.add(path, name=name), ()
    imported = import_file(known, path, name=name, base=base, prediction=prediction, check=check)
    return imported.entry, imported.notes


def hub(settings: Settings, source: Source | None = None) -> Hub:
    """Where weights are downloaded from; the one of the settings, unless another is named. Nothing is asked yet."""
    from sdfleet.catalog.hubs import hugging_face, modelscope
    from sdfleet.catalog.hubs.hub import Access

    def access(endpoint: str, token: SecretStr | None, officials: tuple[str, ...]) -> Access:
        return Access(
            endpoint=endpoint,
            token=None if token is None else token.get_secret_value(),
            sends_token=endpoint in officials or settings.token_to_mirror,
        )

    chosen = source or settings.hub
    match chosen:
        case "hf":
            return hugging_face.HuggingFace(access(settings.hf_endpoint, settings.hf_token, (hugging_face.OFFICIAL,)))
        case "modelscope":
            officials = (modelscope.OFFICIAL, modelscope.INTERNATIONAL)
            return modelscope.ModelScope(
                access(settings.modelscope_endpoint, settings.modelscope_token, officials),
                notes_folder=settings.cache_folder / "modelscope",
            )
        case _:
            assert_never(chosen)


def standalone(settings: Settings) -> Runtime:
    """Everything for one machine: its checkpoints, and an engine that starts with the first job."""
    return Runtime(catalog=catalog(settings), backend=_backend(settings))


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


@contextlib.asynccontextmanager
async def server(settings: Settings, *, job_body: Callable[[Job], bytes]) -> AsyncIterator[House]:
    """Everything a server needs, with the jobs of its last life taken up again; leaving it stops drawing.

    job_body: what a webhook is sent about a job. The default model is not loaded yet: see `Readiness.load`.
    Raises StorageError if another server uses the same home.
    """
    # Here, so that one picture at the command line does not wait 0.4 s for a database and a server's other parts.
    from sdfleet.jobs.desk import DeskOptions, JobDesk
    from sdfleet.jobs.observer import Several
    from sdfleet.jobs.readiness import Readiness
    from sdfleet.jobs.retention import Keep, Retention
    from sdfleet.jobs.webhooks import Webhooks
    from sdfleet.metrics import Metrics
    from sdfleet.spans import Spans
    from sdfleet.storage.database import open_database
    from sdfleet.storage.jobs import JobStore
    from sdfleet.storage.keys import KeyStore
    from sdfleet.storage.lock import alone
    from sdfleet.storage.output_files import OutputFiles
    from sdfleet.storage.signing import signing_key
    from sdfleet.storage.webhooks import WebhookStore

    spans = None if settings.otel_endpoint is None else Spans(settings.otel_endpoint)
    with alone(settings.home):
        url = None if settings.database_url is None else settings.database_url.get_secret_value()
        database = await open_database(url, home=settings.home)
        try:
            async with standalone(settings) as runtime:
                store, files, metrics = JobStore(database), OutputFiles(settings.outputs_folder), Metrics()
                key = signing_key(settings.home)
                desk = JobDesk(
                    store=store,
                    files=files,
                    runtime=runtime,
                    options=DeskOptions(
                        max_pictures=settings.max_pictures, max_queued=settings.max_queued, drain_s=settings.drain_s
                    ),
                    observer=metrics if spans is None else Several(metrics, spans),
                    webhooks=Webhooks(
                        store=WebhookStore(database),
                        jobs=store,
                        body=job_body,
                        secret=key.hex(),
                        allow_private=settings.allow_private_urls,
                    ),
                    retention=Retention(
                        store=store,
                        files=files,
                        keep=Keep(outputs_days=settings.keep_outputs_days, jobs_days=settings.keep_jobs_days),
                    ),
                )
                await desk.start()
                try:
                    yield House(
                        settings=settings,
                        catalog=runtime.catalog,
                        runtime=runtime,
                        store=store,
                        keys=KeyStore(database),
                        files=files,
                        desk=desk,
                        readiness=Readiness(runtime, model=settings.model),
                        metrics=metrics,
                        signing_key=key,
                    )
                finally:
                    await desk.close()
        finally:
            await database.close()
            if spans is not None:
                await asyncio.to_thread(spans.close)


def _backend(settings: Settings) -> Backend:
    match settings.backend:
        case "local":
            options = engine_options(settings)
            if settings.engines == 1:
                return LocalBackend(options)
            return EnginePool(options, n_engines=settings.engines, notes_folder=settings.cache_folder / "engines")
        case "fake":
            return FakeBackend()
        case _:
            assert_never(settings.backend)
