"""Any engine of another project, with the face that `engine/child.py` knows.

Jobs are drawn one at a time, pictures one after the other: these engines have no batches. Their models stay in memory
until their room is needed, memory runs short, or the parent says `unload`.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from sdfleet.domain import Drawing, FinishedPicture, JobId, Picture, Progress, TokenCount
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed, PictureDone
from sdfleet.engine.guests import fitting
from sdfleet.engine.guests.turns import Stopped, Turns
from sdfleet.errors import BadRequest, EngineFailed, JobCancelled, OutOfMemory, SdfleetError, in_use

log = logging.getLogger(__name__)

_SEEDS = 2**64
# Loading takes the weights, and for a moment a part of them twice where they are converted or quantised.
_LOADING_TAKES = 1.15
# With less than this share of the machine's memory free, what nobody draws with leaves: on a Mac the next step is
# swapping, which slows down everything else. A guess: no Mac was here to measure on (November 2026).
_LEAST_FREE_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """active_bytes: held by the library now; peak_bytes: most so far. free_bytes, total_bytes: of the machine.

    most_bytes: what the library should stay under, as far as its device says.
    """

    active_bytes: int
    peak_bytes: int
    free_bytes: int
    total_bytes: int
    most_bytes: int | None = None


class Sitting(Protocol):
    """What a model tells while it draws one picture. Both may raise Stopped, which must pass."""

    def enter(self, phase: str) -> None:
        """From now on time counts as this: encode, denoise, decode."""

    def step(self, step: int, n_steps: int, preview: Callable[[], Picture]) -> None:
        """A step (from 1) is done. preview: called if somebody looks."""


class Model(Protocol):
    """A checkpoint in memory, as its library holds it. dtype: of its weights, for people."""

    dtype: str

    def read(self, drawing: Drawing) -> tuple[tuple[TokenCount, ...], tuple[str, ...]]:
        """How much of the prompts is read, and warnings about what is not."""

    def draw(self, drawing: Drawing, seed: int, sitting: Sitting) -> Picture:
        """One picture at the drawing's own size. What the library raises passes."""


class Guest(Protocol):
    """A library. title: with its version; device: as facts name it. Every call but `fit` comes from one thread."""

    title: str
    device: str

    def fit(self, drawing: Drawing) -> fitting.Fit:
        """What the drawing's checkpoint is to it; touches nothing of the library. Raises as `fitting.fit`."""

    def load(self, drawing: Drawing, fitted: fitting.Fit) -> Model:
        """The drawing's checkpoint in memory."""

    def memory(self) -> Memory:
        """How memory stands."""

    def release(self) -> None:
        """Give back what the library keeps of memory that nothing uses."""

    def is_out_of_memory(self, exc: BaseException) -> bool:
        """Whether that is what the library raised for."""


@dataclass(slots=True, eq=False)
class _Job:
    drawing: Drawing
    fitted: fitting.Fit
    warnings: list[str]
    wants_previews: bool
    is_cancelled: bool = False
    timings_s: dict[str, float] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)
    rungs: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Resident:
    model: Model
    n_bytes: int


