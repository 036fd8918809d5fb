"""LoRA and embedding files for the toy checkpoints, in the layouts of the programs that write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdfleet.catalog.adapters import Adapters
from sdfleet.domain import AdapterFile, Lora
from tests import tiny

RANK = 2
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# (down, up, alpha) by component and layer, in diffusers' names.
Changes = dict[tuple[str, str], tuple[Tensor, Tensor, float]]


def denoiser_of(pipe: Any) -> str:
    """`unet` or `transformer`."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def changes_for(folder: Path, *, seed: int = 0, gain: float = 0.15, has_text: bool = True) -> Changes:
    """A change of every linear layer and convolution of a toy's denoiser and text encoders."""
    pipe = tiny.load(folder)
    generator = torch.Generator().manual_seed(seed)
    found: Changes = {}
    for component in (denoiser_of(pipe), *(TEXT_ENCODERS if has_text else ())):
        module = getattr(pipe, component, None)
        for name, layer in () if module is None else module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found[component, name] = drawn(tuple(layer.weight.shape), generator, gain=gain)
    return found


def drawn(shape: tuple[int, ...], generator: torch.Generator, *, gain: float = 0.15) -> tuple[Tensor, Tensor, float]:
    """down, up and alpha for a weight of this shape."""
    down = torch.randn(RANK, *shape[1:], generator=generator) * gain
    up = torch.randn(shape[0], RANK, *([1] * len(shape[2:])), generator=generator) * gain
    return down, up, 1.0


def as_kohya(changes: Changes) -> dict[str, Tensor]:
    """`lora_unet_...`, `lora_te1_...`."""
    prefixes = {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": "lora_te1_",
                "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for (component, layer), (down, up, alpha) in changes.items():
        key = prefixes[component] + layer.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def as_diffusers(changes: Changes) -> dict[str, Tensor]:
    """`unet....lora_A.weight`; alpha goes into `up`, as this layout has no place for it."""
    tensors: dict[str, Tensor] = {}
    for (component, layer), (down, up, alpha) in changes.items():
        key = f"{component}.{layer}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up * alpha / RANK}
    return tensors


def as_first_diffusers(changes: Changes) -> dict[str, Tensor]:
    """`unet....lora.down.weight`."""
    return {
        name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
        for name, tensor in as_diffusers(changes).items()
    }


def as_peft(changes: Changes, *, component: str) -> dict[str, Tensor]:
    """`base_model.model....lora_A.weight` of one component; alpha is in adapter_config.json."""
    tensors: dict[str, Tensor] = {}
    for (its, layer), (down, up, _) in changes.items():
        if its == component:
            key = f"base_model.model.{layer}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def used(path: Path, scale: float = 1.0, *, text_scale: float | None = None) -> Lora:
    """The file as a drawing has it."""
    file = AdapterFile(name=path.stem, path=str(path), content=Adapters(path.parent).content(path))
    return Lora(file=file, scale=scale, text_scale=scale if text_scale is None else text_scale)


def merged(folder: Path, target: Path, *parts: tuple[Changes, float]) -> Path:
    """A copy of the toy whose weights hold the changes, each at its scale: what a LoRA must be equal to."""
    pipe = tiny.load(folder)
    for changes, scale in parts:
        for (component, name), (down, up, alpha) in changes.items():
            layer = getattr(pipe, component).get_submodule(name)
            delta = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view_as(layer.weight)
            with torch.no_grad():
                layer.weight += scale * alpha / RANK * delta
    pipe.save_pretrained(target)
    return target
