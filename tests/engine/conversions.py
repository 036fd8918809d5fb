"""OpenVINO's part of the engine at toy size: conversions in this process, and seconds that a test chooses."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pytest
import torch

from sdfleet.engine import executors
from sdfleet.engine.engine import Engine
from sdfleet.engine.openvino_cache import ModelCache
from sdfleet.engine.openvino_convert import MODEL_FILE, convert
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser
from sdfleet.engine.openvino_int8 import MODEL_FILE as INT8_FILE

Executor = Literal["torch", "openvino", "int8"]


class InThisProcess:
    """A conversion without the seconds that another process takes to import everything."""

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


@contextmanager
def converting_here(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Components converted meanwhile. What was measured is forgotten afterwards, what was converted is kept."""
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    begun: list[str] = []

    def here(self: ModelCache, checkpoint: Path, component: str, key: str, **_how: bool) -> InThisProcess:
        begun.append(component)
        return InThisProcess(checkpoint, component, self._root() / key)

    monkeypatch.setattr(ModelCache, "convert", here)
    yield begun
    for note in cache_folder.glob("*/trial-*"):
        note.unlink()


def fake_seconds(
    monkeypatch: pytest.MonkeyPatch,
    *,
    openvino: float = 0.1,
    int8: float = 0.1,
    spoilt: Mapping[Executor, float] = MappingProxyType({}),
) -> None:
    """What a call is said to take, in seconds; by torch 0.1. spoilt: which answers are off, and by how much."""
    real = executors.timed_call
    seconds: Mapping[Executor, float] = {"torch": 0.1, "openvino": openvino, "int8": int8}

    def timed(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, torch.Tensor]:
        _, answer = real(network, args, kwargs)
        by: Executor = "torch"
        if isinstance(network, OpenVinoDenoiser):
            by = "int8" if network.model_file.name == INT8_FILE else "openvino"
        return seconds[by], answer * (1 + spoilt.get(by, 0.0))

    monkeypatch.setattr(executors, "timed_call", timed)


def executor_of(engine: Engine) -> Any:
    """What the engine says of how its only checkpoint is drawn."""
    (facts,) = engine.facts()["executors"].values()  # type: ignore[attr-defined]
    return facts
