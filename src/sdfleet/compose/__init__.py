"""Where objects are built and joined; nowhere else.

machine.py   this machine's checkpoints and engine         cli
house.py     a server over them                            `sdfleet serve`
routing.py   a server whose backend is a fleet             `sdfleet router`; needs the extra `fleet`
noding.py    one device of a fleet                         `sdfleet node`; needs the extra `fleet`
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sdfleet.compose.house import House, Stores, check_is_idle, server, stores
from sdfleet.compose.machine import (
    catalog,
    engine_options,
    forecast_question,
    hub,
    import_adapter,
    import_checkpoint,
    standalone,
)
from sdfleet.errors import StorageError

if TYPE_CHECKING:
    from sdfleet.compose.noding import Device, ServedNode
    from sdfleet.domain import Job
    from sdfleet.settings import Settings

__all__ = [
    "House",
    "Stores",
    "catalog",
    "check_is_idle",
    "engine_options",
    "forecast_question",
    "hub",
    "import_adapter",
    "import_checkpoint",
    "need_fleet_extra",
    "node",
    "router",
    "server",
    "standalone",
    "stores",
]

# Of the extra `fleet`; nothing else imports them.
_FLEET_PACKAGES = ("cryptography", "nats", "zeroconf")


def need_fleet_extra() -> None:
    """Raise StorageError unless the packages of the extra `fleet` are installed."""
    missing = [name for name in _FLEET_PACKAGES if find_spec(name) is None]
    if missing:
        raise StorageError(
            f"a fleet needs packages that are not here: {', '.join(missing)}", hint="pip install 'sdfleet[fleet]'"
        )


@contextlib.asynccontextmanager
async def router(settings: Settings, *, job_body: Callable[[Job], bytes]) -> AsyncIterator[House]:
    """See `routing.router`, which is imported only now: one machine alone needs none of its packages."""
    need_fleet_extra()
    from sdfleet.compose import routing

    async with routing.router(settings, job_body=job_body) as house:
        yield house


@contextlib.asynccontextmanager
async def node(settings: Settings, device: Device) -> AsyncIterator[ServedNode]:
    """See `noding.node`, which is imported only now."""
    need_fleet_extra()
    from sdfleet.compose import noding

    async with noding.node(settings, device) as here:
        yield here
