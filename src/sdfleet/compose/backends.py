"""What can draw beside this machine's own engine: one function for each."""

from __future__ import annotations

from sdfleet.backends import bfl_models
from sdfleet.backends.absent import AbsentBackend
from sdfleet.backends.choice import Way
from sdfleet.backends.guests.ways import ways
from sdfleet.catalog.cards import Card
from sdfleet.catalog.store import Catalog
from sdfleet.domain import ImageRequest
from sdfleet.engine.events import EngineOptions
from sdfleet.settings import Settings


def others(settings: Settings) -> tuple[Way, ...]:
    """Every way there is a name for, also those that cannot be used now: they say why."""
    return (_bfl(settings), _ollama(settings), *_guests(settings))


def _bfl(settings: Settings) -> Way:
    if settings.bfl_api_key is None:
        reason = "no key of Black Forest Labs is set: SD_BFL_API_KEY"
        absent = AbsentBackend(bfl_models.ID, reason)
        return Way(id=bfl_models.ID, backend=absent, reason=lambda: reason, check=bfl_models.check)
    # Here, so that a command that draws on this machine loads nothing to call others with.
    from sdfleet.backends.bfl import BflBackend
    from sdfleet.backends.orders import Orders

    backend = BflBackend(
        key=settings.bfl_api_key.get_secret_value(),
        endpoint=settings.bfl_endpoint,
        orders=Orders(settings.home / "backends" / bfl_models.ID / "orders"),
    )
    return Way(
        id=bfl_models.ID,
        backend=backend,
        reason=lambda: "",
        check=bfl_models.check,
        cards=bfl_models.cards,
        service=backend.host,
        is_ours=False,
    )


def _ollama(settings: Settings) -> Way:
    if settings.ollama_url is None:
        reason = "no Ollama is named: SD_OLLAMA_URL, for example http://127.0.0.1:11434"
        return Way(id="ollama", backend=AbsentBackend("ollama", reason), reason=lambda: reason, check=_nothing)
    from sdfleet.backends.ollama_images import ID, OllamaImages, check

    backend = OllamaImages(settings.ollama_url)
    return Way(
        id=ID,
        backend=backend,
        reason=backend.reason,
        check=check,
        cards=backend.cards,
        is_ours=False,
        # Last: a picture drawn there may push a language model out of its memory.
        rank=30,
        look=backend.look,
    )


def _nothing(_card: Card, _request: ImageRequest) -> tuple[str, ...]:
    """What `Way.check` is for what has no models."""
    return ()


def _guests(settings: Settings) -> tuple[Way, ...]:
    """mflux and DiffusionKit, with what of the engine's settings they know."""
    catalog = Catalog(settings.models_folder)
    options = EngineOptions(
        device=settings.device,
        dtype=settings.dtype,
        weights=settings.weights,
        text_weights=settings.text_weights,
        memory_mode=settings.memory_mode,
        memory_limit_bytes=settings.memory_limit,
    )
    return ways(settings.home, options, folder_of=lambda card: catalog.resolve(card.name).folder)
