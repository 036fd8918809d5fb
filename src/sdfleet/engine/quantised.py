"""Weights kept in few bits and widened layer by layer when they are used: less memory, another picture.

Only what a network repeats is kept so: matrices and kernels inside its numbered blocks, which are nearly all of its
bytes. First and last layers, embeddings, norms, biases and whatever tells the time stay in the format of computing. The
rule goes by the weights' names (`is_kept`), so that a plan made from a file's header counts what a load will give.

One mechanism for our networks and the libraries' own, and for every format of weight_formats.py: a layer changes its
class, and its `weight` is made when asked for. The libraries ask a weight for its dtype now and then, which so costs a
widening; none does in a denoiser's block. Why not torchao: decision 0014.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdfleet.engine.events import WeightFormat
from sdfleet.engine.networks import layers
from sdfleet.engine.weight_formats import FORMATS

# A numbered part, and a layer with a name of its own somewhere below it. Not `mlp.0.weight`: a list of layers outside
# of any block is a way in or out, or an embedding.
_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.(.+\.)?[^.\d][^.]*\.(\d+\.)*weight$")
# T5's table of distances looks like a matrix and is an embedding.
_TABLE = "relative_attention_bias"


def is_kept(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight of this name and shape is kept in few bits.

    >>> is_kept("down_blocks.0.resnets.1.conv1.weight", (64, 64, 3, 3)), is_kept("conv_in.weight", (64, 4, 3, 3))
    (True, False)
    >>> is_kept("transformer_blocks.7.attn.to_out.0.weight", (64, 64)), is_kept("cap_embedder.1.weight", (64, 64))
    (True, False)
    >>> is_kept("transformer_blocks.7.attn.norm_q.weight", (64,))
    False
    """
    return len(shape) >= 2 and _TABLE not in name and _IN_A_BLOCK.search(name) is not None


def n_bytes_saved(shapes: Mapping[str, Sequence[int]], how: WeightFormat, dtype: torch.dtype) -> int:
    """By how many bytes a component, given the shapes of its weights, is smaller than with all of them in `dtype`."""
    kept = FORMATS[how]
    return sum(
        math.prod(shape) * dtype.itemsize - kept.n_bytes(shape, dtype)
        for name, shape in shapes.items()
        if is_kept(name, shape)
    )


def keep_in(how: WeightFormat, network: Any) -> Any:
    """The same network, changed: the weights that `is_kept` names are in this format from now on, all else as it was.

    Layers are changed one after the other, so that no more than one is there twice. One on the meta device stays.
    """
    for name, layer in network.named_modules():
        if type(layer) not in _KINDS or layer.weight.is_meta:
            continue
        if is_kept(f"{name}.weight", layer.weight.shape):
            weight = layer.weight.detach()
            keep_packed(layer, how, *FORMATS[how].pack(weight), shape=weight.shape, dtype=weight.dtype)
    return network


def rounded(how: WeightFormat, name: str, weight: Tensor) -> Tensor:
    """What a weight is after it was kept in this format; the weight itself if it is not of those that are kept."""
    if not is_kept(name, weight.shape):
        return weight
    return FORMATS[how].widen(*FORMATS[how].pack(weight), shape=weight.shape, dtype=weight.dtype)


def keep_packed(
    layer: Any, how: WeightFormat, packed: Tensor, scale: Tensor, *, shape: torch.Size, dtype: torch.dtype
) -> None:
    """Change one layer: its weight, of this shape and computed with in `dtype`, is in this format from now on."""
    kind = _KINDS[type(layer)]
    del layer.weight
    layer.packed_weight = nn.Parameter(packed, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    layer.kept_in, layer.weight_shape, layer.weight_dtype = how, shape, dtype
    layer.__class__ = kind


def can_keep(layer: Any) -> bool:
    """Whether a layer is of a kind that `keep_packed` can change."""
    return type(layer) in _KINDS


class _Kept:
    """Goes before a layer's class: `weight` is made when it is asked for."""

    packed_weight: Tensor
    weight_scale: Tensor
    kept_in: WeightFormat
    weight_shape: torch.Size
    weight_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The weight in the format of computing, anew each time."""
        return FORMATS[self.kept_in].widen(
            self.packed_weight, self.weight_scale, shape=self.weight_shape, dtype=self.weight_dtype
        )


class _Linear(_Kept, nn.Linear):  # type: ignore[override]  # a property for an attribute is what is wanted
    """A linear layer whose weight is kept in few bits."""


class _Conv2d(_Kept, nn.Conv2d):  # type: ignore[override]  # as above
    """A convolution whose weight is kept in few bits."""


# Only these very classes: what a library derives from them may look at its weight in ways of its own.
_KINDS: dict[type, type] = {nn.Linear: _Linear, layers.Linear: _Linear, nn.Conv2d: _Conv2d, layers.Conv2d: _Conv2d}
