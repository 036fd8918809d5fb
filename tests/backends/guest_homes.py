"""Real engines of other projects for tests: installed once, by the command that people use, into build/guests."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from sdfleet.backends.guests.backend import GuestBackend
from sdfleet.backends.guests.venv import GuestVenv, why_not_here
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests.fitting import GuestId
from sdfleet.settings import environment_with

HOME = Path(__file__).resolve().parents[2] / "build" / "guests"


@functools.cache
def _why_not(guest: GuestId) -> str:
    """Why this guest cannot be had here; empty when it stands."""
    if why := why_not_here():
        return why
    command = [sys.executable, "-m", "sdfleet", "backend", "install", guest, "--yes"]
    done = subprocess.run(
        command, env=environment_with({"SD_HOME": str(HOME)}), capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return ""
    why = done.stderr.strip().splitlines()[-1]
    if "could not be installed" not in why:
        pytest.fail(why)
    return why


def real_guest(guest: GuestId, options: EngineOptions | None = None) -> GuestBackend:
    """A backend over the real engine; skips the test, with the reason, where its packages cannot be installed."""
    if why := _why_not(guest):
        pytest.skip(why)
    return GuestBackend(GuestVenv(HOME, guest), options or EngineOptions())
