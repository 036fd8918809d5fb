"""What happens to a fleet on bad lines, told by the process that makes them: `python -m tests.fleet.network_story`.

Run in a namespace of its own (`wire.ENTER`); test_network.py does. Prints what it saw as one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.fleet import wire
from tests.fleet.real_fleet import PATIENCE_S, Asked, Clients, RealFleet, real_fleet

MBIT = 1e6


@contextmanager
def _fleet(folder: Path, **step_s: float) -> Iterator[tuple[RealFleet, dict[str, wire.Wire]]]:
    """A router here, and a node for each name behind a wire of its own. Values: seconds of a step."""
    wires = {name: wire.Wire(number) for number, name in enumerate(step_s, start=1)}
    try:
        with real_fleet(folder, SD_BROKER_HOST="0.0.0.0", SD_BROKER_NAMES=wire.ROUTER) as fleet:  # noqa: S104 - its own world
            for name, seconds in step_s.items():
                fleet.add_node(name, inside=wires[name].inside, SD_BACKEND="fake", SD_FAKE_STEP_S=seconds)
            fleet.wait_for_nodes()
            yield fleet, wires
            for each in wires.values():
                each.is_cut, each.loss, each.delay_s, each.bits_per_s = False, 0.0, 0.0, None
            fleet.until(lambda: not fleet.spooled(), what="empty spools")
    finally:
        for each in wires.values():
            each.close()


def slow_line(folder: Path) -> dict[str, Any]:
    """Twelve jobs, some with a result of 16 MB, over 20 Mbit/s, 200 ms of delay and lost packets."""
    asked = [
        Asked(key=f"job-{i}", prompt=f"fox {i}", seed=i, steps=5, size="2336x2400" if i < 2 else "128x128")
        for i in range(12)
    ]
    with _fleet(folder, n1=0.1, n2=0.1) as (fleet, wires):
        for each in wires.values():
            each.delay_s, each.bits_per_s, each.loss = 0.1, 20 * MBIT, 0.01
        clients = Clients(fleet, asked)
        clients.start(6)
        clients.wait_for(len(asked))
        clients.close()
        return _told(fleet, clients) | {"n_packets_lost": sum(each.n_lost for each in wires.values())}


def short_cut(folder: Path) -> dict[str, Any]:
    """A node draws while its line is away for 5 s: it goes on, and is believed to."""
    return _cut(folder, is_long=False)


def long_cut(folder: Path) -> dict[str, Any]:
    """The same for 20 s: another node draws the job too, and one of the pictures is taken."""
    return _cut(folder, is_long=True)


def _cut(folder: Path, *, is_long: bool) -> dict[str, Any]:
    with _fleet(folder, n1=0.5) as (fleet, wires):
        clients = Clients(fleet, [Asked(key="job", prompt="fox", seed=1, steps=24 if is_long else 12)])
        clients.start(1)
        fleet.until(lambda: bool(fleet.executions()), what="a job that is drawn")
        if is_long:
            fleet.add_node("n2", SD_BACKEND="fake", SD_FAKE_STEP_S=0.1)
            fleet.wait_for_nodes()
        line = wires["n1"]
        line.is_cut = True
        moved = "offline" if is_long else "suspect"
        fleet.until(lambda: moved in _standings(fleet, "n1"), what=f"n1 {moved}")
        if is_long:
            clients.wait_for(1)
        line.is_cut = False
        fleet.until(lambda: _standings(fleet, "n1")[-1] == "online", what="n1 online again")
        if not is_long:
            clients.wait_for(1)
        clients.close()
        return _told(fleet, clients)


def _standings(fleet: RealFleet, node: str) -> list[str]:
    changes = fleet.router.said("a node's standing has changed")
    return [record["standing"] for record in changes if record["node"] == node]


def _told(fleet: RealFleet, clients: Clients) -> dict[str, Any]:
    jobs = httpx2.get(f"{fleet.url}/api/jobs", timeout=PATIENCE_S).json()["jobs"]
    return {
        "refused": clients.refused,
        "states": sorted(job["state"] for job in jobs),
        "n_pictures": [len(job["outputs"]) for job in jobs],
        "pixels": sorted(len(data) for data in clients.pixels.values()),
        "n_done": len(fleet.router.said("job done")),
        "n_executions": len(fleet.executions()),
        "standings": {name: _standings(fleet, name) for name in fleet.nodes},
        "faults": fleet.faults(),
    }


STORIES = {"slow_line": slow_line, "short_cut": short_cut, "long_cut": long_cut}


if __name__ == "__main__":
    wire.up()
    sys.stdout.write(json.dumps(STORIES[sys.argv[1]](Path(sys.argv[2]))))
