"""Stand-ins for the engine in real child processes, without torch. The first word of a prompt says what happens.

draw            every picture after `steps` steps; pixels depend on seed and picture
endless         steps until cancelled
second-life F   endless in the process that creates the file F, drawn in any later one
hang            never returns from its second step; hang-at-once: nor from being submitted
hang-once F     hangs in the process that creates the file F, drawn in any later one
die, exit, raise, print, log, orphan, infinite, unfinished, refuse     see `_misbehave` and `submit`
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from sdfleet.domain import Drawing, FinishedPicture, JobId, Picture, Progress, TokenCount
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed, PictureDone
from sdfleet.errors import JobCancelled, UnsupportedByModel, in_use

log = logging.getLogger("sdfleet.scripted")

SECOND_STEP = 2


class ScriptedEngine:
    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._drawings: dict[JobId, Drawing] = {}
        self._steps: dict[JobId, int] = {}
        self._cancelled: list[JobId] = []
        self._loaded: dict[str, None] = {}
        self._pinned: tuple[str, ...] = ()
        self._n_done = 0
        if "ALIVE_FIFO" in os.environ:  # noqa: TID251 - its reader sees the end of file when this process is gone
            os.open(os.environ["ALIVE_FIFO"], os.O_WRONLY)  # noqa: TID251

    def submit(self, drawing: Drawing) -> None:
        if drawing.prompt == "refuse":
            raise UnsupportedByModel("this checkpoint cannot do that", hint="take another")
        if drawing.prompt == "hang-at-once":
            signal.pause()
        if drawing.prompt.startswith(("second-life", "hang-once")):
            first, _, marked = drawing.prompt.partition(" ")
            marker = Path(marked)
            before = {"second-life": "endless", "hang-once": "hang"}[first]
            drawing = replace(drawing, prompt="draw" if marker.exists() else before)
            marker.touch()
        self._loaded[drawing.checkpoint] = None
        self._drawings[drawing.job_id] = drawing
        self._steps[drawing.job_id] = 0

    def cancel(self, job_id: JobId) -> None:
        if job_id in self._drawings:
            self._cancelled.append(job_id)

    def watch(self, job_id: JobId, *, previews: bool) -> None:
        if job_id in self._drawings:
            self._drawings[job_id] = replace(self._drawings[job_id], wants_previews=previews)

    def unload(self, checkpoint: str) -> None:
        needed = [job_id for job_id, drawing in self._drawings.items() if drawing.checkpoint == checkpoint]
        if any(job_id not in self._cancelled for job_id in needed):
            raise in_use(checkpoint, len(needed))
        self._loaded.pop(checkpoint, None)

    def pin(self, checkpoints: Collection[str]) -> None:
        self._pinned = tuple(checkpoints)

    def step(self) -> list[Event]:
        time.sleep(0.001)  # the work of a step
        events: list[Event] = [
            JobFailed(job_id=job_id, error=JobCancelled(f"job {job_id} was cancelled"))
            for job_id in self._cancelled
            if self._drawings.pop(job_id, None) is not None
        ]
        self._cancelled.clear()
        for drawing in list(self._drawings.values()):
            events += self._draw(drawing)
        return events

    @property
    def is_idle(self) -> bool:
        return not self._drawings

    @property
    def is_resting(self) -> bool:
        return not self._drawings

    def facts(self) -> Mapping[str, object]:
        held = {"checkpoints": list(self._loaded), "pinned": list(self._pinned)}
        return {"device": "scripted", "threads": self._options.n_threads, "n_done": self._n_done, **held}

    def close(self) -> None:
        sys.stderr.write("scripted engine closed\n")

    def _draw(self, drawing: Drawing) -> list[Event]:
        self._steps[drawing.job_id] += 1
        step = self._steps[drawing.job_id]
        if step == SECOND_STEP:
            _misbehave(drawing.prompt)
        if drawing.prompt == "endless":
            step = min(step, drawing.steps - 1)
        events: list[Event] = [_progress(drawing, i, step) for i in range(drawing.n_images)]
        if step < drawing.steps:
            return events
        del self._drawings[drawing.job_id]
        self._n_done += 1
        shown = drawing.n_images - (drawing.prompt == "unfinished")
        events += [_picture_done(drawing, i) for i in reversed(range(shown))]
        tokens = (TokenCount(encoder="scripted", n_tokens=1, window=77, n_chunks=1),)
        timings_s = {"denoise": 0.5, "total": 1.0}
        done = JobDone(job_id=drawing.job_id, timings_s=timings_s, tokens=tokens, warnings=("scripted",), device="cpu")
        return [*events, done]


class RefusingEngine(ScriptedEngine):
    """An engine that cannot be built."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        raise UnsupportedByModel("there is no such device", hint="take the CPU")


