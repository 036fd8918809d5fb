"""Pictures as tensors and back. Pixels are `[0, 255] uint8` outside the engine and `[-1, 1]` inside it."""

from __future__ import annotations

import torch
from torch import Tensor

from sdfleet.domain import Picture


def to_unit_range(picture: Picture) -> Tensor:
    """The RGB picture as [1, 3, height_px, width_px] float32 in [-1, 1], on the CPU."""
    pixels = torch.frombuffer(bytearray(picture.data), dtype=torch.uint8)
    pixels = pixels.view(picture.height_px, picture.width_px, 3).permute(2, 0, 1)
    return pixels[None].float() / 255.0 * 2.0 - 1.0


def to_mask(picture: Picture) -> Tensor:
    """The L picture as [1, 1, height_px, width_px] float32: 1 where it is at least half white, else 0."""
    pixels = torch.frombuffer(bytearray(picture.data), dtype=torch.uint8)
    return (pixels.view(1, 1, picture.height_px, picture.width_px).float() / 255.0 >= 0.5).float()


def to_picture(image: Tensor) -> Picture:
    """[3, height_px, width_px] in [-1, 1], any float type and device, as an RGB picture; values outside are clipped."""
    pixels = (image.detach().float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels = pixels.permute(1, 2, 0).contiguous().cpu()
    height_px, width_px, _ = pixels.shape
    return Picture(width_px=width_px, height_px=height_px, mode="RGB", data=pixels.numpy().tobytes())
