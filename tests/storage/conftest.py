"""A stage for the stores: an open database, SQLite or PostgreSQL, and a clock that only tests move."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from sdfleet.domain import Caller, ImageRequest, Job, JobId, JobState, Output, OutputId, Picture, Submission
from sdfleet.storage.database import Database, open_database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.keys import KeyStore
from sdfleet.storage.webhooks import WebhookStore
from tests.storage import postgresql

T = TypeVar("T")

ERROR = {"code": "engine_failed", "message": "it fell over", "hint": "stand it up"}
STATES: tuple[JobState, ...] = ("queued", "running", "done", "failed", "cancelled")


@dataclass
class Clock:
    """Seconds since 1970 as the stores are told them."""

    now_s: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Stage:
    """The stores of one database, and short ways to what tests need of them."""

    database: Database
    clock: Clock
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.jobs = JobStore(self.database, clock=self.clock)
        self.keys = KeyStore(self.database, clock=self.clock)
        self.webhooks = WebhookStore(self.database)

    async def accept(self, submission: Submission | None = None, *, job_id: str | None = None, **asked: Any) -> Job:
        """A job that waits."""
        chosen = submission or submit(**asked)
        named = JobId(job_id or f"job{next(self._ids)}")
        job, _ = await self.jobs.accept(chosen, job_id=named, max_queued=1000)
        return job

    async def begun(self, **asked: Any) -> Job:
        """A job that runs."""
        job = await self.jobs.begin((await self.accept(**asked)).id)
        assert job is not None
        return job

    async def finished(self, *, n_outputs: int = 1, spent_s: float = 1.0, **asked: Any) -> Job:
        """A job that is done."""
        job = await self.begun(**asked)
        assert await self.finish(job, n_outputs=n_outputs, spent_s=spent_s)
        done = await self.jobs.job(job.id)
        assert done is not None
        return done

    async def finish(self, job: Job, *, n_outputs: int = 1, spent_s: float = 1.0) -> bool:
        """Whether the job was done by this call."""
        done = replace(
            job,
            outputs=tuple(output(job.id, i, created_s=self.clock.now_s) for i in range(n_outputs)),
            warnings=("it is only a toy",),
            timings_s={"load": 5.0, "denoise": spent_s, "total": 5.0 + spent_s},
            device="cpu",
            dtype="float32",
            rungs=("tiled decode",),
            node="n1",
        )
        return await self.jobs.finish(done)

    async def in_state(self, state: JobState) -> Job:
        """A job that has come so far."""
        match state:
            case "queued":
                return await self.accept()
            case "running":
                return await self.begun()
            case "done":
                return await self.finished()
            case "failed" | "cancelled":
                job = await self.accept()
                end = self.jobs.fail if state == "failed" else self.jobs.cancel
                assert await end(job.id, ERROR)
                found = await self.jobs.job(job.id)
                assert found is not None
                return found


def picture(mode: Literal["RGB", "L"] = "RGB") -> Picture:
    """Pixels that a request brings along."""
    return Picture(width_px=4, height_px=2, mode=mode, data=bytes(range(8 * (3 if mode == "RGB" else 1))))


def submit(*, owner: str = "local", max_queued: int | None = None, **asked: Any) -> Submission:
    """A submission; fields of the request and of the submission are told apart by name."""
    of_submission = {name: asked.pop(name) for name in list(asked) if name in Submission.__dataclass_fields__}
    caller = Caller(owner=owner, max_queued=max_queued)  # type: ignore[arg-type]
    request = ImageRequest(**{"prompt": "fox", "model": "toy", "width_px": 64, "height_px": 64, "seed": 5, **asked})
    return Submission(request=request, caller=caller, **of_submission)


def output(job_id: JobId, index: int = 0, *, created_s: float = 1.0) -> Output:
    """A finished picture of the job."""
    return Output(
        id=OutputId(f"{job_id}-{index}"), job_id=job_id, index=index, seed=2**64 - 1 - index, width_px=64, height_px=64,
        format="png", n_bytes=100, created_s=created_s,
    )  # fmt: skip


Play = Callable[[Callable[[Stage], Awaitable[T]]], T]


def play_on(url: str, story: Callable[[Stage], Awaitable[T]], *, clock: Clock | None = None) -> T:
    """What the story returns, played with the database open."""

    async def main() -> T:
        database = await open_database(url, home=Path("unused"))
        try:
            return await story(Stage(database, clock or Clock()))
        finally:
            await database.close()

    return asyncio.run(main())


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A running PostgreSQL server."""
    if postgresql.programs() is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    with postgresql.server() as url:
        yield url


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    return itertools.count(1)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path, _numbers: Iterator[int]) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    server: str = request.getfixturevalue("postgresql_url")
    import psycopg

    name = f"test_{next(_numbers)}"
    with psycopg.connect(server.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.format(name=name)


@pytest.fixture
def play(url: str) -> Play[Any]:
    """Plays a story on the stage; a second one finds what the first left."""
    return lambda story: play_on(url, story)
