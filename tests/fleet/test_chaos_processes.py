"""`kill -9` of nodes, router and broker, with real processes: each accepted job is done once, with its own picture."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdfleet import compose
from sdfleet.domain import ImageRequest, Job, JobId
from sdfleet.settings import load_settings
from sdfleet.storage.database import open_database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles
from tests.fleet.real_fleet import Asked, Clients, RealFleet, real_fleet

# Fake devices: seconds of a step on those of speed 1, 2 and 4.
STEP_S = {"n1": 0.16, "n2": 0.08, "n4": 0.04}
N_CLIENTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a run came to. wasted: executions beyond one for each job."""

    n_jobs: int
    n_done: int
    n_executions: int
    n_again: int
    kills: Counter[str]

    @property
    def wasted(self) -> int:
        return self.n_executions - self.n_jobs

    @property
    def n_node_kills(self) -> int:
        return sum(n for who, n in self.kills.items() if who in STEP_S)


def work(n_jobs: int) -> list[Asked]:
    """The same jobs in every run."""
    return [
        Asked(key=f"job-{i}", prompt=f"a red circle number {i}", seed=1000 * i, steps=4 + i % 5) for i in range(n_jobs)
    ]


def plan(n_jobs: int, n_kills: int, *, luck: random.Random) -> list[tuple[int, str]]:
    """Who is killed after how many more pictures: each kind in its turn, some at the same moment as the one before."""
    kinds = [("broker", "router", "node")[i % 3] for i in range(n_kills)]
    luck.shuffle(kinds)
    most = n_jobs * 4 // 5 // max(1, n_kills)
    targets = [luck.choice(sorted(STEP_S)) if kind == "node" else kind for kind in kinds]
    return [(0 if i and luck.random() < 0.2 else luck.randint(1, most), who) for i, who in enumerate(targets)]


def disturbed(fleet: RealFleet, asked: list[Asked], kills: list[tuple[int, str]]) -> tuple[Counts, dict[str, bytes]]:
    """All these jobs, through all these kills; returns when every client has its picture and nothing is left over."""
    clients = Clients(fleet, asked)
    n_left = len(asked)
    clients.start(N_CLIENTS)
    try:
        for n_more, who in kills:
            clients.wait_for(n_more)
            n_left -= n_more
            fleet.kill(who)
        clients.wait_for(n_left)
    finally:
        clients.close()
    assert clients.refused == []
    fleet.wait_for_nodes()
    fleet.until(lambda: not fleet.spooled(), what="empty spools")
    counts = Counts(
        n_jobs=len(asked),
        n_done=sum(Counter(r["job_id"] for r in fleet.router.said("job done")).values()),
        n_executions=len(fleet.executions()),
        n_again=clients.again,
        kills=Counter(who for _, who in kills),
    )
    sys.stdout.write(f"{counts} wasted {counts.wasted}\n")
    return counts, clients.pixels


async def _calm(asked: list[Asked], **settings: object) -> dict[str, bytes]:
    """The pictures of the same jobs on one machine, one after the other."""
    async with compose.standalone(load_settings(for_server=False, **settings)) as runtime:
        found = {}
        for one in asked:
            request = ImageRequest(
                prompt=one.prompt, model="starter", width_px=128, height_px=128, steps=one.steps, seed=one.seed
            )
            prepared = await runtime.prepare(request, job_id=JobId(one.key))
            (image,) = (await runtime.draw(prepared)).images
            found[one.key] = image.picture.data
        return found


async def _stored(home: Path) -> list[Job]:
    database = await open_database(None, home=home)
    try:
        jobs, before = await JobStore(database).page(limit=100)
        while before is not None:
            more, before = await JobStore(database).page(before=before, limit=100)
            jobs += more
        return jobs
    finally:
        await database.close()


def check(folder: Path, asked: list[Asked], counts: Counts, pixels: dict[str, bytes]) -> None:
    """No job lost, none done twice, none drawn again without need. Called when the fleet has ended."""
    jobs = asyncio.run(_stored(folder / "router"))
    by_key = {job.submission.idempotency.key: job for job in jobs if job.submission.idempotency is not None}
    assert sorted(by_key) == sorted(one.key for one in asked)
    assert len(jobs) == len(asked)
    assert {job.state for job in jobs} == {"done"}
    assert counts.n_done == len(asked), "a job was done twice"
    assert OutputFiles(folder / "router" / "outputs").usage().n_files == len(asked), "a file that belongs to no job"
    assert counts.wasted <= counts.n_node_kills
    assert pixels.keys() == by_key.keys()


def chaos(folder: Path, *, n_jobs: int, n_kills: int, seed: int) -> None:
    """Fake devices of speeds 1, 2 and 4."""
    asked = work(n_jobs)
    with real_fleet(folder) as fleet:
        for name, step_s in STEP_S.items():
            fleet.add_node(name, SD_BACKEND="fake", SD_FAKE_STEP_S=step_s)
        fleet.wait_for_nodes()
        counts, pixels = disturbed(fleet, asked, plan(n_jobs, n_kills, luck=random.Random(seed)))
        assert fleet.faults() == []
    check(folder, asked, counts, pixels)
    assert pixels == asyncio.run(_calm(asked, home=folder / "calm", backend="fake"))


@pytest.mark.slow
def test_jobs_survive_kills_of_nodes_router_and_broker(tmp_path: Path) -> None:
    chaos(tmp_path, n_jobs=60, n_kills=4, seed=1)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_two_hundred_jobs_survive_ten_kills(tmp_path: Path, seed: int) -> None:
    chaos(tmp_path, n_jobs=200, n_kills=10, seed=seed)


@pytest.mark.thorough
@pytest.mark.slow
def test_two_hundred_real_pictures_survive_nine_kills(tmp_path: Path) -> None:
    asked = work(200)
    with real_fleet(tmp_path) as fleet:
        for name in STEP_S:
            fleet.add_node(name)
        fleet.wait_for_nodes()
        counts, pixels = disturbed(fleet, asked, plan(200, 9, luck=random.Random(5)))
        assert fleet.faults() == []
    check(tmp_path, asked, counts, pixels)
    calm = asyncio.run(
        _calm(asked, home=tmp_path / "calm", device="cpu", dtype="float32", executor="torch", engines=1, threads=1)
    )
    assert pixels == calm
