"""Backends over services that are not the real ones, quick to ask again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdfleet.backends.bfl import BflBackend, Pace
from sdfleet.backends.bfl_models import MODELS, Model, Numbers
from sdfleet.backends.orders import Orders
from tests.backends.bfl_server import KEY, BflServer

QUICK = Pace(poll_s=0.005, patience_s=30.0, first_pause_s=0.005, busy_s=1.0)
_NUMBERS = Numbers(least=1, most=1000, default=4)
# What the contract's drawings are of: any size, any steps.
TOY = Model(title="toy", sides=(16, 4096, 8), steps=_NUMBERS, guidance=_NUMBERS)


def bfl_backend(server: BflServer, folder: Path, **more: Any) -> BflBackend:
    """The backend of a server that answers as Black Forest Labs' does."""
    models = {**MODELS, "toy": TOY, "a": TOY, "b": TOY}
    given: dict[str, Any] = {"key": KEY, "endpoint": server.url, "models": models, "pace": QUICK}
    return BflBackend(orders=Orders(folder), **(given | more))
