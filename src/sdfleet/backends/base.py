"""The seam between the runtime and anything that can make a picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sdfleet.domain import Drawing, ImageResult, JobId, Progress, Task

# idle: nothing runs yet, the first job starts it. unavailable: the last start failed, the next job tries again.
BackendState = Literal["idle", "starting", "ready", "unavailable", "closed"]

# Called on the event loop, in the task that awaits `generate`; must not block. What it raises ends that job only.
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do and how it stands. `reason` says why it is not ready, and what to do.

    facts: what the engine says of itself (device, dtype, `checkpoints` that are resident, `bytes_by_checkpoint`); empty
        until it has started.
    is_real: False for a backend whose pictures are made up.
    """

    name: str
    state: BackendState
    reason: str = ""
    tasks: tuple[Task, ...] = ("txt2img", "img2img", "inpaint")
    has_previews: bool = False
    is_real: bool = True
    n_running: int = 0
    n_waiting: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)


class Backend(Protocol):
    """Anything that can make a picture. One contract test suite (tests/backends/test_contract.py) runs over all."""

    def capabilities(self) -> Capabilities:
        """How it stands now; asks nobody and never waits."""

    async def start(self) -> None:
        """Stand ready before the first job. Raises what a first job would have met."""

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        """Draw every picture of one job; as many jobs at once as the caller likes.

        `ImageResult.model` is the checkpoint of the drawing; the caller knows the name a person used.
        Raises a SdfleetError; JobCancelled after `cancel`. Cancelling the awaiting task also stops the drawing.
        """

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Start or stop the previews of a job that is being drawn, for its `on_progress`. Unknown ids are ignored."""

    async def cancel(self, job_id: JobId) -> None:
        """Let the job's `generate` raise JobCancelled soon (between two steps). Unknown ids are ignored."""

    async def load(self, drawing: Drawing) -> None:
        """Have the drawing's checkpoint on the device, planned for its size; nothing is drawn. Raises as `generate`."""

    async def unload(self, checkpoint: str) -> None:
        """Return when the checkpoint is off the device and its memory given back; one that is not there is no error.

        Raises InUse while a job draws with it. When the last one leaves, a process of its own ends too.
        """

    async def pin(self, checkpoints: Collection[str]) -> None:
        """These, and no others, never leave to make room; also after the engine was started again."""

    async def close(self) -> None:
        """End what runs; jobs that are not done fail with EngineDied. May be called twice."""
