"""The engine gets ready while the request is still looked at, and is gone when the request is refused."""

from __future__ import annotations

import psutil
import pytest

from sdfleet.backends.base import OnProgress
from sdfleet.backends.fake import FakeBackend
from sdfleet.backends.local import LocalBackend
from sdfleet.compose import machine
from sdfleet.domain import Drawing, ImageRequest, ImageResult, JobId
from sdfleet.engine.events import EngineOptions
from sdfleet.errors import EngineDied
from sdfleet.runtime import Prepared, Runtime
from tests.cli.conftest import Run


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order."""
    told: list[str] = []

    class Noting(FakeBackend):
        async def start(self) -> None:
            told.append("engine started")
            raise EngineDied("there is no device")  # whoever draws meets it too, and is told then

        async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
            told.append("drawn")
            return await super().generate(drawing, on_progress)

    prepare = Runtime.prepare

    async def noting(
        self: Runtime, request: ImageRequest, *, wants_previews: bool = False, job_id: JobId | None = None
    ) -> Prepared:
        prepared = await prepare(self, request, wants_previews=wants_previews, job_id=job_id)
        told.append("request looked at")
        return prepared

    monkeypatch.setattr(machine, "_backend", lambda _settings: Noting())
    monkeypatch.setattr(Runtime, "prepare", noting)
    return told


def test_the_engine_starts_before_the_request_has_been_looked_at(run: Run, noted: list[str]) -> None:
    assert run("generate", "a fox").code == 0
    assert noted == ["engine started", "request looked at", "drawn"]


def test_a_refused_request_is_told_as_ever_and_leaves_no_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[LocalBackend] = []

    def backend(_settings: object) -> LocalBackend:
        begun.append(LocalBackend(EngineOptions()))
        return begun[0]

    monkeypatch.setattr(machine, "_backend", backend)
    before = psutil.Process().children()
    answer = run("generate", "a fox", "--model", "nope")

    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: there is no model named 'nope'")
    assert begun[0].capabilities().state == "closed"
    assert psutil.Process().children() == before
