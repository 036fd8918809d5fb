"""torch's layers, born on the meta device: with shapes and without numbers, until a checkpoint's weights are assigned.

torch's own constructors draw first weights; on the meta device that draw is an operator of torch's Python reference,
which imports the compiler: another 1.0 s on top of torch's 0.9 s (2026-11-21, two cores).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# See `_is_slow`: what decides in torch 2.13, and from how many channels a group is walked in whole vectors.
_FAST_FROM_PX = 1024
_FAST_FROM_CHANNELS = 16


class _Empty:
    """Goes before a layer's class: born empty, never initialised."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, device="meta", **kwargs)  # type: ignore[call-arg]  # goes on to the layer

    def reset_parameters(self) -> None:
        """Nothing: the weights come from a file."""


class Linear(_Empty, nn.Linear):
    """A linear layer, empty."""


class Conv2d(_Empty, nn.Conv2d):
    """A convolution, empty."""


class Embedding(_Empty, nn.Embedding):
    """A table of vectors, empty."""


class LayerNorm(_Empty, nn.LayerNorm):
    """A normalisation over the last dimension, empty."""


class GroupNorm(_Empty, nn.GroupNorm):
    """A normalisation over groups of channels, empty. The answer is laid out in memory as the question is."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] of the same, or [b, c, n]."""
        if not _is_slow(x, self.num_groups):
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def _is_slow(x: Tensor, n_groups: int) -> bool:
    """Whether torch's kernel for channels-last tensors would take much longer than the other one and two copies.

    Under 1024 pixels it walks each group's few channels one by one: 3.6 ms instead of 0.17 for 32 rows of 96 channels
    in 32 groups at 16x16, bfloat16, on two cores of a Xeon, 2026-11-21; from 1024 pixels on both take the same.
    """
    if x.dim() != 4 or x.device.type != "cpu" or x.is_contiguous():
        return False
    return x.shape[2] * x.shape[3] < _FAST_FROM_PX and x.shape[1] // n_groups < _FAST_FROM_CHANNELS
