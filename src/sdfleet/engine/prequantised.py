"""Checkpoints that were saved in few bits: a component whose config.json has a `quantization_config`.

What bitsandbytes wrote (4-bit nf4, 8-bit) is put into the layers of quantised.py, and so needs no card. Others are
refused: torchao and quanto are mostly pickled, and GGUF comes as a file of its own, which `models import` takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdfleet.catalog.headers import Header
from sdfleet.engine.events import WeightFormat
from sdfleet.engine.quantised import can_keep, keep_packed
from sdfleet.engine.weight_formats import NF4_BLOCK, has_bitsandbytes
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

KEY = "quantization_config"
# bitsandbytes' own words, between a weight's name and what belongs to it.
_OF_4_BITS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
_OF_8_BITS = ("SCB", "weight_format")
# Dequantised int8 is weight * SCB / this.
_INT8_MOST = 127
_INSTEAD = "get the checkpoint in full precision and set SD_WEIGHTS to int8 or nf4"


def format_of(config: Mapping[str, Any], *, where: str) -> WeightFormat | None:
    """What a component's weights were saved in; None for plain numbers.

    config: its config.json. where: names it to people. Raises UnsupportedByModel, with what to do, for a method that is
    not read, and for bitsandbytes' 4 bits where that is not installed.
    """
    said = config.get(KEY)
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if method != "bitsandbytes":
        raise UnsupportedByModel(f"{where} was quantised by {method or 'an unnamed method'}, not read", hint=_INSTEAD)
    if said.get("load_in_8bit"):
        return "int8"
    kind = said.get("bnb_4bit_quant_type", "fp4")
    if not said.get("load_in_4bit") or kind != "nf4":
        raise UnsupportedByModel(f"{where} was saved in bitsandbytes' {kind}, which is not read", hint=_INSTEAD)
    if not has_bitsandbytes():
        raise UnsupportedByModel(
            f"{where} was saved in 4 bits by bitsandbytes, which is not installed",
            hint="install it: pip install 'sdfleet[quant]'",
        )
    return "nf4"


def bytes_as_saved(header: Header, dtype: torch.dtype) -> int:
    """Bytes of weights in few bits, which stay so, and of those beside them, which are computed in `dtype`."""
    return sum(
        math.prod(shape) * (dtype.itemsize if header.dtypes[name] in {"F32", "F16", "BF16"} else 1)
        for name, shape in header.shapes.items()
    )


def is_beside_a_weight(name: str) -> bool:
    """Whether a tensor of a file says how a quantised weight is to be read; it must keep its own format."""
    _, found, rest = name.partition(".weight.")
    return (bool(found) and rest in _OF_4_BITS) or name.rpartition(".")[2] in _OF_8_BITS


def put_in(module: nn.Module, weights: Mapping[str, Tensor], *, dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    """Change the layers of a module whose weights are quantised; all weights by the names that it then has for them.

    weights: by the module's names, as the file has them. dtype: of computing. Raises BrokenCheckpoint.
    """
    ready = {name: tensor for name, tensor in weights.items() if not is_beside_a_weight(name)}
    for name, tensor in weights.items():
        layer_name, found, _ = name.rpartition(".weight")
        if not found or tensor.is_floating_point() or is_beside_a_weight(name):
            continue
        layer: Any = module.get_submodule(layer_name)
        if not can_keep(layer):
            raise BrokenCheckpoint(f"{where} has {name} in few bits, which is no linear layer", hint=_INSTEAD)
        beside = {key: weights[f"{name}.{key}"] for key in _OF_4_BITS if f"{name}.{key}" in weights}
        if f"{layer_name}.SCB" in weights:
            how: WeightFormat = "int8"
            packed, scale = tensor, (weights[f"{layer_name}.SCB"].float() / _INT8_MOST).to(dtype)[:, None]
        elif beside:
            how, packed, scale = "nf4", tensor, _largest_of_blocks(beside, device=tensor.device, where=where)
        else:
            raise BrokenCheckpoint(f"{where} has {name} without its scale", hint="copy or download the folder again")
        keep_packed(layer, how, packed, scale, shape=torch.Size(layer.weight.shape), dtype=dtype)
        del ready[name]
        ready |= {f"{layer_name}.packed_weight": packed, f"{layer_name}.weight_scale": scale}
    return ready


def _largest_of_blocks(beside: Mapping[str, Tensor], *, device: torch.device, where: str) -> Tensor:
    """Scale of each block as `Nf4` keeps it, from what lies beside a weight."""
    from bitsandbytes import functional as bnb

    state = bnb.QuantState.from_dict(dict(beside), device=device)
    if state.blocksize != NF4_BLOCK:
        raise UnsupportedByModel(f"{where} has blocks of {state.blocksize} numbers, not {NF4_BLOCK}", hint=_INSTEAD)
    largest = state.absmax
    if state.nested:
        largest = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return largest.float().view(torch.int32)
