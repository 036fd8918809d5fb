"""A fleet of real processes on this machine beside the simulation of it, and what its status costs.

    python benchmarks/fleet_real.py                       # all of it; two minutes
    python benchmarks/fleet_real.py --parts sim --load 85

sim     three nodes with made-up pictures, of speed 1, 2 and 4, under a load of Poisson arrivals, through HTTP, broker
        and disk; the same arrivals in fleet_sim.py, which knows nothing of messages and disks. Goal: within 15 %.
equal   six equal jobs on two idle equal nodes, over the ideal time. Goal: 1.1.
status  /fleet/status, asked one after the other while nothing is drawn. Goal: p50 under 2 ms.
http    one small picture after the other through router and node, and through one server without a fleet, turn about;
        both answer over HTTP and store the job and the picture. Goal: p50 under 5 ms and p99 under 25 ms more.

Wants a quiet machine: seconds that a process waits for a core are in the real numbers and not in the simulated ones.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import fleet_sim
from benchmarks.fleet_sim import Machine, Ours, Outcome, Task

from sdfleet.fleet.cost import Curve
from tests.fleet.brokers import free_port
from tests.fleet.real_fleet import PATIENCE_S, Program, RealFleet, real_fleet

SPEEDS = {"n1": 1.0, "n2": 2.0, "n4": 4.0}
# Seconds of a step at speed 1: a job of the mean length takes 2 s there.
STEP_S = 0.25
MEAN_STEPS, STEPS_SIGMA, MOST_STEPS = 8, 0.7, 40
PARTS = ("status", "http", "equal", "sim")
EQUAL_STEPS, EQUAL_STEP_S = 20, 0.1
MODEL = "starter"


def arrivals(load: float, n_jobs: int, *, seed: int) -> list[tuple[float, int]]:
    """When each job comes, and its steps."""
    rng = random.Random(seed)
    now_s, found = 0.0, []
    for _ in range(n_jobs):
        steps = rng.lognormvariate(math.log(MEAN_STEPS) - STEPS_SIGMA**2 / 2, STEPS_SIGMA)
        now_s += rng.expovariate(load * sum(SPEEDS.values()) / (MEAN_STEPS * STEP_S))
        found.append((now_s, min(MOST_STEPS, max(1, round(steps)))))
    return found


def simulated(jobs: Sequence[tuple[float, int]]) -> Outcome:
    """What fleet_sim.py makes of them."""
    fleet_sim.MODELS[:] = [MODEL]
    # As the warm-up before leaves the real ones: with the model in memory.
    machines = [
        Machine(number, speed, 1, 0.0, 1, Curve(), models=[MODEL]) for number, speed in enumerate(SPEEDS.values())
    ]
    tasks = [Task(number, MODEL, now_s, steps * STEP_S, steps * STEP_S) for number, (now_s, steps) in enumerate(jobs)]
    return fleet_sim.play(Ours(machines, 0), machines, tasks)


async def asked(fleet: RealFleet, jobs: Sequence[tuple[float, int]]) -> list[float]:
    """Seconds from the arrival of each job to its answer."""
    numbers = itertools.count(1)
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=fleet.url, timeout=PATIENCE_S, limits=limits) as client:
        begun_s = time.perf_counter()

        async def one(at_s: float, steps: int) -> float:
            await asyncio.sleep(max(0.0, begun_s + at_s - time.perf_counter()))
            body = {"prompt": "a red circle", "size": "128x128", "seed": next(numbers), "steps": steps}
            answer = await client.post("/v1/images/generations", json=body)
            answer.raise_for_status()
            return time.perf_counter() - begun_s - at_s

        return await asyncio.gather(*(one(at_s, steps) for at_s, steps in jobs))


def by_simulation(folder: Path, *, load: float, n_jobs: int, seed: int) -> None:
    jobs = arrivals(load, n_jobs, seed=seed)
    with real_fleet(folder) as fleet:
        for name, speed in SPEEDS.items():
            fleet.add_node(name, SD_BACKEND="fake", SD_FAKE_STEP_S=STEP_S / speed)
        fleet.wait_for_nodes()
        # The simulation knows the speeds; the router learns them.
        asyncio.run(asked(fleet, [(0.0, 8)] * 12))
        spans_s = asyncio.run(asked(fleet, jobs))
    real, sim = Outcome(spans_s=tuple(spans_s), loads_per_job=0.0), simulated(jobs)
    print(f"{n_jobs} jobs at {load:.0%} load on nodes of speed 1, 2, 4; mean work {MEAN_STEPS * STEP_S:g} s at speed 1")
    print(f"{'':<10}{'mean s':>8}{'p50':>8}{'p95':>8}")
    rows = [[it.mean_s, it.percentile_s(50), it.percentile_s(95)] for it in (real, sim)]
    rows.append([a / b for a, b in zip(*rows, strict=True)])
    for name, row in zip(("real", "simulated", "ratio"), rows, strict=True):
        print(f"{name:<10}" + "".join(f"{figure:>8.3f}" for figure in row), flush=True)


def six_equal_jobs(folder: Path) -> None:
    with real_fleet(folder) as fleet:
        for name in ("a", "b"):
            fleet.add_node(name, SD_BACKEND="fake", SD_FAKE_STEP_S=EQUAL_STEP_S)
        fleet.wait_for_nodes()
        asyncio.run(asked(fleet, [(0.0, 5)] * 4))
        took_s = max(asyncio.run(asked(fleet, [(0.0, EQUAL_STEPS)] * 6)))
    ideal_s = 3 * EQUAL_STEPS * EQUAL_STEP_S
    print(f"six equal jobs on two equal nodes: {took_s:.2f} s, ideal {ideal_s:.2f} s, ratio {took_s / ideal_s:.3f}")


def status(folder: Path, *, n_asked: int = 500) -> None:
    with real_fleet(folder) as fleet:
        for name in SPEEDS:
            fleet.add_node(name, SD_BACKEND="fake")
        fleet.wait_for_nodes()
        spans_s = []
        with httpx2.Client(base_url=fleet.url, timeout=PATIENCE_S) as client:
            for _ in range(n_asked):
                begun_s = time.perf_counter()
                client.get("/fleet/status").raise_for_status()
                spans_s.append(time.perf_counter() - begun_s)
            begun_s = time.perf_counter()
            for _ in range(n_asked):
                client.get("/health").raise_for_status()
            health_s = (time.perf_counter() - begun_s) / n_asked
    cuts = statistics.quantiles(spans_s, n=100)
    print(
        f"/fleet/status of three nodes: p50 {cuts[49] * 1e3:.2f} ms, p99 {cuts[98] * 1e3:.2f} ms "
        f"(/health, with the same client: mean {health_s * 1e3:.2f} ms)"
    )


@contextlib.contextmanager
def one_server(folder: Path) -> Iterator[str]:
    """`sdfleet serve` with made-up pictures, as the router's nodes make them; its address."""
    folder.mkdir(parents=True)
    port = free_port()
    env = {"SD_HOME": folder / "home", "SD_BACKEND": "fake", "SD_PORT": port, "SD_LOG_JSON": 1}
    server = Program(words=("serve",), env=env, log=folder / "server.log")
    server.start()
    try:
        while True:
            server.check()
            with contextlib.suppress(httpx2.HTTPError):
                httpx2.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE_S).raise_for_status()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.end()


