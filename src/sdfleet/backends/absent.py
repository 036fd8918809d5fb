"""A backend that is not set up here: it says so, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

from sdfleet.backends.base import Capabilities, OnProgress
from sdfleet.domain import Drawing, ImageResult, JobId
from sdfleet.errors import BackendUnavailable


class AbsentBackend:
    """Stands in the place of one that would need a key, a program or an installation. reason: what is missing."""

    def __init__(self, name: str, reason: str) -> None:
        self._name = name
        self._reason = reason

    def capabilities(self) -> Capabilities:
        return Capabilities(name=self._name, state="unavailable", reason=self._reason, tasks=())

    async def start(self) -> None:
        self._refuse()

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        self._refuse()

    async def load(self, drawing: Drawing) -> None:
        self._refuse()

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Nothing: it has no jobs."""

    async def cancel(self, job_id: JobId) -> None:
        """Nothing: it has no jobs."""

    async def unload(self, checkpoint: str) -> None:
        """Nothing is held here."""

    async def pin(self, checkpoints: Collection[str]) -> None:
        """Nothing is held here."""

    async def close(self) -> None:
        """Nothing runs."""

    def _refuse(self) -> NoReturn:
        raise BackendUnavailable(self._name, self._reason)
