"""Our server and two baseline servers under the same load, each in its own process, one after another.

    python benchmarks/serve_bench.py                                        # 1, 4, 16 and 64 clients; minutes
    python benchmarks/serve_bench.py --clients 4 --requests 8 --servers C B # a short look

The built-in model at 128 px. Ratios of one run count; few requests understate a server that batches, because the last
pictures step alone. What is not counted, for all servers alike: two pictures and --pause seconds without requests after
the start, and a request of each client, of sixteen at most, before each line. In such pauses our server tries out what
it will need, and where OpenVINO is installed it converts the model, which takes half a minute: with --home FOLDER a
second run finds the result, and so does a longer pause.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx2
from load import Load, Outcome, body, run

START_LIMIT_S = 180.0
MOST_WARM_UP = 16
DIALECT = {"ours": "openai"}
HERE = Path(__file__).parent


def command(server: str, port: int, home: str) -> list[str]:
    """How a server is started; ours keeps its jobs and pictures in `home`."""
    if server == "ours":
        return ["env", f"SD_HOME={home}", sys.executable, "-m", "sdfleet", "serve", "--port", str(port)]
    return [sys.executable, str(HERE / "baselines.py"), "--server", server, "--port", str(port)]


def can_serve() -> bool:
    """Whether this sdfleet has a server."""
    asked = subprocess.run([sys.executable, "-m", "sdfleet", "serve", "--help"], capture_output=True, check=False)
    return asked.returncode == 0


@contextmanager
def started(server: str, *, home: Path | None) -> Iterator[str]:
    """The address of a running server, which is ended when this is left. Raises RuntimeError when it does not come."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="sdfleet-serve-bench-") as temporary:
        process = subprocess.Popen(  # noqa: S603 - our own commands
            command(server, port, str(home or temporary)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until_it_draws(server, url, process)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_it_draws(server: str, url: str, process: subprocess.Popen[bytes]) -> None:
    """Until a first picture is here: a server may answer long before its model is loaded."""
    route, told = body(Load(dialect=DIALECT.get(server, "plain"), n_clients=1, n_requests=1), 0)
    give_up_s = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < give_up_s:
        try:
            answer = httpx2.post(url + route, json=told, timeout=START_LIMIT_S)
        except httpx2.TransportError:
            time.sleep(0.2)
            continue
        if answer.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
            answer.raise_for_status()
            return
        time.sleep(0.2)
    raise RuntimeError(f"server {server} did not start: exit code {process.poll()}")


def measure(server: str, clients: list[int], *, n_requests: int, home: Path | None, pause_s: float) -> list[Outcome]:
    """One outcome for each number of clients, after a warm-up that is not counted."""
    dialect = DIALECT.get(server, "plain")

    def load(n_clients: int, n: int) -> Outcome:
        return asyncio.run(run(url, Load(dialect=dialect, n_clients=n_clients, n_requests=n)))

    with started(server, home=home) as url:
        load(2, 2)
        time.sleep(pause_s)
        outcomes = []
        for n_clients in clients:
            load(min(n_clients, MOST_WARM_UP), min(n_clients, MOST_WARM_UP))
            # Fewer requests than clients would leave some of them without any.
            outcomes.append(load(n_clients, max(n_requests, n_clients)))
        return outcomes


def main() -> None:
    """Print the table and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", nargs="+", choices=("C", "B", "ours"), default=["C", "B", "ours"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--pause", type=float, default=10.0, help="seconds without requests after each server's start")
    parser.add_argument("--home", type=Path, help="our server's data folder; a new one each time if left out")
    chosen = parser.parse_args()
    servers = list(chosen.servers)
    if "ours" in servers and not can_serve():
        print("this sdfleet has no `serve` yet: only the baselines are measured")
        servers.remove("ours")
    outcomes = {
        server: measure(server, chosen.clients, n_requests=chosen.requests, home=chosen.home, pause_s=chosen.pause)
        for server in servers
    }
    print(
        f"{'server':8} {'clients':>7} {'images/s':>9} {'p50 s':>7} {'p95 s':>7} "
        f"{'health p50/max ms':>18} {'time-outs':>10}  ratios"
    )
    for i, n_clients in enumerate(chosen.clients):
        for server in servers:
            got = outcomes[server][i]
            ratios = "  ".join(
                f"{got.images_per_s / outcomes[other][i].images_per_s:.2f}x {other}"
                for other in servers
                if other != server and server == "ours"
            )
            if server == "ours" and "C" in servers:
                ratios += f"  p95 {got.p95_s / outcomes['C'][i].p95_s:.2f} of C's"
            health = f"{got.health_p50_ms:g} / {got.health_max_ms:g}"
            print(
                f"{server:8} {n_clients:>7} {got.images_per_s:>9.2f} {got.p50_s:>7.2f} {got.p95_s:>7.2f} "
                f"{health:>18} {got.n_timeouts:>4} of {got.n_probes:<4} {ratios}"
            )
    print(json.dumps({server: [asdict(got) for got in rows] for server, rows in outcomes.items()}))


if __name__ == "__main__":
    main()
