"""One wide engine against several small ones: the same short drawing for both, timed where the jobs will be drawn.

Timing network calls inside one process would be cheaper, and would miss what decides here: engines that share memory
bandwidth, caches and cores. So real engines draw real pictures, while nobody else wants any.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdfleet.backends.base import Backend
from sdfleet.backends.placement import Trial
from sdfleet.domain import Drawing, JobId

log = logging.getLogger(__name__)

# Long enough for a batcher to find its rows in two drawings, short enough that nobody minds: the built-in model's
# trial took 9 s on two cores, 1.5 s of it until the small engines stood (2026-11-21, torch, bfloat16 with AMX).
_MOST_STEPS = 8
_PICTURES_PER_ENGINE = 4
_N_ROUNDS = 3
_numbers = itertools.count(1)


async def timed_trial(
    wide: Backend, small: Sequence[Backend], like: Drawing, *, executors: tuple[str, ...] = ()
) -> Trial:
    """Draw like `like` on both sides, by turns, and keep the best times. Cancelling stops the drawings."""
    sample = _sample(like)
    n_many = _PICTURES_PER_ENGINE * len(small)
    best: dict[str, float] = {}
    # The first rounds load weights and let the batchers find how many rows pay.
    for n_round in range(-2, _N_ROUNDS):
        for name, engines, n_each in (
            ("wide_many_s", [wide], n_many),
            ("small_many_s", small, _PICTURES_PER_ENGINE),
            ("wide_one_s", [wide], 1),
            ("small_one_s", small[:1], 1),
        ):
            begun_s = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for engine in engines:
                    part = replace(sample, job_id=JobId(f"trial-{next(_numbers)}"), n_images=n_each)
                    tasks.create_task(engine.generate(part))
            spent_s = time.perf_counter() - begun_s
            if n_round >= 0:
                best[name] = min(spent_s, best.get(name, spent_s))
    return Trial(n_many=n_many, n_engines=len(small), n_steps=sample.steps, executors=executors, **best)


async def warm_up(engines: Iterable[Backend], like: Drawing) -> None:
    """Let engines load what a trial draws with; afterwards they may still try out executors."""
    async with asyncio.TaskGroup() as tasks:
        for engine in engines:
            tasks.create_task(engine.generate(replace(_sample(like), job_id=JobId(f"trial-{next(_numbers)}"))))


def _sample(like: Drawing) -> Drawing:
    return replace(
        like, steps=min(like.steps, _MOST_STEPS), n_images=1, resize_to=None, reproducible=False, step_cache="off",
        wants_previews=False,
    )  # fmt: skip


class TrialNotes:
    """Trials on disk, so that the next start knows at once. One file a kind of drawing; None keeps nothing.

    A note is void when the weights, the sizes, the number of engines or cores, the versions or the machine differ.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, like: Drawing, *, setting: str) -> Trial | None:
        """What was measured for drawings like this one."""
        if self._folder is None:
            return None
        try:
            said = json.loads(self._file(self._folder, like, setting).read_text(encoding="utf-8"))
            return Trial(**(said | {"executors": tuple(said["executors"])}))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as exc:
            log.warning("a note about engines cannot be read and is measured again", extra={"why": str(exc)})
            return None

    def keep(self, like: Drawing, trial: Trial, *, setting: str) -> None:
        """Write down what was measured; a disk that refuses costs the next start a trial, nothing else."""
        if self._folder is None:
            return
        file = self._file(self._folder, like, setting)
        part = file.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(asdict(trial)), encoding="utf-8")
            part.replace(file)
        except OSError as exc:
            log.warning("a note about engines could not be kept", extra={"why": str(exc)})

    def _file(self, folder: Path, like: Drawing, setting: str) -> Path:
        weights = [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(Path(like.checkpoint).rglob("*.safetensors"))
        ]
        libraries = [_version(name) for name in ("torch", "openvino", "sdfleet")]
        about = (platform.node(), like.checkpoint, weights, like.width_px, like.height_px, setting, libraries)
        return folder / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}.json"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