class GuestEngine:
    """See `EngineFace`. make: opens the library; it runs, as everything of it, on a thread of its own."""

    def __init__(self, make: Callable[[], Guest], options: EngineOptions) -> None:
        self._turns: Turns[Event, JobDone] = Turns()
        self._options = options
        try:
            self._guest = self._turns.do(make)
        except ImportError as exc:
            raise EngineFailed(
                f"{sys.executable} lacks a library of this engine: {exc}",
                hint="make its environment again: `sdfleet backend remove NAME`, then `sdfleet backend install NAME`",
            ) from exc
        self._waiting: dict[JobId, _Job] = {}
        self._now: _Job | None = None
        self._residents: dict[str, _Resident] = {}  # the one used last stands last
        self._pinned: frozenset[str] = frozenset()

    # --------------------------------------------------------------------------------------------- on the main thread

    def submit(self, drawing: Drawing) -> None:
        fitted = self._guest.fit(drawing)
        warnings = list(fitting.remarks(fitted, fitting.wish_of(drawing)))
        self._waiting[drawing.job_id] = _Job(drawing, fitted, warnings, drawing.wants_previews)

    def cancel(self, job_id: JobId) -> None:
        job = self._find(job_id)
        if job is not None:
            job.is_cancelled = True

    def watch(self, job_id: JobId, *, previews: bool) -> None:
        job = self._find(job_id)
        if job is not None:
            job.wants_previews = previews

    def unload(self, checkpoint: str) -> None:
        jobs = [*self._waiting.values(), *([self._now] if self._now else [])]
        n_jobs = sum(job.drawing.checkpoint == checkpoint and not job.is_cancelled for job in jobs)
        if n_jobs:
            raise in_use(checkpoint, n_jobs)
        if self._now is None:
            self._turns.do(partial(self._drop, checkpoint))
        else:  # its thread stands in the middle of a step of another checkpoint; what nothing uses it gives back later
            self._residents.pop(checkpoint, None)

    def pin(self, checkpoints: Collection[str]) -> None:
        self._pinned = frozenset(checkpoints)

    def step(self) -> list[Event]:
        events: list[Event] = [_cancelled(job) for job in self._waiting.values() if job.is_cancelled]
        self._waiting = {name: job for name, job in self._waiting.items() if not job.is_cancelled}
        if self._now is None:
            if not self._waiting:
                return events
            self._now = self._waiting.pop(next(iter(self._waiting)))
            self._turns.begin(partial(self._play, self._now))
            said = self._turns.heard()
        else:
            said = self._turns.stop() if self._now.is_cancelled else self._turns.go_on()
        events += self._after(self._now, said) if isinstance(said, Future) else [said]
        return events

    @property
    def is_idle(self) -> bool:
        return self._now is None and not self._waiting

    @property
    def is_resting(self) -> bool:
        return self.is_idle

    def facts(self) -> Mapping[str, object]:
        facts: dict[str, object] = {
            "engine": self._guest.title,
            "device": self._guest.device,
            "dtype": next((resident.model.dtype for resident in reversed(self._residents.values())), ""),
            "checkpoints": list(self._residents),
            "bytes_by_checkpoint": {name: resident.n_bytes for name, resident in self._residents.items()},
            "resident_bytes": sum(resident.n_bytes for resident in self._residents.values()),
            "pinned": sorted(self._pinned),
        }
        if self.is_idle:  # else its thread is in the middle of a step
            memory = self._turns.do(self._guest.memory)
            facts |= {"active_bytes": memory.active_bytes, "peak_bytes": memory.peak_bytes}
        return facts

    def close(self) -> None:
        self._turns.close()

    def _find(self, job_id: JobId) -> _Job | None:
        if self._now is not None and self._now.drawing.job_id == job_id:
            return self._now
        return self._waiting.get(job_id)

    def _after(self, job: _Job, ended: Future[JobDone]) -> list[Event]:
        """What becomes of the job whose play has ended."""
        self._now = None
        exc = ended.exception()
        self._turns.do(self._tidy)
        if exc is None:
            return [ended.result()]
        if isinstance(exc, Stopped):
            return [_cancelled(job)]
        if isinstance(exc, SdfleetError):
            return [JobFailed(job_id=job.drawing.job_id, error=exc)]
        # A foreign library may leave a model half changed behind; a fresh one costs a load, and only after a fault.
        self._turns.do(partial(self._drop, job.drawing.checkpoint))
        if self._guest.is_out_of_memory(exc):
            # Its frames hold what there was too much of.
            traceback.clear_frames(exc.__traceback__)
            return self._after_out_of_memory(job, exc)
        log.error("a job failed", exc_info=exc, extra={"job_id": job.drawing.job_id})
        text = f"{self._guest.title} met a fault: {type(exc).__name__}: {str(exc)[:500]}"
        return [JobFailed(job_id=job.drawing.job_id, error=EngineFailed(text, hint="another backend may draw it"))]

    def _after_out_of_memory(self, job: _Job, exc: BaseException) -> list[Event]:
        others = [name for name in self._residents if name not in self._pinned]
        if others and not job.rungs:
            log.warning("memory ran out: other checkpoints leave and the job begins again", extra={"n": len(others)})
            for name in others:
                self._turns.do(partial(self._drop, name))
            job.rungs.append("drop_idle_components")
            job.timings_s.clear()
            self._waiting = {job.drawing.job_id: job, **self._waiting}
            return []
        text = f"{self._guest.title} has no memory left: {str(exc)[:300]}"
        hint = "ask for a smaller picture, or keep the weights in fewer bits: SD_WEIGHTS=int8 or nf4"
        return [JobFailed(job_id=job.drawing.job_id, error=OutOfMemory(text, hint=hint))]

    # ------------------------------------------------------------------------------------------ on the guest's thread

    def _play(self, job: _Job, tell: Callable[[Event], None]) -> JobDone:
        begun_s = time.monotonic()
        with _timed(job, "load"):
            resident = self._lend(job)
        drawing = job.drawing
        tokens: tuple[TokenCount, ...] = ()
        if drawing.n_images:
            tokens, unread = resident.model.read(drawing)
            job.warnings += unread
        for i in range(drawing.n_images):
            seed = (drawing.seed + i) % _SEEDS
            sitting = _Sitting(job, i, tell)
            picture = _brought_to_size(resident.model.draw(drawing, seed, sitting), drawing)
            sitting.end()
            finished = FinishedPicture(picture=picture, seed=seed, reproducible=drawing.reproducible)
            tell(PictureDone(job_id=drawing.job_id, image_index=i, finished=finished))
        return JobDone(
            job_id=drawing.job_id,
            timings_s={**job.timings_s, "total": time.monotonic() - begun_s},
            tokens=tokens,
            warnings=tuple(job.warnings),
            rungs=tuple(job.rungs),
            device=self._guest.device,
            dtype=resident.model.dtype,
        )

    def _lend(self, job: _Job) -> _Resident:
        name = job.drawing.checkpoint
        resident = self._residents.pop(name, None)
        if resident is None:
            self._make_room(name, job.fitted.weights_bytes)
            before = self._guest.memory().active_bytes
            model = self._guest.load(job.drawing, job.fitted)
            resident = _Resident(model, max(0, self._guest.memory().active_bytes - before))
            log.info("checkpoint loaded", extra={"checkpoint": name, "n_bytes": resident.n_bytes})
        self._residents[name] = resident
        return resident

    def _make_room(self, name: str, weights_bytes: int) -> None:
        """Let others leave, those used longest ago first, until the weights fit; then try it anyway.

        Raises OutOfMemory where they are more than a person has allowed altogether.
        """
        limit = self._options.memory_limit_bytes
        if limit is not None and weights_bytes > limit and self._options.weights == "auto":
            raise OutOfMemory(
                f"the weights of {Path(name).name} take {weights_bytes / 1e9:.1f} GB, and SD_MEMORY_LIMIT is "
                f"{limit / 1e9:.1f} GB",
                hint="keep them in fewer bits: SD_WEIGHTS=int8 or nf4",
            )
        needed = int(weights_bytes * _LOADING_TAKES)
        for other in [other for other in self._residents if other not in self._pinned]:
            if needed <= self._spare_bytes():
                return
            log.info("checkpoint leaves to make room", extra={"checkpoint": other})
            self._drop(other)

    def _spare_bytes(self) -> int:
        memory = self._guest.memory()
        mosts = [most for most in (memory.most_bytes, self._options.memory_limit_bytes) if most is not None]
        return min([memory.free_bytes, *(most - memory.active_bytes for most in mosts)])

    def _drop(self, checkpoint: str) -> None:
        if self._residents.pop(checkpoint, None) is not None:
            self._guest.release()

    def _tidy(self) -> None:
        """After a job: give back what is not needed, and under pressure also what nobody asked for just now."""
        self._guest.release()
        memory = self._guest.memory()
        if memory.free_bytes >= memory.total_bytes * _LEAST_FREE_SHARE:
            return
        needed = self._pinned | {job.drawing.checkpoint for job in self._waiting.values()}
        for name in [name for name in self._residents if name not in needed]:
            log.warning("memory is short: a checkpoint leaves", extra={"checkpoint": name})
            self._drop(name)


