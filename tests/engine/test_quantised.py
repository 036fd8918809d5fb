"""Weights in few bits take what the plan says, change pictures a little, and are told."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn

from sdfleet.engine import weight_formats
from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobDone, WeightFormat
from sdfleet.engine.memory import plan
from sdfleet.engine.quantised import keep_in
from sdfleet.errors import InvalidValue
from tests.engine.drawing import FLOAT32, Pixels, drawing, most_levels_apart, ours, run

Checkpoints = Callable[[str], Path]
FORMATS: tuple[WeightFormat, ...] = ("fp8", "int8", "nf4")
# Distance of the rounded weights, rms over rms.
MOST_APART = {"fp8": 0.03, "int8": 0.009, "nf4": 0.1}
INT8 = replace(FLOAT32, weights="int8")
# Ours (two UNets), the libraries' (the others), and the two text encoders that weigh most.
DENOISERS: dict[str, ComponentName] = {
    "sd15": "unet", "sdxl": "unet", "sd35": "transformer", "flux-dev": "transformer", "klein": "transformer",
    "zimage": "transformer",
}  # fmt: skip
ENCODERS: dict[str, ComponentName] = {"sd3": "text_encoder_3", "zimage": "text_encoder"}


def parts(name: str) -> list[ComponentName]:
    return [table[name] for table in (DENOISERS, ENCODERS) if name in table]


def components(folder: Path, weights: Any, dtype: Any = "float32", text_weights: Any = "auto") -> Components:
    return Components(folder, choose_device("cpu", dtype, weights, text_weights))


def apart(a: Pixels, b: Pixels) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def one_layer(layer: nn.Module) -> tuple[nn.Module, Any]:
    """A network with one block of one layer, and that layer."""
    return nn.ModuleList([nn.ModuleDict({"layer": layer})]), layer


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*DENOISERS, "sd3"])
def test_the_plan_saves_what_a_load_saves(name: str, dtype: str, how: WeightFormat, checkpoints: Checkpoints) -> None:
    held, planned = {}, {}
    for weights in ("auto", how):
        opened = components(checkpoints(name), weights, dtype)
        for part in parts(name):
            opened.use(part)
        held[weights] = opened.resident_bytes()
        planned[weights] = opened.weights(text_encoders=[part for part in parts(name) if part.startswith("text")])

    n_denoiser = 0 if name == "sd3" else planned["auto"].denoiser - planned[how].denoiser
    assert held["auto"] - held[how] == n_denoiser + planned["auto"].text - planned[how].text
    assert held[how] < 0.95 * held["auto"]
    assert planned[how].vae == planned["auto"].vae


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("name", DENOISERS)
def test_the_network_still_says_what_it_computes_in(name: str, how: WeightFormat, checkpoints: Checkpoints) -> None:
    module = components(checkpoints(name), how, "bfloat16").use(DENOISERS[name])
    kept = [path for path, _ in module.named_parameters() if path.endswith("packed_weight")]

    assert module.dtype == torch.bfloat16
    assert kept
    assert all(".norm" not in path or path.endswith("linear.packed_weight") for path in kept)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("spread", [0.3, 0.02, 0.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_rounded_alike_however_small_it_is(spread: float, dtype: torch.dtype, how: WeightFormat) -> None:
    weight = (torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * spread).to(dtype)
    network, layer = one_layer(nn.Linear(256, 256, dtype=dtype))
    layer.weight = nn.Parameter(weight.clone())
    bias = layer.bias

    keep_in(how, network)

    error = (layer.weight.float() - weight.float()).norm() / weight.float().norm()
    assert error < MOST_APART[how]
    assert layer.weight.dtype == dtype
    assert layer.bias is bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_fp8_is_widened_as_torch_would(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()].reshape(2, 127)
    network, layer = one_layer(nn.Linear(127, 2, dtype=dtype).requires_grad_(requires_grad=False))
    layer.weight.copy_(every.to(dtype) / 8)

    keep_in("fp8", network)

    assert torch.equal(layer.weight, every.to(dtype) / 8)


def test_one_large_number_coarsens_only_its_own_channel_in_int8() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    weight[3, 5] = 1000.0
    network, layer = one_layer(nn.Linear(64, 8))
    layer.weight = nn.Parameter(weight.clone())

    keep_in("int8", network)

    error = (layer.weight - weight).norm(dim=1) / weight.norm(dim=1)
    assert (error[torch.arange(8) != 3] < MOST_APART["int8"] * 1.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (7, 9), (6, 5, 3, 3), (64, 32, 3, 3)])
def test_four_bits_are_packed_as_bitsandbytes_packs_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.compiler.set_stance("force_eager"):
        expected, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")

    packed, largest = weight_formats.FORMATS["nf4"].pack(weight)

    assert torch.equal(packed, expected)
    table = bnb.get_4bit_type("nf4", device="cpu")
    numbers = table[torch.stack([packed >> 4, packed & 15], dim=-1).flatten().long()][: weight.numel()]
    expected_again = numbers * largest.view(torch.float32).repeat_interleave(64)[: weight.numel()]
    again = weight_formats.FORMATS["nf4"].widen(packed, largest, shape=weight.shape, dtype=dtype)
    assert torch.allclose(again.float().flatten(), expected_again, rtol=0.01)
    assert torch.equal(largest.view(torch.float32), state.absmax)


@pytest.mark.parametrize("how", FORMATS)
def test_weights_of_zero_stay_zero(how: WeightFormat) -> None:
    network, layer = one_layer(nn.Conv2d(2, 2, 3))
    nn.init.zeros_(layer.weight)

    keep_in(how, network)

    assert not layer.weight.any()
    assert torch.equal(layer(torch.ones(1, 2, 3, 3))[0, :, 0, 0], layer.bias)


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("name", [*DENOISERS, "sd3"])
def test_the_picture_is_another_one_and_near(name: str, how: WeightFormat, checkpoints: Checkpoints) -> None:
    """Toy networks answer wildly, so near is: nearer than the picture of another seed, and 4 bits are not."""
    folder = checkpoints(name)
    asked = [drawing(name, folder, job=str(seed), seed=seed, guidance=1.5) for seed in (7, 8)]
    full, other = ours(*asked)

    narrow = ours(asked[0], options=replace(FLOAT32, weights=how))[0]

    assert 0 < apart(full, narrow) < (1.5 if how == "nf4" else 0.5) * apart(full, other)


@pytest.mark.parametrize("how", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["sd15", "flux-dev"])
def test_a_picture_in_company_is_the_picture_alone(name: str, how: Any, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    options = replace(FLOAT32, weights=how)
    one = drawing(name, folder)
    others = [drawing(name, folder, job=str(n), prompt="a robot", seed=n, steps=3 + n) for n in range(3)]

    assert most_levels_apart(ours(one, *others, options=options)[0], ours(one, options=options)[0]) <= 1


def done(folder: Path, name: str, options: EngineOptions) -> tuple[JobDone, Engine]:
    engine = Engine(options)
    engine.submit(drawing(name, folder))
    return next(event for event in run(engine) if isinstance(event, JobDone)), engine


def test_it_is_told_in_the_answer_and_by_the_engine(checkpoints: Checkpoints) -> None:
    told, engine = done(checkpoints("sd15"), "sd15", INT8)

    assert told.dtype == "float32, weights in int8"
    assert told.warnings == ("weights in int8: the picture differs from the full one",)
    assert engine.facts()["weights"] == "int8"
    engine.close()


def test_t5_alone_can_be_kept_in_few_bits(checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd3")
    full, narrow = components(folder, "auto").weights(), components(folder, "auto", text_weights="int8").weights()
    told, engine = done(folder, "sd3", replace(FLOAT32, text_weights="int8"))
    engine.close()

    assert (narrow.denoiser, narrow.vae) == (full.denoiser, full.vae)
    assert narrow.text < 0.9 * full.text
    assert told.dtype == "float32, text encoders in int8"
    assert told.warnings == ("text encoders in int8: the picture differs from the full one",)


def test_the_denoiser_alone_can_be_kept_in_few_bits(checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd3")
    full, narrow = components(folder, "auto").weights(), components(folder, "int8", text_weights="full").weights()

    assert narrow.denoiser < full.denoiser
    assert narrow.text == full.text


def test_a_checkpoint_without_a_large_text_encoder_is_drawn_in_full(checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd15")
    told, engine = done(folder, "sd15", replace(FLOAT32, text_weights="int8"))
    engine.close()

    assert told.dtype == "float32"
    assert not told.warnings


def test_what_would_have_to_come_by_phases_stays_whole(checkpoints: Checkpoints) -> None:
    """A limit that the full weights do not keep to, and the smaller ones do."""
    full, narrow = (components(checkpoints("flux-dev"), weights).weights() for weights in ("auto", "fp8"))
    free = {"activation_bytes": 0, "decode_bytes": 0, "free_bytes": full.total}

    assert plan(full, **free, mode="auto").residency == "by_phase"
    assert plan(narrow, **free, mode="auto").residency == "all"


def test_a_put_away_network_comes_back_in_8_bits(checkpoints: Checkpoints) -> None:
    one = drawing("sd3", checkpoints("sd3"))

    assert most_levels_apart(ours(one, options=replace(INT8, memory_mode="eco"))[0], ours(one, options=INT8)[0]) == 0


@pytest.mark.parametrize("executor", ["openvino", "int8"])
def test_openvino_cannot_be_asked_for_beside_it(executor: Any) -> None:
    with pytest.raises(InvalidValue, match="OpenVINO keeps weights in its own format"):
        Engine(EngineOptions(device="cpu", dtype="float32", weights="fp8", executor=executor))


@pytest.mark.parametrize(("how", "why"), [("fp8", "Metal has no 8-bit floats"), ("nf4", "not been tried on Metal")])
def test_metal_refuses_what_it_cannot_widen(how: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    with pytest.raises(InvalidValue, match=why) as refused:
        choose_device("mps", "auto", "auto", how)

    assert refused.value.hint == "use int8, or memory mode eco"
    assert choose_device("mps", "auto", "int8").weights == "int8"


def test_nf4_without_its_library_is_refused_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    with pytest.raises(InvalidValue, match="nf4 needs bitsandbytes") as refused:
        choose_device("cpu", "float32", "nf4")

    assert refused.value.hint == "pip install 'sdfleet[quant]', or use int8"
