"""The formats that large weights may be kept in, each with what packs a weight into it and what widens it again.

Distance of the rounded weights, rms over rms, of normal numbers, 1280 a row (2026-11-21):

    fp8   8 bits    .027    float8_e4m3fn, one scale a tensor
    int8  8 bits    .008    one scale an output channel
    nf4   4.5 bits  .092    sixteen values as dense as normal numbers are, one scale for 64 of them

int8 is the nearest of those of 8 bits while the weights of a channel are of one size; a single far one takes the room
of all others in its row, and fp8, having exponents, does not mind.

fp8's scale is a power of two, so that widening rounds nothing. Without a scale the weights of wide networks, which are
small, fall among the format's last few values. By the spread of the weights:

    spread       0.1    0.05   0.02   0.01   0.005
    unscaled    .027    .027   .033   .057    .113
    scaled      .027    .027   .027   .027    .027

A scale for each output channel gave fp8 no more (the built-in UNet: .0266 either way).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sdfleet.engine.events import WeightFormat
from sdfleet.errors import InvalidValue

_FP8_MOST = 448.0
_INT8_MOST = 127
# Numbers that share a scale.
NF4_BLOCK = 64
# On a CPU: the integer as wide as the format, how far to shift, and which bits to keep of a sign spread to the left.
_BITS = {torch.bfloat16: (torch.int16, 4, -0x7810), torch.float32: (torch.int32, 20, -0x7810_0000)}
# Exponents count from 7 there and from 127 here. Numbers below the least normal one come out right too.
_BIAS_APART = 2.0**120


class Format(Protocol):
    """How a weight is kept: `packed` and `scale`, which `widen` makes a weight of again."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(packed, scale) of a weight in the format of computing."""
        ...

    def widen(self, packed: Tensor, scale: Tensor, *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight again, anew each time: `shape`, in `dtype`."""
        ...

    def n_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of `packed` and `scale` for a weight of this shape that is computed with in `dtype`."""
        ...


class Fp8:
    """Eight bits with an exponent. packed: as the weight, float8_e4m3fn. scale: a number, what it is widened by."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = _power_of_two(weight)
        # A tensor and no number: equal blocks that differ in a number would be compiled one by one.
        widened_by = torch.tensor(1 / scale, dtype=weight.dtype, device=weight.device)
        return (weight * scale).to(torch.float8_e4m3fn), widened_by

    def widen(self, packed: Tensor, scale: Tensor, *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if packed.device.type == "cpu" and dtype in _BITS:
            return _by_bits(packed, dtype).mul_(scale * _BIAS_APART)
        return packed.to(dtype).mul_(scale)

    def n_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return math.prod(shape) + dtype.itemsize


class Int8:
    """Eight bits in even steps. packed: as the weight, int8. scale: [out, 1, ...], the size of a step."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = weight.float()
        largest = wide.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
        scale = torch.where(largest > 0, largest / _INT8_MOST, 1.0).to(weight.dtype)
        return (wide / scale.float()).round_().clamp_(-_INT8_MOST, _INT8_MOST).to(torch.int8), scale

    def widen(self, packed: Tensor, scale: Tensor, *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return packed.to(dtype).mul_(scale)

    def n_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return math.prod(shape) + shape[0] * dtype.itemsize


class Nf4:
    """Four bits by bitsandbytes. packed: two numbers a byte, [n / 2, 1] uint8. scale: [n / 64], float32 as int32."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # bitsandbytes' own packing has torch compile it anew for every shape, or takes half a second a million numbers.
        table = _bitsandbytes().get_4bit_type("nf4", device=weight.device)
        n = weight.numel()
        blocks = F.pad(weight.flatten().float(), (0, -n % NF4_BLOCK)).view(-1, NF4_BLOCK)
        largest = blocks.abs().amax(dim=1)
        blocks /= torch.where(largest > 0, largest, 1.0)[:, None]
        nearest = torch.bucketize(blocks, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8).flatten()
        packed = ((nearest[0::2] << 4) | nearest[1::2])[: -(-n // 2), None].clone()
        # As bits: libraries take the first float that they find for the format a network computes in.
        return packed, largest.view(torch.int32)

    def widen(self, packed: Tensor, scale: Tensor, *, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        largest = scale.view(torch.float32)
        bnb = _bitsandbytes()
        # Block by block, and not in the weight's own shape: on a CPU bitsandbytes 0.50.2 is wrong for rows that are no
        # multiple of a block (by 2.4 for 96 numbers a row), and has torch compile something for rows of odd length.
        n, n_blocks = shape.numel(), len(largest)
        if n % NF4_BLOCK:
            packed = F.pad(packed.flatten(), (0, n_blocks * NF4_BLOCK // 2 - packed.numel()))[:, None]
        lies = torch.Size((n_blocks, NF4_BLOCK))
        state = bnb.QuantState(absmax=largest, shape=lies, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4")
        widened: Tensor = bnb.dequantize_4bit(packed, state).flatten()[:n].view(shape)
        return widened

    def n_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        n = math.prod(shape)
        return -(-n // 2) + 4 * -(-n // NF4_BLOCK)


FORMATS: Mapping[WeightFormat, Format] = {"fp8": Fp8(), "int8": Int8(), "nf4": Nf4()}


def refuse_where_it_cannot_be(setting: str, wanted: WeightFormat | None, *, kind: str) -> None:
    """Raise InvalidValue, with what to use instead, where a device cannot compute with weights in this format."""
    if wanted == "fp8" and kind == "mps":
        raise InvalidValue(setting, "Metal has no 8-bit floats", hint="use int8, or memory mode eco")
    if wanted == "nf4" and kind == "mps":
        raise InvalidValue(setting, "nf4 has not been tried on Metal", hint="use int8, or memory mode eco")
    if wanted == "nf4" and not has_bitsandbytes():
        raise InvalidValue(
            setting, "nf4 needs bitsandbytes, which is not installed", hint="pip install 'sdfleet[quant]', or use int8"
        )


def _bitsandbytes() -> Any:
    """Its functions; imported when they are first needed, which takes a second or two."""
    from bitsandbytes import functional

    return functional


def has_bitsandbytes() -> bool:
    """Whether the library behind nf4 is installed; it is not imported, which takes a second or two."""
    return importlib.util.find_spec("bitsandbytes") is not None


def _power_of_two(weight: Tensor) -> float:
    """The power of two that brings the largest number just below fp8's own largest."""
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    # Within what float16 can say, and with `_BIAS_APART` bfloat16: weights below a millionth are rounded more coarsely
    # for it, and weights over 57 000 are in no network.
    return 2.0 ** min(14, max(-7, math.floor(math.log2(_FP8_MOST / largest))))


def _by_bits(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers, divided by `_BIAS_APART`: sign, exponent and fraction put where `dtype` has them. No NaN.

    torch's own cast on a CPU makes 0.4 numbers a nanosecond, this one 3.3 (2026-11-21, two cores). With torch's an
    SD 1.5 step at 256 px took 4.1 s instead of the 0.64 s of bfloat16 weights.
    """
    kind, shift, kept = _BITS[dtype]
    return stored.view(torch.int8).to(kind).bitwise_left_shift_(shift).bitwise_and_(kept).view(dtype)
