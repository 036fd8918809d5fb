"""What this machine has and how it draws: checkpoints, hubs, the engine."""

from __future__ import annotations

import platform
from functools import partial
from typing import TYPE_CHECKING, assert_never

import psutil

from sdfleet.backends.base import Backend
from sdfleet.backends.choice import cards_of
from sdfleet.backends.fake import FakeBackend
from sdfleet.backends.local import LocalBackend
from sdfleet.backends.pool import EnginePool
from sdfleet.catalog.store import Catalog
from sdfleet.compose.backends import others
from sdfleet.engine.events import EngineOptions
from sdfleet.errors import InvalidValue
from sdfleet.runtime import Runtime
from sdfleet.settings import Settings, engine_environment

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import SecretStr

    from sdfleet.catalog.adapters import Adapter
    from sdfleet.catalog.cards import Card
    from sdfleet.catalog.hubs.hub import Hub, Source
    from sdfleet.catalog.single_file.layout import Prediction
    from sdfleet.catalog.store import Entry
    from sdfleet.engine.forecast import Question

BYTES_PER_GB = 2**30


def engine_options(settings: Settings) -> EngineOptions:
    """How the engine uses the device of this machine."""
    return EngineOptions(
        device=settings.device,
        dtype=settings.dtype,
        weights=settings.weights,
        text_weights=settings.text_weights,
        memory_mode=settings.memory_mode,
        max_rows=settings.max_rows,
        memory_limit_bytes=settings.memory_limit,
        n_threads=settings.threads,
        executor=settings.executor,
        compile=settings.compile,
        cache_folder=str(settings.cache_folder / "openvino"),
        rehearses=True,
    )


def hardware() -> dict[str, object]:
    """What this machine is made of, as /fleet/status shows it."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return {
        "memory_total_gb": round(psutil.virtual_memory().total / BYTES_PER_GB, 2),
        "cores_physical": cores,
        "chip": platform.processor() or platform.machine(),
        "memory_bandwidth_gbps": 0.0,
        "arch": platform.machine(),
    }


def catalog(settings: Settings) -> Catalog:
    """The checkpoints of this machine, and what is drawn elsewhere as far as that is known without asking."""
    return Catalog(settings.models_folder, elsewhere=partial(cards_of, others(settings)))


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


def import_adapter(settings: Settings, path: Path, *, name: str | None) -> Adapter | None:
    """A LoRA or an embedding, copied into its folder; None when the path is no file of these.

    A folder is PEFT's, with adapter_model.safetensors in it. Raises PickleRefused, and as `Adapters.add`.
    """
    from sdfleet.catalog.adapters import PEFT_FILE

    path = path.expanduser()
    file = path / PEFT_FILE if path.is_dir() else path
    if not file.is_file():
        return None
    adapters = catalog(settings).adapters
    facts = adapters.identify(file)
    return None if facts is None else adapters.add(file, facts, name=name)


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


def forecast_question(card: Card, settings: Settings, *, budget_s: float, all_formats: bool = True) -> Question | None:
    """What to ask engine/forecast.py about a picture of this card as it comes; None where its networks are unknown.

    budget_s: how long this machine's speed may be measured for. all_formats: also those that would not be used.
    """
    from sdfleet.catalog import architectures
    from sdfleet.engine.forecast import Question

    name = card.architecture or card.name
    if card.backend is not None or name not in architectures.names():
        return None
    return Question(
        architecture=name,
        family=card.family,
        width_px=card.width_px,
        height_px=card.height_px,
        steps=card.steps,
        guidance=card.guidance,
        sampler=card.sampler,
        device=settings.device,
        dtype=settings.dtype,
        weights=settings.weights,
        text_weights=settings.text_weights,
        limit_bytes=settings.memory_limit,
        n_threads=settings.threads,
        book_folder=str(settings.cache_folder / "speed"),
        budget_s=budget_s,
        all_formats=all_formats,
    )


def standalone(settings: Settings) -> Runtime:
    """Everything for one machine: its checkpoints, and an engine that starts with the first job."""
    ways = others(settings)
    return Runtime(
        catalog=Catalog(settings.models_folder, elsewhere=partial(cards_of, ways)),
        backend=_backend(settings),
        others=ways,
        default_backend=settings.default_backend,
        keep_alive_s=settings.keep_alive,
        safety_checker=settings.safety_checker,
        previews_before_check=settings.previews_before_check,
    )


def _backend(settings: Settings) -> Backend:
    match settings.backend:
        case "local":
            options, make = engine_options(settings), partial(LocalBackend, env=engine_environment())
            if settings.engines == 1:
                return make(options)
            notes_folder = settings.cache_folder / "engines"
            return EnginePool(options, n_engines=settings.engines, notes_folder=notes_folder, make=make)
        case "fake":
            return FakeBackend(step_s=settings.fake_step_s)
        case _:
            assert_never(settings.backend)
