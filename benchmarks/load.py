"""A closed loop of clients against a running image server: throughput, waiting times, and whether it answers meanwhile.

    python benchmarks/load.py http://127.0.0.1:8101 --dialect plain --clients 16 --requests 32

Each of k clients sends its next request when its last was answered, until all are sent. Requests have their own prompt
and seed and 10 to 30 steps, by their number, so every server is given the same ones. Beside them /health is asked
every 100 ms; an answer that takes longer than 3 s counts as a time-out of 3 s.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx2

PROMPTS = (
    "a red circle on a blue background",
    "two yellow stars",
    "a green house with a red roof",
    "a blue fish",
    "a purple heart above an orange square",
    "a snowman with a red scarf",
    "mountains at sunset",
    "a white ring on black",
)
PROBE_EVERY_S, PROBE_LIMIT_S = 0.1, 3.0
# A server that draws one after another keeps the last of 64 clients waiting for minutes.
REQUEST_LIMIT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. dialect: `plain` is that of baselines.py, `openai` that of ours."""

    dialect: str
    n_clients: int
    n_requests: int
    side_px: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came back; times in seconds, those of /health in milliseconds. p50 and p95 are of whole requests."""

    n_clients: int
    n_requests: int
    images_per_s: float
    p50_s: float
    p95_s: float
    health_p50_ms: float
    health_max_ms: float
    n_probes: int
    n_timeouts: int


def steps_of(number: int) -> int:
    """10 to 30, spread by the number of the request."""
    return 10 + number * 7 % 21


def body(load: Load, number: int) -> tuple[str, dict[str, Any]]:
    """(route, JSON) of a request."""
    told: dict[str, Any] = {
        "prompt": f"{PROMPTS[number % len(PROMPTS)]}, {number}", "seed": number, "steps": steps_of(number), "n": 1,
    }  # fmt: skip
    if load.dialect == "plain":
        return "/generate", {**told, "width": load.side_px, "height": load.side_px}
    size = f"{load.side_px}x{load.side_px}"
    return "/v1/images/generations", {**told, "size": size, "response_format": "b64_json"}


async def run(url: str, load: Load) -> Outcome:
    """One closed loop. Raises httpx2.HTTPError when a request is not answered with a picture."""
    numbers = iter(range(load.n_requests))
    waits_s: list[float] = []
    probes_s: list[float] = []
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=REQUEST_LIMIT_S, limits=limits) as client:
        prober = asyncio.create_task(_probe(url, probes_s))
        begun_s = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for _ in range(load.n_clients):
                clients.create_task(_ask(client, load, numbers, waits_s))
        spent_s = time.perf_counter() - begun_s
        prober.cancel()
        await asyncio.gather(prober, return_exceptions=True)
    probes_s = probes_s or [PROBE_LIMIT_S]
    return Outcome(
        n_clients=load.n_clients,
        n_requests=load.n_requests,
        images_per_s=round(load.n_requests / spent_s, 3),
        p50_s=round(statistics.median(waits_s), 3),
        p95_s=round(percentile(waits_s, 0.95), 3),
        health_p50_ms=round(1000 * statistics.median(probes_s), 1),
        health_max_ms=round(1000 * max(probes_s), 1),
        n_probes=len(probes_s),
        n_timeouts=sum(spent >= PROBE_LIMIT_S for spent in probes_s),
    )


async def _ask(client: httpx2.AsyncClient, load: Load, numbers: Iterator[int], waits_s: list[float]) -> None:
    for number in numbers:
        route, told = body(load, number)
        begun_s = time.perf_counter()
        answer = await client.post(route, json=told)
        answer.raise_for_status()
        waits_s.append(time.perf_counter() - begun_s)


async def _probe(url: str, probes_s: list[float]) -> None:
    # A client of its own: with that of the load it would wait for a free connection, not for the server.
    async with httpx2.AsyncClient(base_url=url, timeout=PROBE_LIMIT_S) as client:
        for _ in itertools.count():
            begun_s = time.perf_counter()
            try:
                await client.get("/health")
                probes_s.append(time.perf_counter() - begun_s)
            except httpx2.TimeoutException:
                probes_s.append(PROBE_LIMIT_S)
            await asyncio.sleep(PROBE_EVERY_S)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5)
    2.0
    """
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)]


def main() -> None:
    """Print the outcome as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--dialect", choices=("plain", "openai"), default="openai")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--side", type=int, default=128)
    chosen = parser.parse_args()
    load = Load(
        dialect=chosen.dialect, n_clients=chosen.clients, n_requests=chosen.requests, side_px=chosen.side
    )  # fmt: skip
    print(json.dumps(asdict(asyncio.run(run(chosen.url, load)))))


if __name__ == "__main__":
    main()
