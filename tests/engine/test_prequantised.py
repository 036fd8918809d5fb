"""Checkpoints that bitsandbytes made small are read as they are, by what it says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdfleet.engine import prequantised
from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import JobDone
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel
from tests.engine.drawing import FLOAT32, drawing, ours, run

Checkpoints = Callable[[str], Path]
How = Literal["nf4", "nf4 nested", "int8"]
SAYS: Mapping[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
}
FILES: dict[ComponentName, str] = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def quantised(weights: Mapping[str, Tensor], how: How) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file as bitsandbytes writes them, and what its own functions make of the weights again."""
    saved: dict[str, Tensor] = {}
    again: dict[str, Tensor] = {}
    for name, weight in weights.items():
        again[name] = weight
        if weight.dim() != 2 or "relative" in name or not any(part in name for part in (".attn.", ".layer.")):
            saved[name] = weight
        elif how == "int8":
            largest = weight.abs().amax(dim=1)
            saved[name] = (weight * 127 / largest[:, None]).round().to(torch.int8)
            saved[f"{name.removesuffix('weight')}SCB"] = largest
            saved[f"{name.removesuffix('weight')}weight_format"] = torch.tensor(0, dtype=torch.uint8)
            again[name] = bnb.int8_vectorwise_dequant(saved[name], largest)
        else:
            packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=how == "nf4 nested")
            saved[name] = packed
            saved |= {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
            # Its own shape is read wrongly by bitsandbytes on a CPU where a row is no multiple of 64.
            state.shape = torch.Size((weight.numel() // 64, 64))
            again[name] = bnb.dequantize_4bit(packed, state).view(weight.shape)
    return saved, again


def copied(folder: Path, to: Path, part: ComponentName, how: How) -> tuple[Path, Path]:
    """Two copies of a checkpoint: one with a component in few bits, one with what these say as plain numbers."""
    made = []
    weights = {name: tensor.contiguous() for name, tensor in load_file(folder / part / FILES[part]).items()}
    for label, tensors in zip(("small", "plain"), quantised(weights, how), strict=True):
        copy = to / label
        shutil.copytree(folder, copy)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy / part / FILES[part])
        made.append(copy)
    said = json.loads((made[0] / part / "config.json").read_text())
    (made[0] / part / "config.json").write_text(json.dumps(said | {"quantization_config": SAYS[how]}))
    return made[0], made[1]


@pytest.mark.parametrize("how", SAYS)
@pytest.mark.parametrize("part", FILES)
def test_the_picture_is_that_of_what_bitsandbytes_reads_in_it(
    part: ComponentName, how: How, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    small, plain = copied(checkpoints("flux-dev"), tmp_path, part, how)

    a, b, full = (ours(drawing("flux-dev", folder))[0] for folder in (small, plain, checkpoints("flux-dev")))

    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    assert not np.array_equal(a, full)


def test_it_is_held_small_planned_small_and_told(tmp_path: Path, checkpoints: Checkpoints) -> None:
    small, plain = copied(checkpoints("flux-dev"), tmp_path, "transformer", "int8")
    held, planned = [], []
    for folder in (small, plain):
        components = Components(folder, choose_device("cpu", "float32"))
        components.use("transformer")
        held.append(components.resident_bytes())
        planned.append(components.weights().denoiser)
    engine = Engine(FLOAT32)
    engine.submit(drawing("flux-dev", small))
    done = next(event for event in run(engine) if isinstance(event, JobDone))
    engine.close()

    assert held[0] < held[1]
    assert abs(planned[0] - held[0]) < 0.02 * held[0]
    assert done.dtype == "float32, weights in int8"


def refused(tmp_path: Path, checkpoints: Checkpoints, says: dict[str, Any]) -> UnsupportedByModel:
    folder = tmp_path / "flux-dev"
    shutil.copytree(checkpoints("flux-dev"), folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": says}))
    with pytest.raises(UnsupportedByModel) as found:
        Components(folder, choose_device("cpu", "float32")).use("transformer")
    return found.value


@pytest.mark.parametrize(
    ("says", "what"),
    [
        ({"quant_method": "torchao", "quant_type": {}}, "quantised by torchao"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes' fp4"),
    ],
)
def test_what_is_not_read_is_refused_with_what_to_do(
    says: dict[str, Any], what: str, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    found = refused(tmp_path, checkpoints, says)

    assert what in found.message
    assert found.hint == "get the checkpoint in full precision and set SD_WEIGHTS to int8 or nf4"


def test_without_the_library_four_bits_are_refused_with_the_command(
    tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prequantised, "has_bitsandbytes", lambda: False)

    assert refused(tmp_path, checkpoints, SAYS["nf4"]).hint == "install it: pip install 'sdfleet[quant]'"


def test_a_weight_whose_scale_is_gone_is_no_checkpoint(tmp_path: Path, checkpoints: Checkpoints) -> None:
    small, _ = copied(checkpoints("flux-dev"), tmp_path, "transformer", "int8")
    file = small / "transformer" / FILES["transformer"]
    save_file({name: t for name, t in load_file(file).items() if not name.endswith("SCB")}, file)

    with pytest.raises(BrokenCheckpoint, match="without its scale"):
        Components(small, choose_device("cpu", "float32")).use("transformer")
