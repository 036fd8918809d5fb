"""What a fleet adds to a job: the same request through router, broker and node, and by the runtime alone.

    python benchmarks/fleet_overhead.py [--n 300] [--json]

Three processes: this one is the router, a node draws made-up pictures at once, a broker between them on loopback.
The router's desk and store are left out: a server on one machine has them too. The difference of the two columns is
what a router costs: choosing the node, `run` and its answer, the node's spool (synced), the chunks, their check.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import secrets
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

from sdfleet.backends.fake import FakeBackend
from sdfleet.catalog.store import Catalog
from sdfleet.domain import ImageRequest
from sdfleet.fleet.broker import Broker, BrokerConfig, User
from sdfleet.fleet.bus_nats import Credentials, NatsBus, connect
from sdfleet.fleet.catalog import FleetCatalog
from sdfleet.fleet.chooser import PlacedByFleet
from sdfleet.fleet.members import Settled
from sdfleet.fleet.node import Node, NodeOptions
from sdfleet.fleet.remote import FleetBackend
from sdfleet.fleet.runtime import FleetRuntime
from sdfleet.fleet.spool import Spool
from sdfleet.fleet.stock import Stock
from sdfleet.fleet.subjects import inbox_of
from sdfleet.fleet.transport_nats import open_transport
from sdfleet.jobs.queue import FairQueue
from sdfleet.runtime import Runtime

NODE = "n1"
N_WARM = 20


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="jobs, one after the other")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--node", nargs=3, metavar=("PORT", "PASSWORD", "HOME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if options.node is not None:
        port, password, home = options.node
        asyncio.run(_be_node(int(port), password, Path(home)))
        return
    found = asyncio.run(_measure(options.n))
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    sys.stdout.write(f"{'ms':24}{'p50':>8}{'p95':>8}{'p99':>8}\n")
    for name, of_name in found.items():
        sys.stdout.write(f"{name:24}" + "".join(f"{of_name[key]:8.2f}" for key in ("p50", "p95", "p99")) + "\n")


async def _measure(n: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        home, password, port = Path(folder), secrets.token_hex(16), _free_port()
        broker = Broker(home / "broker", BrokerConfig(port=port, users=(User(user="all", password=password),)))
        await broker.start()
        node = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--node", str(port), password, str(home / "node")
        )
        try:
            transport = await open_transport(await _connected(port, password, "router"))
            fleet = FleetBackend(transport, secret=secrets.token_bytes(32), router="router")
            runtime = FleetRuntime(catalog=FleetCatalog(home / "models", models=fleet.members.models), fleet=fleet)
            _give_out(fleet)
            await fleet.open()
            fleet.admit([Settled(node=NODE, secret=_secret_of(password))])
            while not fleet.members.models():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.05)
            alone = Runtime(catalog=Catalog(home / "models"), backend=FakeBackend())
            # Turn about, so that what else the machine does hits both.
            by_fleet, by_itself = [], []
            for i in range(N_WARM + n):
                by_itself.append(await _timed(alone, i))
                by_fleet.append(await _timed(runtime, i))
            await fleet.close()
        finally:
            node.terminate()
            await node.wait()
            await broker.close()
    added = [a - b for a, b in zip(by_fleet[N_WARM:], by_itself[N_WARM:], strict=True)]
    return {
        "runtime alone": _quantiles(by_itself[N_WARM:]),
        "router, broker, node": _quantiles(by_fleet[N_WARM:]),
        "added": _quantiles(added),
    }


def _give_out(fleet: FleetBackend) -> None:
    """What the desk does with its chooser, for jobs that are begun already."""
    chooser, line = PlacedByFleet(fleet), FairQueue()

    def ask() -> None:
        chooser.next(line, now_s=time.time())

    def wake() -> None:
        asyncio.get_running_loop().call_soon(ask)

    chooser.on_change(wake)
    fleet.knows_open = lambda _: True


async def _timed(runtime: Runtime, seed: int) -> float:
    begun_s = time.perf_counter()
    result = await runtime.generate(ImageRequest(prompt="a fox", model="starter", steps=4, seed=seed))
    if isinstance(runtime, FleetRuntime):
        runtime.fleet.ended(result.job_id, is_stored=True)
    return (time.perf_counter() - begun_s) * 1000


def _quantiles(spent_ms: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(spent_ms, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p95": round(cuts[94], 3), "p99": round(cuts[98], 3)}


async def _be_node(port: int, password: str, home: Path) -> None:
    catalog = Catalog(home / "models")
    runtime = Runtime(catalog=catalog, backend=FakeBackend())
    control = await _connected(port, password, NODE, inbox=inbox_of(NODE))
    bulk = await _connected(port, password, NODE, inbox=inbox_of(NODE))
    await Node(
        NodeOptions(node=NODE, name=NODE, secret=_secret_of(password), slots=4),
        control=control,
        bulk=bulk,
        runtime=runtime,
        spool=Spool(home / "spool"),
        stock=Stock(catalog, runtime),
    ).run()


def _connected(port: int, password: str, name: str, inbox: str = "_INBOX") -> Awaitable[NatsBus]:
    credentials = Credentials(user="all", password=password)
    return connect((f"nats://127.0.0.1:{port}",), name=name, credentials=credentials, inbox=inbox)


def _secret_of(password: str) -> bytes:
    return hashlib.sha256(password.encode()).digest()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
