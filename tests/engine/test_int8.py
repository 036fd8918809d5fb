"""8 bits are used only where they were asked for, stay near and are faster; every job is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdfleet.engine import executors
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobDone
from sdfleet.errors import InvalidValue
from tests.engine.conversions import converting_here, executor_of, fake_seconds
from tests.engine.drawing import FLOAT32, drawing, pictures, run

pytest.importorskip("openvino")

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(autouse=True)
def converted(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with converting_here(cache_folder, monkeypatch) as begun:
        yield begun


def engine_of(cache_folder: Path, **changes: Any) -> Engine:
    return Engine(replace(FLOAT32, executor="int8", cache_folder=str(cache_folder), **changes))


def draw(engine: Engine, folder: Path) -> tuple[Any, JobDone]:
    engine.submit(drawing("sd15", folder))
    events = run(engine)
    return pictures(events)["job", 0], next(event for event in events if isinstance(event, JobDone))


@pytest.mark.slow
def test_8_bits_are_taken_after_the_trial_and_told(
    checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_seconds(monkeypatch, int8=0.05)
    engine = engine_of(cache_folder)
    first, told_first = draw(engine, checkpoints("sd15"))
    second, told_second = draw(engine, checkpoints("sd15"))
    facts = executor_of(engine)
    engine.close()

    assert (told_first.dtype, told_first.warnings) == ("float32", ("int8 is not used: not tried yet",))
    assert told_second.dtype == "int8"
    assert told_second.warnings == ("drawn in int8: the picture differs from that of the full format",)
    assert (facts["executor"], facts["int8_ms_by_rows"]["2"]) == ("int8", 50.0)
    assert 1e-4 < facts["int8_answers_apart"] < 0.1  # rounded indeed, and yet near
    assert 0 < abs(first.astype(int) - second.astype(int)).mean() < 8


@pytest.mark.parametrize(
    ("int8_s", "error", "why"),
    [(0.098, 0.0, "it took 0.98 of the faster other executor's time"), (0.01, 0.5, "away from torch's, at most 0.1")],
)
def test_8_bits_that_are_slow_or_far_off_are_refused_with_the_reason(
    int8_s: float, error: float, why: str, checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_seconds(monkeypatch, int8=int8_s, spoilt={"int8": error})
    engine = engine_of(cache_folder)
    first, _ = draw(engine, checkpoints("sd15"))
    second, told = draw(engine, checkpoints("sd15"))
    engine.close()

    assert told.dtype == "float32"
    assert told.warnings[0].startswith("int8 is not used: ")
    assert why in told.warnings[0]
    assert abs(first.astype(int) - second.astype(int)).max() <= 1


def test_the_next_start_draws_its_first_picture_in_8_bits(
    checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_seconds(monkeypatch, int8=0.05)
    engine = engine_of(cache_folder)
    draw(engine, checkpoints("sd15"))
    second, _ = draw(engine, checkpoints("sd15"))
    engine.close()
    engine = engine_of(cache_folder)
    again, told = draw(engine, checkpoints("sd15"))
    engine.close()

    assert told.dtype == "int8"
    assert abs(again.astype(int) - second.astype(int)).max() <= 1


def test_nobody_gets_8_bits_who_did_not_ask_for_them(
    checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of an earlier start that did is there, and its verdict was for 8 bits."""
    fake_seconds(monkeypatch, int8=0.05)
    engine = engine_of(cache_folder)
    draw(engine, checkpoints("sd15"))
    assert executor_of(engine)["executor"] == "int8"
    engine.close()
    engine = Engine(replace(FLOAT32, executor="auto", cache_folder=str(cache_folder)))
    _, told = draw(engine, checkpoints("sd15"))
    assert (told.dtype, told.warnings, executor_of(engine)["executor"]) == ("float32", (), "torch")
    engine.close()


def test_a_family_that_cannot_be_converted_is_drawn_and_says_so(checkpoints: Checkpoints, cache_folder: Path) -> None:
    engine = engine_of(cache_folder)
    engine.submit(drawing("flux-schnell", checkpoints("flux-schnell"), guidance=1.0, negative_prompt=""))
    events = run(engine)
    engine.close()

    told = next(event for event in events if isinstance(event, JobDone))
    assert told.warnings[-1].startswith("int8 is not used: only")


def test_int8_without_openvino_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_is_installed", lambda: False)

    with pytest.raises(InvalidValue, match="OpenVINO is not installed"):
        Engine(EngineOptions(device="cpu", dtype="float32", executor="int8"))
