"""Pixels before and after drawing: brought to a size, masks softened, a redrawn part put back into its picture.

Everything here blocks (Pillow); a server calls it in a worker thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageChops, ImageFilter, ImageOps

from sdfleet.domain import SIDE_MULTIPLE_PX, Picture
from sdfleet.errors import InvalidValue

Fit = Literal["stretch", "crop", "fill"]
UPSCALERS: dict[str, Image.Resampling] = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
# A mask below this is "kept", as the origin of these controls has it.
_HALF = 128


def brought(picture: Picture, *, width_px: int, height_px: int, fit: Fit) -> Picture:
    """The picture at a size: stretched; or scaled and cut to it (crop); or scaled into it on a blurred copy (fill)."""
    image = _image(picture)
    size = (width_px, height_px)
    match fit:
        case "stretch":
            image = image.resize(size, Image.Resampling.LANCZOS)
        case "crop":
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        case "fill":
            inner = ImageOps.contain(image, size, Image.Resampling.LANCZOS)
            image = image.resize(size, Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(max(size) / 16))
            image.paste(inner, ((width_px - inner.width) // 2, (height_px - inner.height) // 2))
    return _picture(image)


def enlarged(picture: Picture, *, width_px: int, height_px: int, upscaler: str) -> Picture:
    """The picture at a size, by one of UPSCALERS. Raises InvalidValue for another name."""
    if upscaler not in UPSCALERS:
        raise InvalidValue("upscaler_1", f"{upscaler[:40]!r} is not here", hint=f"use {' or '.join(UPSCALERS)}")
    return _picture(_image(picture).resize((width_px, height_px), UPSCALERS[upscaler]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A part of a picture that is drawn anew: what the model is given, and how its answer goes back.

    image, mask: what is drawn. whole: the picture it goes back into. alpha: how much of the answer shows, of the size
    of `whole`. box: where in `whole`, (left, top, right, bottom) in pixels.
    """

    image: Picture
    mask: Picture
    whole: Picture
    alpha: Picture
    box: tuple[int, int, int, int]

    def applied(self, drawn: Picture) -> Picture:
        """The whole picture with the drawn part in it; what the mask keeps is exactly as it was."""
        whole = _image(self.whole)
        left, top, right, bottom = self.box
        part = _image(drawn).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        changed = whole.copy()
        changed.paste(part, (left, top))
        return _picture(Image.composite(changed, whole, _image(self.alpha)))


def patch_of(
    image: Picture,
    mask: Picture,
    *,
    width_px: int,
    height_px: int,
    blur_px: tuple[float, float],
    is_inverted: bool = False,
    only_masked: bool = True,
    padding_px: int = 0,
    fit: Fit = "stretch",
    fill: bool = False,
) -> Patch:
    """The part of `image` that `mask` (white is drawn anew, same size) wants drawn at width x height.

    only_masked: cut out the masked part with `padding_px` around it and draw that at the full size; else draw the whole
    picture, brought to the size. blur_px: softness of the mask's edge. fill: begin from the surrounding colours instead
    of from what is there. Raises InvalidValue for a mask that masks nothing.
    """
    soft = _image(mask)
    if is_inverted:
        soft = ImageChops.invert(soft)
    soft = soft.point([0 if value < _HALF else 255 for value in range(256)])
    bounds = soft.getbbox()
    if bounds is None:
        raise InvalidValue("mask", "it masks nothing", hint="white is drawn anew, black is kept")
    soft = soft.filter(ImageFilter.GaussianBlur(blur_px))
    whole = _image(image)
    if only_masked:
        box = _boxed(soft.point([255 if v >= _HALF else 0 for v in range(256)]).getbbox() or bounds,
                     whole.size, padding_px=padding_px, ratio=width_px / height_px)  # fmt: skip
    else:
        whole = _image(brought(image, width_px=width_px, height_px=height_px, fit=fit))
        soft = _image(brought(_picture(soft), width_px=width_px, height_px=height_px, fit=fit))
        box = (0, 0, width_px, height_px)
    given = _filled(whole, soft) if fill else whole
    size = (width_px, height_px)
    return Patch(
        image=_picture(given.crop(box).resize(size, Image.Resampling.LANCZOS)),
        mask=_picture(soft.crop(box).resize(size, Image.Resampling.LANCZOS)),
        whole=_picture(whole),
        alpha=_picture(soft),
        box=box,
    )


def _boxed(
    bounds: tuple[int, int, int, int], size: tuple[int, int], *, padding_px: int, ratio: float
) -> tuple[int, int, int, int]:
    """The bounds with padding, grown to the ratio of the size that is drawn, inside the picture."""
    width, height = size
    left, top = max(0, bounds[0] - padding_px), max(0, bounds[1] - padding_px)
    right, bottom = min(width, bounds[2] + padding_px), min(height, bounds[3] + padding_px)
    wide, high = right - left, bottom - top
    wanted_wide = min(width, max(wide, round(high * ratio), SIDE_MULTIPLE_PX))
    wanted_high = min(height, max(high, round(wide / ratio), SIDE_MULTIPLE_PX))
    left = min(max(0, left - (wanted_wide - wide) // 2), width - wanted_wide)
    top = min(max(0, top - (wanted_high - high) // 2), height - wanted_high)
    return left, top, left + wanted_wide, top + wanted_high


def _filled(whole: Image.Image, soft: Image.Image) -> Image.Image:
    """The picture with its masked part replaced by the colours around it, far ones blurred into near ones."""
    kept = ImageChops.invert(soft)
    premultiplied = Image.composite(whole, Image.new("RGB", whole.size), kept)
    result = whole
    for radius in (256, 64, 16, 8, 4, 2):
        blur = ImageFilter.GaussianBlur(radius)
        colour, weight = premultiplied.filter(blur), kept.filter(blur)
        layer = ImageChops.multiply(colour, Image.new("RGB", whole.size, (255, 255, 255)))
        bright = Image.merge("RGB", [_divided(channel, weight) for channel in layer.split()])
        result = Image.composite(bright, result, weight.point([255 if value > 8 else 0 for value in range(256)]))
    return Image.composite(result, whole, soft)


def _divided(channel: Image.Image, weight: Image.Image) -> Image.Image:
    """channel * 255 / weight, where there is weight."""
    import numpy as np

    above = np.asarray(channel, np.float32)
    below = np.maximum(np.asarray(weight, np.float32), 1.0)
    return Image.fromarray(np.clip(above * 255.0 / below, 0, 255).astype(np.uint8))


def _image(picture: Picture) -> Image.Image:
    return Image.frombytes(picture.mode, (picture.width_px, picture.height_px), picture.data)


def _picture(image: Image.Image) -> Picture:
    mode: Literal["RGB", "L"] = "L" if image.mode == "L" else "RGB"
    return Picture(width_px=image.width, height_px=image.height, mode=mode, data=image.tobytes())
