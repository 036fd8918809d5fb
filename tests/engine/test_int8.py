"""8 bits are used only where they were asked for, stay near and are faster; every job is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdfleet.engine import executors
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobDone
from sdfleet.engine.openvino_cache import ModelCache
from sdfleet.engine.openvino_convert import MODEL_FILE, convert
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser
from sdfleet.engine.openvino_int8 import MODEL_FILE as INT8_FILE
from sdfleet.errors import InvalidValue
from tests.engine.drawing import FLOAT32, drawing, pictures, run

pytest.importorskip("openvino")

Checkpoints = Callable[[str], Path]


class Converted:
    """A conversion in this process."""

    has_ended = True

    def __init__(self, checkpoint: Path, component: str, target: Path) -> None:
        self._convert = (checkpoint, component, target)

    def result(self) -> Path:
        checkpoint, component, target = self._convert
        target.mkdir(parents=True)
        convert(checkpoint, component, target)
        return target / MODEL_FILE

    def cancel(self) -> None:
        pass


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(autouse=True)
def converted_here(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)

    def here(self: ModelCache, checkpoint: Path, component: str, key: str, **_how: bool) -> Converted:
        return Converted(checkpoint, component, self._root() / key)

    monkeypatch.setattr(ModelCache, "convert", here)
    yield
    for note in cache_folder.glob("*/trial-*"):
        note.unlink()


def seconds(monkeypatch: pytest.MonkeyPatch, *, int8: float, error: float = 0.0) -> None:
    """0.1 s for torch and OpenVINO, and what is said for 8 bits, whose answers can be spoilt."""
    real = executors.timed_call

    def timed(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, torch.Tensor]:
        _, answer = real(network, args, kwargs)
        is_int8 = isinstance(network, OpenVinoDenoiser) and network.model_file.name == INT8_FILE
        return (int8 if is_int8 else 0.1), answer * (1 + error * is_int8)

    monkeypatch.setattr(executors, "timed_call", timed)


def engine_of(cache_folder: Path, **changes: Any) -> Engine:
    return Engine(replace(FLOAT32, executor="int8", cache_folder=str(cache_folder), **changes))


def draw(engine: Engine, folder: Path) -> tuple[Any, JobDone]:
    engine.submit(drawing("sd15", folder))
    events = run(engine)
    return pictures(events)["job", 0], next(event for event in events if isinstance(event, JobDone))


def facts_of(engine: Engine) -> Any:
    (facts,) = engine.facts()["executors"].values()  # type: ignore[attr-defined]
    return facts


def test_8_bits_are_taken_after_the_trial_and_told(
    checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds(monkeypatch, int8=0.05)
    engine = engine_of(cache_folder)
    first, told_first = draw(engine, checkpoints("sd15"))
    second, told_second = draw(engine, checkpoints("sd15"))
    facts = facts_of(engine)
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
    seconds(monkeypatch, int8=int8_s, error=error)
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
    seconds(monkeypatch, int8=0.05)
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
    seconds(monkeypatch, int8=0.05)
    engine = engine_of(cache_folder)
    draw(engine, checkpoints("sd15"))
    assert facts_of(engine)["executor"] == "int8"
    engine.close()
    engine = Engine(replace(FLOAT32, executor="auto", cache_folder=str(cache_folder)))
    _, told = draw(engine, checkpoints("sd15"))
    assert (told.dtype, told.warnings, facts_of(engine)["executor"]) == ("float32", (), "torch")
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
