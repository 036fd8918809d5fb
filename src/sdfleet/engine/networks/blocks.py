"""Convolutional parts that the denoiser and the picture codec share (arXiv:2112.10752, arXiv:2006.11239).

All of them take and give [b, c, h, w]. Attribute names are those of the weights in the checkpoints' files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.engine.networks.layers import Conv2d, GroupNorm, Linear

# An upsampling kernel for channels-last tensors counts its output in 32 bits.
_MOST_ELEMENTS = 2**31


class ResnetBlock(nn.Module):
    """Two normalised convolutions around which the input goes straight on. With a time embedding, it is added within.

    time_channels: width of the embedding that `forward` gets; None for a block that knows no time.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, n_groups: int, eps: float, time_channels: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(n_groups, in_channels, eps=eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_channels is None else Linear(time_channels, out_channels)
        self.norm2 = GroupNorm(n_groups, out_channels, eps=eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: [b, in_channels, h, w]. time: [b, time_channels], activated once for all blocks by the caller."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(time)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Downsample(nn.Module):
    """Half the sides.

    padding: 1 pads all around; 0 pads right and below only, as the codec's encoder was trained.
    """

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)
        self._padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self._padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the sides, or exactly `size`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | torch.Size | None = None) -> Tensor:
        """size: (height, width) to come out with, where the way down halved an odd side."""
        if x.numel() * 4 >= _MOST_ELEMENTS:
            x = x.contiguous()
        if size is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
