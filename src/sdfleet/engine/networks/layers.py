"""torch's layers, born on the meta device: with shapes and without numbers, until a checkpoint's weights are assigned.

torch's own constructors draw first weights; on the meta device that draw is an operator of torch's Python reference,
which imports the compiler: another 1.0 s on top of torch's 0.9 s (2026-11-21, two cores).
"""

from __future__ import annotations

from typing import Any

from torch import nn


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
    """A normalisation over groups of channels, empty."""
