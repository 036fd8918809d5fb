"""Weights kept in 8 bits and widened layer by layer when they are used: half of bfloat16's memory, another picture.

Only what a network repeats is kept so: matrices and kernels inside its numbered blocks, which are nearly all of its
bytes. First and last layers, embeddings, norms, biases and whatever tells the time stay in the format of computing. The
rule goes by the weights' names (`is_kept`), so that a plan made from a file's header counts what a load will give.

The format is float8_e4m3fn with one scale a tensor, a power of two, so that widening rounds nothing. Without a scale
the weights of wide networks, which are small, fall among the format's last few values. Distance of the rounded weights,
rms over rms, by the spread of the weights (2026-11-21):

    spread       0.1    0.05   0.02   0.01   0.005
    unscaled    .027    .027   .033   .057    .113
    scaled      .027    .027   .027   .027    .027

A scale for each output channel gave no more (the built-in UNet: .0266 either way), for it is a format with exponents.
One mechanism for our networks and the libraries' own: a layer changes its class, and its `weight` is made when asked
for. The libraries ask a weight for its dtype now and then, which so costs a widening; none does in a denoiser's block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdfleet.engine.networks import layers

FORMAT = torch.float8_e4m3fn
# For people, after the name of the format that is computed in.
TOLD = "weights in fp8"

_MOST = 448.0
# On a CPU: the integer as wide as the format, how far to shift, and which bits to keep of a sign spread to the left.
_BITS = {torch.bfloat16: (torch.int16, 4, -0x7810), torch.float32: (torch.int32, 20, -0x7810_0000)}
# Exponents count from 7 there and from 127 here. Numbers below the least normal one come out right too.
_BIAS_APART = 2.0**120
# A numbered part, and a layer with a name of its own somewhere below it. Not `mlp.0.weight`: a list of layers outside
# of any block is a way in or out, or an embedding.
_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.(.+\.)?[^.\d][^.]*\.(\d+\.)*weight$")
# T5's table of distances looks like a matrix and is an embedding.
_TABLE = "relative_attention_bias"


def is_kept(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight of this name and shape is kept in 8 bits.

    >>> is_kept("down_blocks.0.resnets.1.conv1.weight", (64, 64, 3, 3)), is_kept("conv_in.weight", (64, 4, 3, 3))
    (True, False)
    >>> is_kept("transformer_blocks.7.attn.to_out.0.weight", (64, 64)), is_kept("cap_embedder.1.weight", (64, 64))
    (True, False)
    >>> is_kept("transformer_blocks.7.attn.norm_q.weight", (64,))
    False
    """
    return len(shape) >= 2 and _TABLE not in name and _IN_A_BLOCK.search(name) is not None


def n_kept(shapes: Mapping[str, Sequence[int]]) -> int:
    """How many numbers of a component, by the shapes of its weights, are kept in 8 bits."""
    return sum(math.prod(shape) for name, shape in shapes.items() if is_kept(name, shape))


def keep_in_fp8(network: Any) -> Any:
    """The same network, changed: the weights that `is_kept` names are in 8 bits from now on, all else as it was.

    Layers are changed one after the other, so that no more than one is there twice.
    """
    for name, layer in network.named_modules():
        kind = _KINDS.get(type(layer))
        if kind is not None and is_kept(f"{name}.weight", layer.weight.shape):
            weight = layer.weight.detach()
            scale = _scale_of(weight)
            del layer.weight
            layer.weight_fp8 = nn.Parameter((weight * scale).to(FORMAT), requires_grad=False)
            # A tensor and no number: equal blocks that differ in a number would be compiled one by one.
            layer.register_buffer("widened_by", torch.tensor(1 / scale, dtype=weight.dtype, device=weight.device))
            layer.__class__ = kind
    return network


def _scale_of(weight: Tensor) -> float:
    """The power of two that brings the largest number just below the format's own largest."""
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    # Within what float16 can say, and with `_BIAS_APART` bfloat16: weights below a millionth are rounded more coarsely
    # for it, and weights over 57 000 are in no network.
    return 2.0 ** min(14, max(-7, math.floor(math.log2(_MOST / largest))))


def _by_bits(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers, divided by `_BIAS_APART`: sign, exponent and fraction put where `dtype` has them. No NaN.

    torch's own cast on a CPU makes 0.4 numbers a nanosecond, this one 3.3 (2026-11-21, two cores). With torch's an
    SD 1.5 step at 256 px took 4.1 s instead of the 0.64 s of bfloat16 weights.
    """
    kind, shift, kept = _BITS[dtype]
    return stored.view(torch.int8).to(kind).bitwise_left_shift_(shift).bitwise_and_(kept).view(dtype)


class _Widened:
    """Goes before a layer's class: `weight` is made when it is asked for."""

    weight_fp8: Tensor
    widened_by: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in the format of computing, anew each time."""
        if self.weight_fp8.device.type == "cpu" and self.widened_by.dtype in _BITS:
            return _by_bits(self.weight_fp8, self.widened_by.dtype) * (self.widened_by * _BIAS_APART)
        return self.weight_fp8.to(self.widened_by.dtype) * self.widened_by


class _Linear(_Widened, nn.Linear):  # type: ignore[override]  # a property for an attribute is what is wanted
    """A linear layer whose weight is kept in 8 bits."""


class _Conv2d(_Widened, nn.Conv2d):  # type: ignore[override]  # as above
    """A convolution whose weight is kept in 8 bits."""


# Only these very classes: what a library derives from them may look at its weight in ways of its own.
_KINDS = {nn.Linear: _Linear, layers.Linear: _Linear, nn.Conv2d: _Conv2d, layers.Conv2d: _Conv2d}
