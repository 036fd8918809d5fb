"""A server without HTTP, for a test that kills it: takes the jobs of a plan, says what it does, ends with the last one.

Run as `python -m tests.jobs.chaos_server FOLDER fake|local N_JOBS`. Every life submits the whole plan again with the
same keys, as a client does that never got its answer.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from sdfleet.backends.base import Backend
from sdfleet.backends.fake import FakeBackend
from sdfleet.backends.local import LocalBackend
from sdfleet.catalog.store import Catalog
from sdfleet.domain import Caller, Drawing, Idempotency, ImageRequest, OwnerId, Submission
from sdfleet.engine.events import EngineOptions
from sdfleet.jobs.desk import DeskOptions, JobDesk
from sdfleet.observe import start_logging
from sdfleet.runtime import Runtime
from sdfleet.storage.database import open_database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles
from tests.jobs.desks import toy_catalog


def plan(n_jobs: int, *, is_real: bool) -> list[Submission]:
    """The same jobs in every life: sizes, steps, owners and priorities mixed."""
    return [
        Submission(
            request=ImageRequest(
                prompt=f"a red circle number {i}",
                model="starter" if is_real else ("toy", "other")[i % 5 == 0],
                steps=2 + i % 3,
                seed=1000 * i,
                n_images=1 + i % 3,
                reproducible=is_real,
            ),
            caller=Caller(owner=OwnerId(f"owner-{i % 4}")),
            priority=i % 3,
            idempotency=Idempotency(key=f"job-{i}", fingerprint=str(i)),
        )
        for i in range(n_jobs)
    ]


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def step(drawing: Drawing, number: int) -> None:
    say("step", drawing.job_id, number)
    await asyncio.sleep(0.001)


async def serve(folder: Path, *, is_real: bool, n_jobs: int) -> None:
    # The fake backend's pictures depend on where the weights are: in one place for a calm and a disturbed run.
    catalog = Catalog(folder / "models") if is_real else toy_catalog(folder.parent)
    backend: Backend = LocalBackend(EngineOptions(n_threads=1)) if is_real else FakeBackend(before_step=step)
    database = await open_database(None, home=folder)
    async with (
        Runtime(catalog=catalog, backend=backend) as runtime,
        JobDesk(
            store=JobStore(database),
            files=OutputFiles(folder / "outputs"),
            runtime=runtime,
            # The engine is killed more often here than any job deserves.
            options=DeskOptions(max_pictures=8, max_deaths=100, patience_s=0.2),
        ) as desk,
    ):
        jobs = []
        for i, submission in enumerate(plan(n_jobs, is_real=is_real)):
            jobs.append(await desk.submit(submission))
            say("accepted", i, jobs[-1].id)
        for job in jobs:
            await desk.wait(job.id)
    await database.close()
    say("finished")


if __name__ == "__main__":
    start_logging("info", as_json=True, stream=sys.stdout)
    logging.getLogger("sdfleet").info("a life begins")
    asyncio.run(serve(Path(sys.argv[1]), is_real=sys.argv[2] == "local", n_jobs=int(sys.argv[3])))
