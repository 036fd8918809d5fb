"""The backend over an engine of another project: our own supervisor around a process in its virtual environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sdfleet.backends.base import Capabilities, OnProgress
from sdfleet.backends.guests.venv import GuestVenv, guest_environment
from sdfleet.backends.local import LocalBackend
from sdfleet.domain import Drawing, ImageResult
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import fitting
from sdfleet.errors import BackendUnavailable


class GuestBackend(LocalBackend):
    """See `Backend`. The process starts with the first job; crashes, hangs and previews are as with our own engine."""

    def __init__(self, venv: GuestVenv, options: EngineOptions) -> None:
        super().__init__(options, command=venv.command, env=guest_environment(), name=venv.guest)
        self._venv = venv

    def capabilities(self) -> Capabilities:
        found = replace(super().capabilities(), tasks=("txt2img", "img2img"))
        if found.state in {"idle", "unavailable"} and (why := self._venv.reason()):
            return replace(found, state="unavailable", reason=why)
        return found

    async def start(self) -> None:
        self._check_is_here()
        await super().start()

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        self._check_is_here()
        result = await super().generate(drawing, on_progress)
        fitted = fitting.fit(self._venv.guest, Path(drawing.checkpoint))
        return replace(result, unsaid=fitting.unsaid(fitted, fitting.wish_of(drawing)))

    def _check_is_here(self) -> None:
        if why := self._venv.reason():
            raise BackendUnavailable(self._venv.guest, why)
