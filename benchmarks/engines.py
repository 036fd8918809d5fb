"""One engine with all cores against several that share them, through the backend: pictures a second and waiting times.

    python benchmarks/engines.py                        # the built-in model, torch
    python benchmarks/engines.py --executor openvino --cache DIR

Sides: `one` is one all-thread engine, `several` spreads everything over one engine a core, `auto` asks its own trial.
Loads: one request alone; 16 mixed requests at once; 64 mixed requests by 16 clients, each asking again when answered.
All sides stand in one run and take turns; medians of the rounds are printed, and ratios to `one`. Progress goes to
stderr, and no new round begins after --most-s seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdfleet import starter
from sdfleet.backends.local import LocalBackend
from sdfleet.backends.pool import EnginePool
from sdfleet.domain import Drawing, JobId
from sdfleet.engine.events import EngineOptions

PROMPTS = (
    "a red circle on a blue background",
    "two yellow stars",
    "a green house with a red roof",
    "a blue fish",
)
SAMPLERS = ("ddim", "euler", "dpm++_2m")
TRIAL_DEADLINE_S = 60.0
BEGUN_S = time.perf_counter()

Side = LocalBackend | EnginePool


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"{time.perf_counter() - BEGUN_S:6.1f} s  {text}", file=sys.stderr, flush=True)


def mixed_requests(n: int, base: Drawing, tag: str) -> list[Drawing]:
    """Different prompts, seeds, steps (10 to 30), guidance and samplers, as a server would see them."""
    return [
        replace(
            base,
            job_id=JobId(f"{tag}-{i}"),
            prompt=PROMPTS[i % len(PROMPTS)],
            seed=i,
            steps=10 + i * 7 % 21,
            guidance=(3.0, 4.0, 5.5)[i % 3],
            sampler=SAMPLERS[i % len(SAMPLERS)],
        )
        for i in range(n)
    ]


async def closed_loop(side: Side, drawings: Sequence[Drawing], *, n_clients: int) -> tuple[float, list[float]]:
    """Pictures a second, and seconds each request waited; a client asks again when it was answered."""
    waiting = list(reversed(drawings))
    waited_s: list[float] = []

    async def client() -> None:
        while waiting:
            asked = waiting.pop()
            begun_s = time.perf_counter()
            await side.generate(asked)
            waited_s.append(time.perf_counter() - begun_s)

    begun_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    return len(drawings) / (time.perf_counter() - begun_s), waited_s


async def trial_done(side: EnginePool) -> None:
    """Until the pool has tried its engines, or the time is up."""
    end_s = time.perf_counter() + TRIAL_DEADLINE_S
    while not side.capabilities().facts.get("engine_trials") and time.perf_counter() < end_s:  # noqa: ASYNC110  asked for, not told
        await asyncio.sleep(0.2)


async def measure(
    sides: dict[str, Side], base: Drawing, *, n_rounds: int, most_s: float
) -> dict[str, dict[str, dict[str, float]]]:
    """By load and side: images_per_s, p50_s, p95_s."""
    loads = {"alone": (1, 1), "16 at once": (16, 16), "64 by 16": (64, 16)}
    speeds: dict[tuple[str, str], list[float]] = {}
    waits: dict[tuple[str, str], list[float]] = {}
    for n_round in range(-1, n_rounds):  # one round to warm up
        if n_round > 0 and time.perf_counter() - BEGUN_S > most_s:
            say(f"the time is up after {n_round} rounds")
            break
        for load, (n, n_clients) in loads.items():
            if n_round < 0 and n > n_clients:
                continue
            for name, side in sides.items():
                for n_repeat in range(5 if n == 1 else 1):
                    tag = f"{name}-{load}-{n_round}-{n_repeat}"
                    drawings = [replace(base, job_id=JobId(tag))] if n == 1 else mixed_requests(n, base, tag)
                    speed, waited_s = await closed_loop(side, drawings, n_clients=n_clients)
                    say(f"round {n_round}, {load}, {name}: {speed:.2f} images/s")
                    if n_round >= 0:
                        speeds.setdefault((load, name), []).append(speed)
                        waits.setdefault((load, name), []).extend(waited_s)
    return {
        load: {
            name: {
                "images_per_s": round(statistics.median(speeds[load, name]), 2),
                "p50_s": round(statistics.median(waits[load, name]), 3),
                "p95_s": round(sorted(waits[load, name])[int(0.95 * (len(waits[load, name]) - 1))], 3),
            }
            for name in sides
        }
        for load in loads
    }


async def run(arguments: argparse.Namespace) -> None:
    """Print the table and, last, one line of JSON."""
    width_px, height_px = (int(side) for side in arguments.size.split("x"))
    base = Drawing(
        job_id=JobId("first"), checkpoint=str(arguments.model), family=arguments.family, prompt=PROMPTS[0],
        negative_prompt="", width_px=width_px, height_px=height_px, steps=20, guidance=4.0, seed=0, n_images=1,
        sampler="ddim",
    )  # fmt: skip
    options = EngineOptions(
        device="cpu", dtype=arguments.dtype, executor=arguments.executor, cache_folder=arguments.cache
    )
    with tempfile.TemporaryDirectory() as notes:
        auto = EnginePool(options, notes_folder=Path(notes))
        sides: dict[str, Side] = {
            "one": LocalBackend(options),
            "several": EnginePool(options, n_engines=max(2, len(os.sched_getaffinity(0)))),
            "auto": auto,
        }
        try:
            await asyncio.gather(*(side.start() for side in sides.values()))
            say("all sides stand")
            for name, side in sides.items():
                for n_warm in range(2):
                    await side.generate(replace(base, job_id=JobId(f"{name}-{n_warm}")))
            say("every side has drawn")
            await trial_done(auto)
            say(f"trial: {auto.capabilities().facts.get('engine_trials')}")
            results = await measure(sides, base, n_rounds=arguments.rounds, most_s=arguments.most_s)
            facts = auto.capabilities().facts
        finally:
            await asyncio.gather(*(side.close() for side in sides.values()))
    print(f"{'load':12} {'side':8} {'images/s':>9} {'p50 s':>7} {'p95 s':>7} {'of one':>7} {'p95 of one':>10}")
    for load, by_side in results.items():
        for name, row in by_side.items():
            ratio = row["images_per_s"] / by_side["one"]["images_per_s"]
            late = row["p95_s"] / by_side["one"]["p95_s"]
            speed, p50_s, p95_s = row.values()
            print(f"{load:12} {name:8} {speed:>9} {p50_s:>7} {p95_s:>7} {ratio:>6.2f}x {late:>9.2f}x")
    print(json.dumps({"dtype": facts["dtype"], "trials": facts.get("engine_trials"), **results}))


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=starter.weights_path())
    parser.add_argument("--family", default="sd")
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--most-s", type=float, default=90.0, help="no new round after so many seconds")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--executor", default="torch", choices=("torch", "openvino"))
    parser.add_argument("--cache", default=None, help="where OpenVINO's conversion is kept")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