class _Sitting:
    """One picture of a job in the making; see `Sitting`."""

    def __init__(self, job: _Job, image_index: int, tell: Callable[[Event], None]) -> None:
        self._job = job
        self._image_index = image_index
        self._tell = tell
        self._phase = "encode"
        self._since_s = self._last_s = time.monotonic()

    def enter(self, phase: str) -> None:
        now_s = time.monotonic()
        timings_s = self._job.timings_s
        timings_s[self._phase] = timings_s.get(self._phase, 0.0) + now_s - self._since_s
        self._phase, self._since_s, self._last_s = phase, now_s, now_s

    def end(self) -> None:
        """The picture is done."""
        self.enter("")

    def step(self, step: int, n_steps: int, preview: Callable[[], Picture]) -> None:
        job = self._job
        now_s = time.monotonic()
        job.step_s.append(now_s - self._last_s)
        self._last_s = now_s
        left = n_steps * (job.drawing.n_images - self._image_index) - step
        # The first step of a job may compile; the later ones say how long the rest will take.
        known = job.step_s[1:] or job.step_s
        self._tell(
            Progress(
                job_id=job.drawing.job_id,
                image_index=self._image_index,
                step=step,
                n_steps=n_steps,
                eta_s=left * sum(known) / len(known),
                preview=preview() if job.wants_previews else None,
            )
        )
        self._last_s = time.monotonic()


@contextmanager
def _timed(job: _Job, phase: str) -> Iterator[None]:
    begun_s = time.monotonic()
    yield
    job.timings_s[phase] = job.timings_s.get(phase, 0.0) + time.monotonic() - begun_s


def _cancelled(job: _Job) -> JobFailed:
    job_id = job.drawing.job_id
    return JobFailed(job_id=job_id, error=JobCancelled(f"job {job_id} was cancelled"))


def _brought_to_size(picture: Picture, drawing: Drawing) -> Picture:
    if drawing.resize_to is None:
        return picture
    from sdfleet.engine.resizing import fitted, resized  # needs Pillow and numpy, which guests bring

    bring = fitted if drawing.image is None else resized
    return bring(picture, *drawing.resize_to)


def check_options(
    options: EngineOptions,
    title: str,
    *,
    dtypes: Collection[str] = ("auto", "bfloat16"),
    formats: Collection[str] = ("auto", "int8", "nf4"),
) -> None:
    """Log what of the engine's options a guest does not know. Raises BadRequest for a device that it has not.

    dtypes, formats: of numbers and of weights that it knows.
    """
    if options.device == "cuda":
        raise BadRequest(f"{title} does not draw on CUDA with sdfleet", hint="leave SD_DEVICE at auto for it")
    for name, value, known in (
        ("dtype", options.dtype, dtypes),
        ("weights", options.weights, formats),
        ("text_weights", options.text_weights, ("auto",)),
        ("memory_mode", options.memory_mode, ("auto", "fast")),
    ):
        if value not in known:
            log.warning("a setting that this engine does not know", extra={"engine": title, name: value})
