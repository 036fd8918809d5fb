"""Checkpoints that come, stay and leave: pinned ones, unloaded ones, and what is told when there is no room."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sdfleet.domain import JobId
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed
from sdfleet.errors import InUse, OutOfMemory
from tests.engine.drawing import drawing

Folders = Callable[[str], Path]


def run(engine: Engine, folder: Path, kind: str, *, n_images: int = 0, seed: int = 1) -> Event:
    """The last event of one job; of no pictures, it only loads."""
    job = JobId(f"{folder.name}-{seed}-{n_images}")
    engine.submit(replace(drawing(kind, folder, seed=seed), job_id=job, n_images=n_images))
    events: list[Event] = []
    while not any(isinstance(event, JobDone | JobFailed) for event in events):
        events = engine.step()
    return events[-1]


def held(engine: Engine) -> list[str]:
    facts = engine.facts()
    assert isinstance(facts["checkpoints"], list)
    return [Path(name).name for name in facts["checkpoints"]]


def engine_of(**options: object) -> Engine:
    return Engine(EngineOptions(device="cpu", dtype="float32", executor="torch", **options))  # type: ignore[arg-type]


def test_a_drawing_of_no_pictures_loads_all_that_a_drawing_needs(checkpoints: Folders) -> None:
    engine = engine_of()
    done = run(engine, checkpoints("sd15"), "sd15")
    assert isinstance(done, JobDone)
    before = engine.facts()["bytes_by_checkpoint"]
    assert held(engine) == ["sd15"]
    drawn = run(engine, checkpoints("sd15"), "sd15", n_images=1)
    assert isinstance(drawn, JobDone)
    assert engine.facts()["bytes_by_checkpoint"] == before
    assert drawn.timings_s["load"] < done.timings_s["load"]
    engine.close()


def test_an_inpainting_checkpoint_can_be_loaded_without_a_picture(checkpoints: Folders) -> None:
    engine = engine_of()
    assert isinstance(run(engine, checkpoints("sd15-inpaint"), "sd15"), JobDone)
    engine.close()


def test_an_unloaded_checkpoint_leaves_with_its_prompts_and_not_under_a_job(checkpoints: Folders) -> None:
    engine = engine_of()
    for kind in ("sd15", "sd21"):
        run(engine, checkpoints(kind), kind, n_images=1)
    n_prompts = len(engine._residency.prompts)
    engine.unload(str(checkpoints("sd15")))
    assert held(engine) == ["sd21"]
    assert len(engine._residency.prompts) < n_prompts
    engine.submit(drawing("sd21", checkpoints("sd21")))
    with pytest.raises(InUse, match="1 job"):
        engine.unload(str(checkpoints("sd21")))
    engine.cancel(drawing("sd21", checkpoints("sd21")).job_id)
    engine.unload(str(checkpoints("sd21")))
    assert held(engine) == []
    engine.close()


def _room_for_one_and_a_half(checkpoints: Folders) -> int:
    """Bytes in which sd15 or a copy of it can be drawn, and not both held whole."""
    engine = engine_of()
    run(engine, checkpoints("sd15"), "sd15")
    family = engine._residency.get(str(checkpoints("sd15"))).family
    live = max(family.peak_bytes(width_px=64, height_px=64, n_rows=2), family.decode_bytes(width_px=64, height_px=64))
    live += family.left_by_prompts_bytes(drawing("sd15", checkpoints("sd15")))
    n_bytes = family.components.resident_bytes()
    engine.close()
    return int((1.5 * n_bytes + live) / 0.9)


def test_an_idle_checkpoint_makes_room_and_a_pinned_one_does_not(checkpoints: Folders, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoints("sd15"), tmp_path / "other")
    limit = _room_for_one_and_a_half(checkpoints)
    engine = engine_of(memory_limit_bytes=limit, memory_mode="fast")
    run(engine, checkpoints("sd15"), "sd15")
    assert isinstance(run(engine, other, "sd15"), JobDone)
    assert held(engine) == ["other"]

    engine.pin((str(other),))
    refused = run(engine, checkpoints("sd15"), "sd15")
    assert isinstance(refused, JobFailed)
    assert isinstance(refused.error, OutOfMemory)
    assert "pinned are other (0.0 GB)" in refused.error.message
    assert "needs 0.0 GB at this size and the device has 0.0 GB" in refused.error.message
    assert "unpin one of them" in refused.error.hint
    assert held(engine) == ["other"]

    engine.pin(())
    assert isinstance(run(engine, checkpoints("sd15"), "sd15"), JobDone)
    assert held(engine) == ["sd15"]
    engine.close()
