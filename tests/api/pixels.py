"""Pictures for tests of dialects, and what is in the pictures that come back."""

from __future__ import annotations

import base64
import io

from PIL import Image

from sdfleet.domain import Picture
from sdfleet.storage import pictures


def picture_file(side_px: int = 64, *, colour: str = "red", clear: tuple[int, int, int, int] | None = None) -> bytes:
    """A PNG of one colour; `clear` (left, top, right, bottom) is transparent."""
    image = Image.new("RGB" if clear is None else "RGBA", (side_px, side_px), colour)
    if clear is not None:
        image.paste((0, 0, 0, 0), clear)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def from_base64(text: str | None) -> Picture:
    """The pixels of a picture in an answer."""
    assert text is not None
    return pictures.decode(base64.b64decode(text, validate=True))


def format_of(data: bytes) -> str:
    """What kind of file this is: png, jpeg, webp."""
    with Image.open(io.BytesIO(data)) as image:
        return str(image.format).lower()
