"""Where objects are built and joined; nowhere else."""

from __future__ import annotations

from typing import assert_never

from sdfleet.backends.base import Backend
from sdfleet.backends.fake import FakeBackend
from sdfleet.backends.local import LocalBackend
from sdfleet.catalog.store import Catalog
from sdfleet.engine.events import EngineOptions
from sdfleet.runtime import Runtime
from sdfleet.settings import Settings


def engine_options(settings: Settings) -> EngineOptions:
    """How the engine uses the device of this machine."""
    return EngineOptions(
        device=settings.device,
        dtype=settings.dtype,
        memory_mode=settings.memory_mode,
        max_rows=settings.max_rows,
        memory_limit_bytes=settings.memory_limit,
        n_threads=settings.threads,
        executor=settings.executor,
        cache_folder=str(settings.cache_folder / "openvino"),
    )


def catalog(settings: Settings) -> Catalog:
    """The checkpoints of this machine."""
    return Catalog(settings.models_folder)


def standalone(settings: Settings) -> Runtime:
    """Everything for one machine: its checkpoints, and an engine that starts with the first job."""
    return Runtime(catalog=catalog(settings), backend=_backend(settings))


def _backend(settings: Settings) -> Backend:
    match settings.backend:
        case "local":
            return LocalBackend(engine_options(settings))
        case "fake":
            return FakeBackend()
        case _:
            assert_never(settings.backend)
