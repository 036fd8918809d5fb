"""What the router knows of its devices and of the jobs that wait: frozen snapshots, no clock, no connection.

A snapshot is the router's view: the node's last heartbeat, and besides every job the router has sent there since. All
times ending in `_s` are seconds on one clock of the router's choice, unless the name says that it is a span.

>>> work = WaitingJob(job_id=JobId("j1"), model="sd15", megapixels=0.25, steps=20, n_pictures=2)
>>> work.picture_units, work.units
(5.0, 10.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NewType, Self

from sdfleet.domain import LOCAL_OWNER, JobId, OwnerId

NodeId = NewType("NodeId", str)
DeviceId = NewType("DeviceId", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """What placement must know of a job.

    megapixels: of one picture, width_px * height_px / 2**20. steps: of one picture. priority: higher is more
    urgent; the order is the caller's all the same. waited_s: since it was accepted. owner: for the caller.
    work_bytes: what drawing it needs on top of the weights, 0 if not known. not_on: nodes it has failed on.
    """

    job_id: JobId
    model: str
    megapixels: float
    steps: int
    n_pictures: int = 1
    priority: int = 0
    owner: OwnerId = LOCAL_OWNER
    waited_s: float = 0.0
    work_bytes: int = 0
    not_on: frozenset[NodeId] = frozenset()

    @property
    def picture_units(self) -> float:
        """Work of one picture: megapixels times steps."""
        return self.megapixels * self.steps

    @property
    def units(self) -> float:
        """Work of all its pictures."""
        return self.megapixels * self.steps * self.n_pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningJob:
    """A job that a device has: drawing, loading for it, or sent there a moment ago.

    picture_units_left: of each of its pictures, as it was at `as_of_s`. load_left_s: seconds of loading before its
    first step, at `as_of_s`. A job whose compute has ended is no longer here, even while its pictures are sent.
    """

    job_id: JobId
    model: str
    megapixels: float
    n_pictures: int
    picture_units_left: float
    as_of_s: float
    load_left_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in the memory of a device. last_used_s: the longest unused leaves first."""

    model: str
    n_bytes: int
    last_used_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the owner of a node allows there; None: no limit. only: these models and no others."""

    max_megapixels: float | None = None
    max_steps: int | None = None
    max_pictures: int | None = None
    only: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of one node: what draws one batch at a time.

    capacity: pictures it may draw at once, in shared steps; a job with more pictures runs there alone.
    memory_total_bytes: what models may fill of it. memory_free_bytes: left beside the loaded ones.
    on_disk: model -> bytes it needs in this device's memory; a model that is not here would have to be pulled.
    pinned: models that stay in memory, whatever else is asked for. heartbeat_s: when the node was last heard.
    """

    device_id: DeviceId
    node_id: NodeId
    name: str
    heartbeat_s: float
    memory_total_bytes: int
    memory_free_bytes: int
    capacity: int = 1
    running: tuple[RunningJob, ...] = ()
    loaded: tuple[LoadedModel, ...] = ()
    on_disk: Mapping[str, int] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    is_draining: bool = False
    limits: Limits = field(default_factory=Limits)

    @property
    def n_pictures(self) -> int:
        """Pictures it is drawing."""
        return sum(job.n_pictures for job in self.running)

    def with_job(self, running: RunningJob, *, evicts: tuple[str, ...] = ()) -> Self:
        """The device once it has this job: its model in memory, `evicts` gone from there."""
        kept = [one for one in self.loaded if one.model not in evicts and one.model != running.model]
        before = next((one.n_bytes for one in self.loaded if one.model == running.model), None)
        n_bytes = self.on_disk.get(running.model, 0) if before is None else before
        gone_bytes = sum(one.n_bytes for one in self.loaded if one.model in evicts)
        free_bytes = self.memory_free_bytes + gone_bytes - (n_bytes if before is None else 0)
        newest = LoadedModel(model=running.model, n_bytes=n_bytes, last_used_s=running.as_of_s)
        return replace(
            self, running=(*self.running, running), loaded=(*kept, newest), memory_free_bytes=max(0, free_bytes)
        )

    def without_job(self, job_id: JobId) -> Self:
        """The device once this job's compute has ended."""
        return replace(self, running=tuple(job for job in self.running if job.job_id != job_id))
