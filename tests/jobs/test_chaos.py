"""`kill -9` of server and engine at any moment: each accepted job is done, once, with the pictures of a calm run."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sdfleet.domain import Job
from sdfleet.storage import pictures
from sdfleet.storage.database import open_database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles

ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Heard:
    """What the lives of a server said. A line that a kill tore is no line."""

    accepted: dict[int, str] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    n_lives: int = 0
    n_engines_killed: int = 0
    is_finished: bool = False


def live(
    folder: Path,
    kind: str,
    n_jobs: int,
    heard: Heard,
    *,
    kill_after: int | None = None,
    kill_engine_after: int | None = None,
) -> None:
    """One life: it ends by itself, or by SIGKILL after so many lines; its engine may be killed before."""
    command = [sys.executable, "-m", "tests.jobs.chaos_server", str(folder), kind, str(n_jobs)]
    heard.n_lives += 1
    engine: int | None = None
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        for n_lines, line in enumerate(server.stdout):
            if line.startswith("accepted ") and line.endswith("\n"):
                _, number, job_id = line.split()
                assert heard.accepted.setdefault(int(number), job_id) == job_id
            elif line.startswith("finished"):
                heard.is_finished = True
            elif line.startswith("{") and line.endswith("\n"):
                said = json.loads(line)
                heard.done[said.get("job_id", "")] += said["message"] == "job done"
                engine = said["pid"] if said["message"] == "engine is ready" else engine
            if kill_engine_after is not None and n_lines >= kill_engine_after and engine is not None:
                os.kill(engine, signal.SIGKILL)
                engine, kill_engine_after = None, None
                heard.n_engines_killed += 1
            if n_lines == kill_after:
                server.kill()
    assert kill_after is not None or server.returncode == 0


def results(folder: Path) -> tuple[list[Job], OutputFiles]:
    async def read() -> list[Job]:
        database = await open_database(None, home=folder)
        try:
            found, _ = await JobStore(database).page(limit=200)
            return found
        finally:
            await database.close()

    return asyncio.run(read()), OutputFiles(folder / "outputs")


def drawn(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Seed and pixels of every picture, by the key of its job."""
    jobs, files = results(folder)
    found = {}
    for job in jobs:
        assert job.submission.idempotency is not None
        found[job.submission.idempotency.key] = [
            (output.seed, pictures.decode(files.read(output)).data) for output in job.outputs
        ]
    return found


def chaos(folder: Path, kind: str, *, n_jobs: int, lines: range, seed: int) -> Heard:
    """Lives until all has ended; each but the last is killed at a line drawn by lot, its engine at an earlier one."""
    luck, heard = random.Random(seed), Heard()
    while not heard.is_finished:
        assert heard.n_lives < 60
        kill_after = luck.choice(lines)
        live(folder, kind, n_jobs, heard, kill_after=kill_after, kill_engine_after=luck.randrange(kill_after + 1))
    return heard


def check(folder: Path, heard: Heard, *, n_jobs: int) -> None:
    jobs, files = results(folder)
    assert {job.id for job in jobs} == set(heard.accepted.values())
    assert len(jobs) == n_jobs
    assert {job.state for job in jobs} == {"done"}
    assert all(len(job.outputs) == job.request.n_images for job in jobs)
    assert max(heard.done.values()) == 1
    assert files.usage().n_files == sum(job.request.n_images for job in jobs), "a file that belongs to no job"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_fifty_jobs_survive_a_server_that_is_killed_at_random_moments(tmp_path: Path, seed: int) -> None:
    undisturbed = Heard()
    live(tmp_path / "calm", "fake", 50, undisturbed)
    heard = chaos(tmp_path / "chaos", "fake", n_jobs=50, lines=range(260), seed=seed)
    assert heard.n_lives > 2
    check(tmp_path / "chaos", heard, n_jobs=50)
    assert drawn(tmp_path / "chaos") == drawn(tmp_path / "calm")


# The same through HTTP, in one run, is in tests/api/test_chaos.py and not so thorough.
@pytest.mark.slow
@pytest.mark.thorough
def test_fifty_real_jobs_survive_kills_of_the_server_and_of_the_engine(tmp_path: Path) -> None:
    undisturbed = Heard()
    live(tmp_path / "calm", "local", 50, undisturbed)
    heard = chaos(tmp_path / "chaos", "local", n_jobs=50, lines=range(50, 120), seed=3)
    assert heard.n_lives > 2
    assert heard.n_engines_killed > 0
    check(tmp_path / "chaos", heard, n_jobs=50)
    assert drawn(tmp_path / "chaos") == drawn(tmp_path / "calm")
