"""What an engine tries out while there is nothing to draw, so that a burst of requests finds every size ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.families.base import NetworkRows
from sdfleet.engine.families.sd import StableDiffusion
from tests.engine.drawing import drawing, pictures, run

Checkpoints = Callable[[str], Path]

OPTIONS = EngineOptions(device="cpu", dtype="float32", n_threads=1, max_rows=12, rehearses=True)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every network call."""
    sizes: list[int] = []
    predict = StableDiffusion.predict

    def noted(family: StableDiffusion, rows: NetworkRows) -> object:
        sizes.append(len(rows.latents))
        return predict(family, rows)

    monkeypatch.setattr(StableDiffusion, "predict", noted)
    return sizes


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(OPTIONS)
    yield engine
    engine.close()


def finish(engine: Engine) -> None:
    """Turns until nothing is left to draw; what is tried out stays undone."""
    while not engine.is_resting:
        engine.step()


def test_a_burst_meets_only_sizes_that_were_tried(checkpoints: Checkpoints, engine: Engine, called: list[int]) -> None:
    folder = checkpoints("sd15")
    engine.submit(drawing("sd15", folder, job="first"))
    finish(engine)
    assert max(called) == 2
    run(engine)
    tried = set(called)
    called.clear()
    for number in range(6):
        engine.submit(drawing("sd15", folder, job=f"burst-{number}", steps=3 + number))
    finish(engine)
    assert len(set(called)) > 2
    assert set(called) <= tried


def test_a_job_that_comes_meanwhile_is_drawn_in_the_next_turn(
    checkpoints: Checkpoints, engine: Engine, called: list[int]
) -> None:
    engine.submit(drawing("sd15", checkpoints("sd15"), job="first"))
    finish(engine)
    engine.step()
    assert not engine.is_idle
    assert engine.facts()["is_rehearsing"]
    called.clear()
    engine.submit(drawing("sd15", checkpoints("sd15"), job="second", steps=1))
    engine.step()
    assert called == [2]
    run(engine)
    assert not engine.facts()["is_rehearsing"]


def test_a_rehearsal_leaves_the_pictures_as_they_are(checkpoints: Checkpoints, engine: Engine) -> None:
    asked = [drawing("sd15", checkpoints("sd15"), job=f"job-{i}", reproducible=True) for i in range(2)]
    engine.submit(asked[0])
    before = pictures(run(engine))
    engine.submit(asked[1])
    after = pictures(run(engine))
    assert (before["job-0", 0] == after["job-1", 0]).all()


def test_a_checkpoint_that_left_is_not_brought_back_to_rehearse(
    checkpoints: Checkpoints, engine: Engine, called: list[int]
) -> None:
    engine.submit(drawing("sd15", checkpoints("sd15"), job="first"))
    finish(engine)
    engine.step()
    engine.unload(str(checkpoints("sd15")))
    called.clear()
    run(engine)
    assert not called
    assert engine.facts()["checkpoints"] == []
