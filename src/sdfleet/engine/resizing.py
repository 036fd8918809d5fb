"""Finished pictures at another size; no torch, so that engines of other projects can use it too."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sdfleet.domain import Picture


def fitted(picture: Picture, width_px: int, height_px: int) -> Picture:
    """The RGB picture as large as fits, in the middle; what is left over continues its outermost pixels.

    For a model that draws one shape only: nothing is stretched and nothing is cut off.
    """
    scale = min(width_px / picture.width_px, height_px / picture.height_px)
    inner = resized(picture, round(picture.width_px * scale), round(picture.height_px * scale))
    pixels = np.frombuffer(inner.data, np.uint8).reshape(inner.height_px, inner.width_px, 3)
    above, left = (height_px - inner.height_px) // 2, (width_px - inner.width_px) // 2
    margins = ((above, height_px - inner.height_px - above), (left, width_px - inner.width_px - left), (0, 0))
    whole = np.pad(pixels, margins, mode="edge")
    return Picture(width_px=width_px, height_px=height_px, mode="RGB", data=whole.tobytes())


def resized(picture: Picture, width_px: int, height_px: int) -> Picture:
    """The RGB picture at another size, by Lanczos resampling."""
    image = Image.frombytes("RGB", (picture.width_px, picture.height_px), picture.data)
    image = image.resize((width_px, height_px), Image.Resampling.LANCZOS)
    return Picture(width_px=width_px, height_px=height_px, mode="RGB", data=image.tobytes())