def by_http(folder: Path, *, n_asked: int = 200) -> None:
    asked = {"model": MODEL, "prompt": "a red circle", "width": 64, "height": 64, "steps": 1}
    spans_s: dict[str, list[float]] = {"one server": [], "router, node": []}
    with real_fleet(folder) as fleet, one_server(folder / "alone") as alone:
        fleet.add_node("n1", SD_BACKEND="fake")
        fleet.wait_for_nodes()
        with httpx2.Client(timeout=PATIENCE_S) as client:
            for number in range(20 + n_asked):
                for name, url in zip(spans_s, (alone, fleet.url), strict=True):
                    begun_s = time.perf_counter()
                    answer = client.post(f"{url}/api/generate-image", json={**asked, "seed": number})
                    answer.raise_for_status()
                    if number >= 20:
                        spans_s[name].append(time.perf_counter() - begun_s)
    both = zip(*spans_s.values(), strict=True)
    for name, of_name in (*spans_s.items(), ("added", [fleet_s - alone_s for alone_s, fleet_s in both])):
        cuts = statistics.quantiles(of_name, n=100)
        print(f"{name:<14} p50 {cuts[49] * 1e3:7.2f} ms   p95 {cuts[94] * 1e3:7.2f} ms   p99 {cuts[98] * 1e3:7.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--load", type=int, default=60, help="percent of the fleet's speed")
    parser.add_argument("--jobs", type=int, default=160)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts:
            here = Path(folder) / part
            if part == "status":
                status(here)
            elif part == "http":
                by_http(here)
            elif part == "equal":
                six_equal_jobs(here)
            else:
                by_simulation(here, load=given.load / 100, n_jobs=given.jobs, seed=given.seed)


if __name__ == "__main__":
    main()
