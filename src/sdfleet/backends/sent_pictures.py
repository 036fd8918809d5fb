"""Pictures as they travel to other programs and back."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import replace

from sdfleet.domain import Drawing, Picture
from sdfleet.storage import pictures


def as_base64(picture: Picture | None) -> str | None:
    """A PNG in base64. Blocks."""
    return None if picture is None else base64.b64encode(pictures.encode(picture, "png")).decode()


def as_asked(content: bytes, drawing: Drawing) -> Picture:
    """The pixels of what came, at the size that a drawing wants it brought to. Blocks. Raises BrokenPicture."""
    picture = pictures.decode(content)
    if drawing.resize_to is None:
        return picture
    return pictures.resize(picture, width_px=drawing.resize_to[0], height_px=drawing.resize_to[1])


def as_drawn(drawing: Drawing, found: Collection[Picture], *, by: str) -> tuple[Drawing, tuple[str, ...]]:
    """The drawing with the size that came, and what to tell where that is another than was asked for."""
    sizes = {(picture.width_px, picture.height_px) for picture in found}
    if drawing.resize_to is not None or sizes <= {(drawing.width_px, drawing.height_px)}:
        return drawing, ()
    width_px, height_px = max(sizes)
    told = f"{by} drew {width_px}x{height_px} where {drawing.width_px}x{drawing.height_px} was asked for"
    return replace(drawing, width_px=width_px, height_px=height_px), (told,)
