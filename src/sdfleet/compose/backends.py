"""What can draw beside this machine's own engine: one function for each."""

from __future__ import annotations

from sdfleet.backends import bfl_models
from sdfleet.backends.absent import AbsentBackend
from sdfleet.backends.choice import Way
from sdfleet.settings import Settings


def others(settings: Settings) -> tuple[Way, ...]:
    """Every way there is a name for, also those that cannot be used now: they say why."""
    return (_bfl(settings),)


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
