"""Small fleets for tests of placement: devices and jobs with everything filled in, on made-up time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sdfleet.domain import JobId
from sdfleet.fleet.cost import Predictor
from sdfleet.fleet.decisions import Dispatch
from sdfleet.fleet.placement import Placement
from sdfleet.fleet.state import Device, DeviceId, LoadedModel, NodeId, WaitingJob

GIB = 1 << 30
MODEL_BYTES = 4 * GIB
ALWAYS_S = 1e18


def device(name: str, *, places: int = 1, loaded: tuple[str, ...] = (), **more: Any) -> Device:
    """A device with memory for `places` models of 4 GiB, models a, b and c on disk."""
    values: dict[str, Any] = {
        "device_id": DeviceId(name),
        "node_id": NodeId(name),
        "name": name,
        "heartbeat_s": ALWAYS_S,
        "memory_total_bytes": places * MODEL_BYTES,
        "memory_free_bytes": (places - len(loaded)) * MODEL_BYTES,
        "loaded": tuple(
            LoadedModel(model=one, n_bytes=MODEL_BYTES, last_used_s=place) for place, one in enumerate(loaded)
        ),
        "on_disk": dict.fromkeys(("a", "b", "c"), MODEL_BYTES),
    }
    return Device(**(values | more))


def job(name: str, model: str = "a", *, work_s: float = 10.0, **more: Any) -> WaitingJob:
    """A job that takes `work_s` on a device of speed 1."""
    return WaitingJob(job_id=JobId(name), model=model, **({"megapixels": work_s / 10, "steps": 10} | more))


class Fleet:
    """A placement with its devices, kept up to date as a router would; every job ends exactly when predicted."""

    def __init__(self, *devices: Device, speeds: dict[str, float] | None = None, load_s: float = 10.0) -> None:
        self.predictor = Predictor()
        self.placement = Placement(self.predictor)
        self.devices = {one.device_id: one for one in devices}
        self.waiting: list[WaitingJob] = []
        self.sent: list[Dispatch] = []
        self.ends: list[tuple[float, JobId, DeviceId]] = []
        self.came_s: dict[JobId, float] = {}
        self.now_s = 0.0
        for one in devices:
            self.predictor.seed(one.device_id, speed=(speeds or {}).get(one.name, 1.0))
            for model in one.on_disk:
                self.predictor.learn_load(one.device_id, model, n_bytes=MODEL_BYTES, spent_s=load_s)
            self.placement.upsert(one)

    def add(self, *jobs: WaitingJob) -> list[Dispatch]:
        self.waiting += jobs
        self.came_s.update(dict.fromkeys((one.job_id for one in jobs), self.now_s))
        return self.ask()

    def change(self, changed: Device) -> list[Dispatch]:
        self.devices[changed.device_id] = changed
        self.placement.upsert(changed)
        return self.ask()

    def ask(self) -> list[Dispatch]:
        """What is sent at this event."""
        found: list[Dispatch] = []
        while sent := self.placement.decide(self.in_line(), n_waiting=len(self.waiting), now_s=self.now_s):
            for one in sent:
                self.waiting = [each for each in self.waiting if each.job_id != one.job_id]
                changed = self.devices[one.device_id].with_job(one.running, evicts=one.evicts)
                self.devices[one.device_id] = changed
                end_s = self.now_s + one.why.candidates[0].finish_s
                heapq.heappush(self.ends, (end_s, one.job_id, one.device_id))
            found += sent
        self.sent += found
        return found

    def in_line(self) -> Iterator[WaitingJob]:
        return (replace(one, waited_s=self.now_s - self.came_s[one.job_id]) for one in self.waiting)

    def next_end(self) -> list[Dispatch]:
        """The next job ends; what is sent then."""
        self.now_s, job_id, device_id = heapq.heappop(self.ends)
        return self.change(self.devices[device_id].without_job(job_id))


def pairs(sent: list[Dispatch]) -> list[tuple[str, str]]:
    return [(one.job_id, one.device_id) for one in sent]
