"""Weights in 8 bits take what the plan says, change pictures a little, and are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobDone
from sdfleet.engine.fp8_weights import FORMAT, keep_in_fp8
from sdfleet.engine.memory import plan
from sdfleet.errors import InvalidValue
from tests.engine.drawing import FLOAT32, Pixels, drawing, most_levels_apart, ours, run

Checkpoints = Callable[[str], Path]
FP8 = replace(FLOAT32, weights="fp8")
# Ours (two UNets), the libraries' (the others), and the two text encoders that weigh most.
DENOISERS: dict[str, ComponentName] = {
    "sd15": "unet", "sdxl": "unet", "sd35": "transformer", "flux-dev": "transformer", "klein": "transformer",
    "zimage": "transformer",
}  # fmt: skip
ENCODERS: dict[str, ComponentName] = {"sd3": "text_encoder_3", "zimage": "text_encoder"}


def parts(name: str) -> list[ComponentName]:
    return [table[name] for table in (DENOISERS, ENCODERS) if name in table]


def components(folder: Path, weights: Any, dtype: Any = "float32") -> Components:
    return Components(folder, choose_device("cpu", dtype, weights))


def apart(a: Pixels, b: Pixels) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*DENOISERS, "sd3"])
def test_the_plan_saves_what_a_load_saves(name: str, dtype: str, checkpoints: Checkpoints) -> None:
    held, planned = {}, {}
    for weights in ("auto", "fp8"):
        opened = components(checkpoints(name), weights, dtype)
        for part in parts(name):
            opened.use(part)
        held[weights] = opened.resident_bytes()
        planned[weights] = opened.weights(text_encoders=[part for part in parts(name) if part.startswith("text")])

    n_denoiser = 0 if name == "sd3" else planned["auto"].denoiser - planned["fp8"].denoiser
    assert held["auto"] - held["fp8"] == n_denoiser + planned["auto"].text - planned["fp8"].text
    assert held["fp8"] < 0.95 * held["auto"]
    assert planned["fp8"].vae == planned["auto"].vae


@pytest.mark.parametrize("name", DENOISERS)
def test_the_network_still_says_what_it_computes_in(name: str, checkpoints: Checkpoints) -> None:
    module = components(checkpoints(name), "fp8", "bfloat16").use(DENOISERS[name])
    kept = [path for path, weight in module.named_parameters() if weight.dtype == FORMAT]

    assert module.dtype == torch.bfloat16
    assert kept
    assert all(".norm" not in path or path.endswith("linear.weight_fp8") for path in kept)
    assert {weight.dtype for weight in module.parameters()} == {FORMAT, torch.bfloat16}


@pytest.mark.parametrize("spread", [0.3, 0.02, 0.002])
def test_a_weight_is_rounded_alike_however_small_it_is(spread: float) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * spread
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(256, 256)})])})
    layer: Any = network["blocks"][0]["layer"]  # type: ignore[index]
    layer.weight = nn.Parameter(weight.clone())
    bias = layer.bias

    keep_in_fp8(network)

    error = (layer.weight - weight).pow(2).mean().sqrt() / weight.pow(2).mean().sqrt()
    assert error < 0.03
    assert layer.weight.dtype == weight.dtype
    assert layer.bias is bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_the_format_is_widened_as_torch_would(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FORMAT)
    every = every[~every.float().isnan()].reshape(2, 127)
    layer: Any = nn.Linear(127, 2, dtype=dtype).requires_grad_(requires_grad=False)
    network = nn.ModuleList([nn.ModuleDict({"layer": layer})])
    layer.weight.copy_(every.to(dtype) / 8)

    keep_in_fp8(network)

    assert torch.equal(layer.weight, every.to(dtype) / 8)


def test_weights_of_zero_stay_zero() -> None:
    network = nn.ModuleList([nn.ModuleDict({"layer": nn.Conv2d(2, 2, 3)})])
    layer: Any = network[0]["layer"]  # type: ignore[index]
    nn.init.zeros_(layer.weight)

    keep_in_fp8(network)

    assert not layer.weight.any()
    assert torch.equal(layer(torch.ones(1, 2, 3, 3))[0, :, 0, 0], layer.bias)


@pytest.mark.parametrize("name", [*DENOISERS, "sd3"])
def test_the_picture_is_another_one_and_near(name: str, checkpoints: Checkpoints) -> None:
    """Toy networks answer wildly, so near is: nearer than the picture of another seed."""
    folder = checkpoints(name)
    asked = [drawing(name, folder, job=str(seed), seed=seed, guidance=1.5) for seed in (7, 8)]
    full, other = ours(*asked)

    narrow = ours(asked[0], options=FP8)[0]

    assert 0 < apart(full, narrow) < 0.5 * apart(full, other)


@pytest.mark.parametrize("name", ["sd15", "flux-dev"])
def test_a_picture_in_company_is_the_picture_alone(name: str, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    one = drawing(name, folder)
    others = [drawing(name, folder, job=str(n), prompt="a robot", seed=n, steps=3 + n) for n in range(3)]

    assert most_levels_apart(ours(one, *others, options=FP8)[0], ours(one, options=FP8)[0]) <= 1


def test_it_is_told_in_the_answer_and_by_the_engine(checkpoints: Checkpoints) -> None:
    engine = Engine(FP8)
    engine.submit(drawing("sd15", checkpoints("sd15")))
    done = next(event for event in run(engine) if isinstance(event, JobDone))

    assert done.dtype == "float32, weights in fp8"
    assert done.warnings == ("weights in fp8: the picture differs from the full one",)
    assert engine.facts()["weights"] == "fp8"
    engine.close()


def test_what_would_have_to_come_by_phases_stays_whole(checkpoints: Checkpoints) -> None:
    """A limit that the full weights do not keep to, and the smaller ones do."""
    full, narrow = (components(checkpoints("flux-dev"), weights).weights() for weights in ("auto", "fp8"))
    free = {"activation_bytes": 0, "decode_bytes": 0, "free_bytes": full.total}

    assert plan(full, **free, mode="auto").residency == "by_phase"
    assert plan(narrow, **free, mode="auto").residency == "all"


def test_a_put_away_network_comes_back_in_8_bits(checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd3")
    options = replace(FP8, memory_mode="eco")

    assert (
        most_levels_apart(
            ours(drawing("sd3", folder), options=options)[0], ours(drawing("sd3", folder), options=FP8)[0]
        )
        == 0
    )


@pytest.mark.parametrize("executor", ["openvino", "int8"])
def test_openvino_cannot_be_asked_for_beside_it(executor: Any) -> None:
    with pytest.raises(InvalidValue, match="OpenVINO keeps weights in its own format"):
        Engine(EngineOptions(device="cpu", dtype="float32", weights="fp8", executor=executor))


def test_metal_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    with pytest.raises(InvalidValue, match="Metal has no 8-bit floats"):
        choose_device("mps", "auto", "fp8")
