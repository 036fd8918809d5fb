"""Desks for the tests: a real store and real files in a folder, and the fake backend."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdfleet.backends.base import Backend
from sdfleet.backends.fake import FakeBackend
from sdfleet.catalog.cards import Card
from sdfleet.catalog.store import BuiltIn, Catalog
from sdfleet.domain import Caller, Drawing, ImageRequest, JobId, OwnerId, Submission
from sdfleet.errors import SdfleetError
from sdfleet.jobs.desk import DeskOptions, JobDesk
from sdfleet.runtime import Runtime
from sdfleet.storage.database import Database, open_database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles
from tests.catalog.folders import write_sd


def toy_catalog(folder: Path, *names: str) -> Catalog:
    """Models that the fake backend can draw."""
    weights = folder / "weights"
    if not weights.exists():
        write_sd(weights)
    facts: dict[str, Any] = {"family": "sd", "width_px": 32, "height_px": 32, "steps": 4, "guidance": 3.0}
    cards = [Card.model_validate({"name": name, "sampler": "euler", **facts}) for name in names or ("toy", "other")]
    return Catalog(folder / "models", built_in=tuple(BuiltIn(card, lambda: weights) for card in cards))


def submission(prompt: str = "fox", *, owner: str = "local", priority: int = 0, **asked: Any) -> Submission:
    """A small request. Fields of Submission are told from those of ImageRequest by their names."""
    outer = {name: asked.pop(name) for name in list(asked) if name in Submission.__dataclass_fields__}
    request = ImageRequest(**{"prompt": prompt, "model": "toy", **asked})
    return Submission(request=request, caller=Caller(owner=OwnerId(owner)), priority=priority, **outer)


@dataclass(slots=True)
class Held:
    """A gate before each step of every job whose prompt says `hold`. reached: a first step was asked for."""

    gate: asyncio.Event
    reached: asyncio.Event
    drawn: list[str]

    async def before_step(self, drawing: Drawing, step: int) -> None:
        if step == 1:
            self.drawn.append(drawing.prompt)
            self.reached.set()
        if "hold" in drawing.prompt:
            await self.gate.wait()
        await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Place:
    """One desk and what it stands on."""

    desk: JobDesk
    store: JobStore
    files: OutputFiles
    backend: Backend
    database: Database
    held: Held


@contextlib.asynccontextmanager
async def opened(
    folder: Path,
    *,
    backend: Callable[[Held], Backend] | None = None,
    script: Sequence[SdfleetError | None] = (),
    store: Callable[[Database], JobStore] = JobStore,
    start: bool = True,
    drain_s: float = 0.0,
    desk: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Place]:
    """A started desk; closed, with its database and backend, on leaving."""
    held = Held(asyncio.Event(), asyncio.Event(), [])
    made = FakeBackend(before_step=held.before_step, script=script) if backend is None else backend(held)
    database = await open_database(None, home=folder)
    try:
        runtime = Runtime(catalog=toy_catalog(folder), backend=made)
        jobs, files = store(database), OutputFiles(folder / "outputs")
        built = JobDesk(
            store=jobs,
            files=files,
            runtime=runtime,
            options=DeskOptions(**{"sync_s": None, "drain_s": drain_s, **options}),
            **(desk or {}),
        )
        async with runtime:
            if start:
                await built.start()
            try:
                yield Place(built, jobs, files, made, database, held)
            finally:
                await built.close()
    finally:
        await database.close()


async def begun(place: Place, job_id: JobId) -> None:
    """Return when the job is being drawn."""
    async with contextlib.aclosing(place.desk.watch(job_id)) as events:
        async for event in events:
            if event.status.job.state == "running":
                return


def tell(story: Callable[[], Awaitable[None]], *, within_s: float = 60.0) -> None:
    """Run one story; no task may be left behind."""

    async def told() -> None:
        async with asyncio.timeout(within_s):
            await story()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(told())