class StuckEngine(ScriptedEngine):
    """An engine whose start takes for ever; ends with its stdin, which is at its end."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        signal.pause()


class SettlingEngine(ScriptedEngine):
    """An engine that tries out executors after its first job, and tells how many jobs came in between."""

    N_TRIES = 100

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._checkpoints: list[str] = []
        self._n_tries = 0
        self._n_disturbed = 0

    @property
    def is_idle(self) -> bool:
        return super().is_idle and self._is_settled

    def submit(self, drawing: Drawing) -> None:
        self._n_disturbed += bool(self._checkpoints) and not self._is_settled
        self._checkpoints = [drawing.checkpoint]
        super().submit(drawing)

    def unload(self, checkpoint: str) -> None:
        super().unload(checkpoint)
        self._checkpoints = []

    def step(self) -> list[Event]:
        self._n_tries += super().is_idle and bool(self._checkpoints)
        return super().step()

    def facts(self) -> Mapping[str, object]:
        told = {name: {"executor": "torch", "is_settled": self._is_settled} for name in self._checkpoints}
        beside = {"checkpoints": self._checkpoints, "resident_bytes": 0, "executors": told}
        return {**super().facts(), **beside, "n_disturbed": self._n_disturbed, "n_tries": self._n_tries}

    @property
    def _is_settled(self) -> bool:
        return not self._checkpoints or self._n_tries >= self.N_TRIES


class LingeringEngine(ScriptedEngine):
    """An engine that never gives the device back."""

    def close(self) -> None:
        signal.pause()


def _misbehave(prompt: str) -> None:
    match prompt:
        case "hang":
            signal.pause()
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os.write(2, b"first words\nlast words\n")
            os._exit(3)
        case "raise":
            raise RuntimeError("boom")
        case "print":
            print("a library says hello")  # noqa: T201
            os.write(1, b"and so does its C code\n")
            subprocess.run([sys.executable, "-c", "print('and its process')"], check=True)
        case "log":
            log.warning("memory is short", extra={"rung": "tile_vae"})
        case "orphan":
            subprocess.Popen(["sleep", "20"])
            os._exit(4)
        case _:
            pass


def _progress(drawing: Drawing, image_index: int, step: int) -> Progress:
    preview = Picture(width_px=1, height_px=1, mode="L", data=bytes([step % 256])) if drawing.wants_previews else None
    eta_s = float("inf") if drawing.prompt == "infinite" else 1.0
    return Progress(
        job_id=drawing.job_id, image_index=image_index, step=step, n_steps=drawing.steps, eta_s=eta_s, preview=preview
    )


def _picture_done(drawing: Drawing, image_index: int) -> PictureDone:
    width_px, height_px = drawing.resize_to or (drawing.width_px, drawing.height_px)
    seed = (drawing.seed + image_index) % 2**64
    n_bytes = width_px * height_px * 3
    data = (hashlib.sha256(str(seed).encode()).digest() * (n_bytes // 32 + 1))[:n_bytes]
    picture = Picture(width_px=width_px, height_px=height_px, mode="RGB", data=data)
    return PictureDone(
        job_id=drawing.job_id, image_index=image_index, finished=FinishedPicture(picture=picture, seed=seed)
    )
