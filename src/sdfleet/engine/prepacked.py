"""Small bfloat16 networks on a CPU: weights brought into the kernels' own order once, instead of in every call.

Torch hands a layer's plain weights to oneDNN, which reorders them in each call. With few rows of a small network that
costs more than the arithmetic: packed weights and channels-last activations took a 3x3 convolution of 160 channels from
158 to 41 microseconds. The answers differ by bfloat16's rounding. float32 networks are left alone: little would be
gained, bitwise equality lost, and the conversion for OpenVINO traces them. See benchmarks/LOG.md, "packed weights".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.engine.networks.layers import Conv2d, Linear

# The plain weights stay (a packed one fits one size of picture), so packing takes as much memory again for each size.
_MOST_BYTES = 64 * 2**20
_MOST_SIZES = 4
# A weight packed for another size than it is used with can be five times SLOWER than a plain one, and so can a packed
# one on a CPU that was never tried: it must win by this, layer by layer.
_MUST_WIN_BY = 1.05
_REPEATS = 3

Timed = Callable[[Callable[[], object]], float]


def arrange(network: Any) -> Any:
    """The same network, its weights laid out as this machine computes them fastest.

    A bfloat16 network on a CPU: packed where it is small, channels-last where it is not. Any other stays as it is.
    """
    weights = list(network.parameters())
    if not weights or any(weight.dtype != torch.bfloat16 or weight.device.type != "cpu" for weight in weights):
        return network
    if is_packed_when_arranged(sum(weight.nbytes for weight in weights)):
        prepack(network)
        return network
    return network.to(memory_format=torch.channels_last)


def is_packed_when_arranged(n_bytes: int) -> bool:
    """Whether `arrange` would pack a bfloat16 network of this size on a CPU."""
    return torch.backends.mkldnn.is_available() and n_bytes <= _MOST_BYTES


def packed_bytes(network: nn.Module) -> int:
    """Most bytes that packed weights take beside the plain ones, for one size of picture, once `arrange` was here.

    0 where it does not pack. The network may be on the meta device.
    """
    weights = list(network.parameters())
    if any(weight.dtype != torch.bfloat16 for weight in weights):
        return 0
    if not is_packed_when_arranged(sum(weight.nbytes for weight in weights)):
        return 0
    return sum(layer.weight.nbytes for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear))


def prepack(network: nn.Module, *, timed: Timed | None = None) -> None:
    """Let the network's convolutions and linear layers run on packed weights, each where that is timed to be faster.

    Names and values of the weights stay as they are. A layer packs when it first meets a size of picture.
    timed: seconds of a call; the clock where None.
    """
    speeds = _Speeds(_seconds if timed is None else timed)
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                setattr(module, name, _PackedConv2d(layer, speeds))
            elif isinstance(layer, nn.Linear):
                setattr(module, name, _PackedLinear(layer, speeds))


class _Speeds:
    """Which of two calls is faster, asked once for each kind of layer: a network has many alike."""

    def __init__(self, timed: Timed) -> None:
        self._timed = timed
        self._wins: dict[tuple[object, ...], bool] = {}

    def wins(self, kind: tuple[object, ...], packed: Callable[[], object], plain: Callable[[], object]) -> bool:
        if kind not in self._wins:
            packed()
            plain()
            times = [(self._timed(packed), self._timed(plain)) for _ in range(_REPEATS)]
            packed_s, plain_s = (min(column) for column in zip(*times, strict=True))
            self._wins[kind] = packed_s * _MUST_WIN_BY < plain_s
        return self._wins[kind]


class _PackedConv2d(Conv2d):
    """A Conv2d whose weights are packed for each size of picture; [b, c, h, w] channels-last, in and out."""

    def __init__(self, layer: nn.Conv2d, speeds: _Speeds) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
        )
        self.weight, self.bias = layer.weight, layer.bias
        self._stride, self._padding, self._dilation = list(layer.stride), _pair(layer.padding), list(layer.dilation)
        self._speeds = speeds
        # By (h, w). None: plain is faster.
        self._packed: dict[tuple[int, int], Tensor | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] of [b, in_channels, h, w]."""
        if x.dtype != torch.bfloat16:  # a decoder that went to float32, see vae.py
            return self._plain(x)
        x = x.contiguous(memory_format=torch.channels_last)
        size = (x.shape[2], x.shape[3])
        if size not in self._packed and len(self._packed) < _MOST_SIZES:
            self._packed[size] = self._faster(x)
        packed = self._packed.get(size)
        return self._plain(x) if packed is None else self._by_packed(x, packed)

    def _plain(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self._stride, self._padding, self._dilation, self.groups)

    def _by_packed(self, x: Tensor, packed: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(  # noqa: SLF001 - what inductor calls after freezing; no public name
            x, packed, self.bias, self._padding, self._stride, self._dilation, self.groups, "none", [], ""
        )

    def _faster(self, x: Tensor) -> Tensor | None:
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(  # noqa: SLF001 - as above
            self.weight, self._padding, self._stride, self._dilation, self.groups, list(x.shape)
        )
        kind = (*self.weight.shape, *self._stride, *self._padding, self.groups, *x.shape[2:])
        wins = self._speeds.wins(kind, lambda: self._by_packed(x, packed), lambda: self._plain(x))
        return packed if wins else None


class _PackedLinear(Linear):
    """A Linear whose weights are packed once; its packing knows no sizes."""

    def __init__(self, layer: nn.Linear, speeds: _Speeds) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self._speeds = speeds
        self._is_tried = False
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] of [..., in_features]."""
        if not self._is_tried and x.dtype == torch.bfloat16:
            self._packed, self._is_tried = self._faster(x), True
        if self._packed is None or x.dtype != torch.bfloat16:
            return F.linear(x, self.weight, self.bias)
        return self._by_packed(x, self._packed)

    def _by_packed(self, x: Tensor, packed: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")  # noqa: SLF001 - as above

    def _faster(self, x: Tensor) -> Tensor | None:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)  # noqa: SLF001 - as above
        wins = self._speeds.wins(
            tuple(self.weight.shape),
            lambda: self._by_packed(x, packed),
            lambda: F.linear(x, self.weight, self.bias),
        )
        return packed if wins else None


def _pair(numbers: object) -> list[int]:
    assert isinstance(numbers, tuple)
    return [int(number) for number in numbers]


def _seconds(call: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s
