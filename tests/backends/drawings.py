"""Drawings for the tests of the backends, and backends over a scripted engine."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sdfleet.backends.local import LocalBackend
from sdfleet.backends.pool import EnginePool
from sdfleet.domain import Drawing, JobId, Picture
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import launch

HERE = Path(__file__).resolve().parent
SRC = HERE.parents[1] / "src"
# What is drawn over, and a mask that is all of it.
GREY = Picture(width_px=64, height_px=48, mode="RGB", data=bytes(64 * 48 * 3))
WHITE = Picture(width_px=64, height_px=48, mode="L", data=b"\xff" * (64 * 48))

_numbers = itertools.count(1)


def drawing(prompt: str = "draw", **fields: Any) -> Drawing:
    given: dict[str, Any] = {
        "job_id": JobId(f"job-{next(_numbers)}"),
        "checkpoint": "toy",
        "family": "sd",
        "prompt": prompt,
        "negative_prompt": "",
        "width_px": 32,
        "height_px": 16,
        "steps": 4,
        "guidance": 5.0,
        "seed": 7,
        "n_images": 1,
        "sampler": "euler",
    }
    return Drawing(**(given | fields))


def endless(**fields: Any) -> Drawing:
    """Goes on until it is stopped (ScriptedEngine), or for a thousand steps (FakeBackend)."""
    return drawing("endless", steps=1000, **fields)


def child_environment(**more: str) -> Mapping[str, str]:
    inherited = os.environ  # noqa: TID251
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(SRC), str(HERE)]), **more}


def child_command(engine: str = "ScriptedEngine") -> Sequence[str]:
    return (sys.executable, "-m", "sdfleet.engine.child", "--engine", f"scripted_engine:{engine}")


def scripted_backend(
    engine: str = "ScriptedEngine", *, env: Mapping[str, str] | None = None, **more: Any
) -> LocalBackend:
    """A LocalBackend with a real child process and no torch."""
    env = child_environment() if env is None else env
    return LocalBackend(EngineOptions(n_threads=3), command=child_command(engine), env=env, **more)


def guest_command(engine: str = "fake_guest:open_engine", *, python: str = sys.executable) -> Sequence[str]:
    """The launcher of engines of other projects with a made-up one, which is put on its path here."""
    script = (
        f"import runpy, sys; sys.path.append({str(HERE)!r}); runpy.run_path({launch.__file__!r}, run_name='__main__')"
    )
    return (python, "-I", "-c", script, "--engine", engine)


def guest_backend(
    engine: str = "open_engine", *, python: str = sys.executable, options: EngineOptions | None = None
) -> LocalBackend:
    """A backend over the made-up guest of fake_guest.py, in a real child process."""
    return LocalBackend(
        options or EngineOptions(), command=guest_command(f"fake_guest:{engine}", python=python), name="guest"
    )


def scripted_pool(
    engine: str = "ScriptedEngine",
    *,
    n_engines: int | Literal["auto"] = 2,
    made: list[LocalBackend] | None = None,
    **more: Any,
) -> EnginePool:
    """A pool over real child processes without torch; with a number of engines it spreads every drawing.

    made: is given the pool's backends, the wide one first.
    """

    def make(
        options: EngineOptions, *, name: str, cores: Collection[int] | None, on_facts: Callable[[], None]
    ) -> LocalBackend:
        command, env = child_command(engine), child_environment()
        backend = LocalBackend(options, command=command, env=env, name=name, cores=cores, on_facts=on_facts)
        if made is not None:
            made.append(backend)
        return backend

    given: dict[str, Any] = {"n_engines": n_engines, "n_cores": 2, "make": make, "pause_s": 0.0}
    return EnginePool(EngineOptions(), **(given | more))
