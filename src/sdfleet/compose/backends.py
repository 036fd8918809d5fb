"""What can draw beside this machine's own engine: one line for each."""

from __future__ import annotations

from sdfleet.backends.choice import Way
from sdfleet.settings import Settings


def others(_settings: Settings) -> tuple[Way, ...]:
    """Every way there is a name for, also those that cannot be used now: they say why."""
    return ()
