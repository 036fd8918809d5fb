"""A 128-pixel canvas with anti-aliased, softly lit flat shapes.

Every part is drawn at four times its size with Pillow, averaged down to a coverage mask and
blended in float32, so edges are smooth and a picture depends on nothing but its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE_PX = 128
SUPERSAMPLING = 4
# Light falls from above: a part is this much brighter at its top and darker at its foot. Small enough that the
# nearest palette colour of a shaded part is always the colour it was painted in (tests/train/test_world.py).
SHADE_FRACTION = 0.05
SHADE_LEVELS = 5.0
SHADOW_OFFSET_PX = (2.0, 3.5)
SHADOW_BLUR_PX = 2.5
SHADOW_PAD_PX = 12

Colour = tuple[float, float, float]
Point = tuple[float, float]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ellipse:
    """An axis-aligned ellipse, in pixels; a hole takes away what earlier parts covered."""

    x: float
    y: float
    rx: float
    ry: float
    is_hole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Polygon:
    """A filled polygon, in pixels; a hole takes away what earlier parts covered."""

    points: tuple[Point, ...]
    is_hole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stroke:
    """A line through points with round joints, in pixels."""

    points: tuple[Point, ...]
    width_px: float


Part = Ellipse | Polygon | Stroke


def disc(x: float, y: float, radius: float) -> Ellipse:
    """A round part."""
    return Ellipse(x=x, y=y, rx=radius, ry=radius)


def box(left: float, top: float, right: float, bottom: float) -> Polygon:
    """An upright rectangle."""
    return Polygon(points=((left, top), (right, top), (right, bottom), (left, bottom)))


def polygon(*points: Point) -> Polygon:
    """A filled polygon from its corners."""
    return Polygon(points=points)


class Canvas:
    """Pixels being painted, [128, 128, 3] float32 in [0, 255]."""

    def __init__(self) -> None:
        self.pixels: Floats = np.full((SIDE_PX, SIDE_PX, 3), 255.0, dtype=np.float32)

    def fill_gradient(self, top: Colour, foot: Colour, *, first_row: int = 0, end_row: int = SIDE_PX) -> None:
        """Fill rows [first_row, end_row) with a vertical gradient."""
        share = np.linspace(0.0, 1.0, end_row - first_row, dtype=np.float32)[:, None, None]
        start = np.asarray(top, dtype=np.float32)
        end = np.asarray(foot, dtype=np.float32)
        self.pixels[first_row:end_row] = start + (end - start) * share

    def fill_stripes(self, first: Colour, second: Colour, *, width_px: int) -> None:
        """Fill with upright stripes; the first colour starts at the left edge."""
        is_second = (np.arange(SIDE_PX) // width_px) % 2 == 1
        row = np.where(is_second[:, None], np.asarray(second), np.asarray(first)).astype(np.float32)
        self.pixels[:] = row[None]

    def light(self, levels: float) -> None:
        """Make the top of everything painted so far brighter by `levels` and the foot darker by as much."""
        self.pixels += np.linspace(levels, -levels, SIDE_PX, dtype=np.float32)[:, None, None]

    def paint(
        self, parts: Sequence[Part], colour: Colour, *, shade: float = 1.0, shadow: float = 0.0
    ) -> tuple[Floats, tuple[int, int, int, int]]:
        """Blend parts in one colour; answers the coverage mask [h, w] in [0, 1] and its box (left, top, right, foot).

        shade: strength of the light from above, 1.0 as the world wants it, 0.0 for flat.
        shadow: darkness of the soft shadow behind the parts, in [0, 1].
        """
        pad = SHADOW_PAD_PX if shadow else 1
        left, top, right, foot = _box_of(parts, pad)
        if right <= left or foot <= top:
            return np.zeros((0, 0), dtype=np.float32), (left, top, left, top)
        tile = Image.new("L", ((right - left) * SUPERSAMPLING, (foot - top) * SUPERSAMPLING))
        draw = ImageDraw.Draw(tile)
        for part in parts:
            _draw(draw, part, left, top)
        small = tile.reduce(SUPERSAMPLING)
        mask = np.asarray(small, dtype=np.float32) / 255.0
        area = self.pixels[top:foot, left:right]
        if shadow:
            moved = small.transform(
                small.size,
                Image.Transform.AFFINE,
                (1, 0, -SHADOW_OFFSET_PX[0], 0, 1, -SHADOW_OFFSET_PX[1]),
                Image.Resampling.BILINEAR,
            )
            dark = np.asarray(moved.filter(ImageFilter.GaussianBlur(SHADOW_BLUR_PX)), dtype=np.float32) / 255.0
            area *= 1.0 - shadow * dark[..., None]
        rows = np.arange(top, foot, dtype=np.float32)
        height = max(1.0, foot - top - 2.0 * pad)
        lift = shade * (1.0 - 2.0 * np.clip((rows - top - pad) / height, 0.0, 1.0))[:, None, None]
        paint = np.asarray(colour, dtype=np.float32) * (1.0 + SHADE_FRACTION * lift) + SHADE_LEVELS * lift
        area += mask[..., None] * (paint - area)
        return mask, (left, top, right, foot)

    def to_uint8(self) -> NDArray[np.uint8]:
        """The picture, [128, 128, 3] uint8."""
        return np.clip(np.rint(self.pixels), 0, 255).astype(np.uint8)


def _box_of(parts: Sequence[Part], pad: int) -> tuple[int, int, int, int]:
    xs: list[float] = []
    ys: list[float] = []
    for part in parts:
        match part:
            case Ellipse():
                xs += [part.x - part.rx, part.x + part.rx]
                ys += [part.y - part.ry, part.y + part.ry]
            case Polygon():
                xs += [x for x, _ in part.points]
                ys += [y for _, y in part.points]
            case Stroke():
                reach = part.width_px / 2
                xs += [x + d for x, _ in part.points for d in (-reach, reach)]
                ys += [y + d for _, y in part.points for d in (-reach, reach)]
    return (
        max(0, int(np.floor(min(xs))) - pad),
        max(0, int(np.floor(min(ys))) - pad),
        min(SIDE_PX, int(np.ceil(max(xs))) + pad),
        min(SIDE_PX, int(np.ceil(max(ys))) + pad),
    )


def _draw(draw: ImageDraw.ImageDraw, part: Part, left: int, top: int) -> None:
    n = SUPERSAMPLING
    match part:
        case Ellipse():
            draw.ellipse(
                [
                    (part.x - part.rx - left) * n,
                    (part.y - part.ry - top) * n,
                    (part.x + part.rx - left) * n,
                    (part.y + part.ry - top) * n,
                ],
                fill=0 if part.is_hole else 255,
            )
        case Polygon():
            draw.polygon([((x - left) * n, (y - top) * n) for x, y in part.points], fill=0 if part.is_hole else 255)
        case Stroke():
            points = [((x - left) * n, (y - top) * n) for x, y in part.points]
            draw.line(points, fill=255, width=round(part.width_px * n), joint="curve")
