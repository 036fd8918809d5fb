"""Measures whether a picture shows what its spec says, by looking only at the pixels.

Every pixel is given the nearest palette colour; things are connected areas of one colour, and a thing's shape is
the ideal outline its area overlaps best. Nothing here knows how a picture was made.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdfleet.train.canvas import Canvas
from sdfleet.train.outlines import outline
from sdfleet.train.world import (
    COLOURS,
    PALETTE,
    SHAPES,
    Background,
    ColourName,
    Group,
    Pair,
    Shape,
    Single,
    Size,
)

Check = Literal["background", "colour", "shape", "both_shapes", "size", "count", "relation"]
Mask = NDArray[np.bool_]

# Green differences look larger to people than blue ones.
CHANNEL_WEIGHTS = np.array([1.05, 1.35, 0.6])
BORDER_PX = 5
MIN_AREA_PX = 120
TEMPLATE_PX = 48
# Extents in pixels between small and medium, medium and large things (sdfleet.train.world.RADIUS_PX).
SIZE_LIMITS_PX = (51.0, 76.0)
MIN_SHIFT_PX = 12.0


def score(picture: NDArray[np.uint8], spec: Single | Pair | Group) -> dict[Check, bool]:
    """What is right in a picture [128, 128, 3] uint8; only the checks that make sense for the spec."""
    labels = name_colours(picture)
    checks: dict[Check, bool] = {"background": _is_background_right(labels, spec.background)}
    match spec:
        case Single():
            area = largest(_foreground(labels, spec))
            counts = np.bincount(labels[area], minlength=len(COLOURS)) if area.any() else np.zeros(len(COLOURS))
            checks["colour"] = bool(area.any()) and COLOURS[int(counts.argmax())] == spec.thing.colour
            checks["shape"] = shape_of(area) == spec.thing.shape
            checks["size"] = size_of(area) == spec.thing.size
        case Group():
            areas = components(labels == COLOURS.index(spec.thing.colour))
            checks["colour"] = bool(areas)
            checks["count"] = len(areas) == spec.count
            checks["shape"] = bool(areas) and all(shape_of(area) == spec.thing.shape for area in areas)
        case Pair():
            first, second = _pair_areas(labels, spec)
            checks["colour"] = bool(first.any() and second.any())
            checks["relation"] = checks["colour"] and _is_related(first, second, spec)
            outer = {shape_of(second), shape_of(first | second)} if spec.relation == "inside" else {shape_of(second)}
            checks["both_shapes"] = shape_of(first) == spec.first.shape and spec.second.shape in outer
        case _:
            assert_never(spec)
    return checks


def name_colours(picture: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Index into COLOURS of every pixel's nearest palette colour, [h, w]."""
    palette = np.array([PALETTE[colour] for colour in COLOURS])
    gap = picture.astype(np.float64)[..., None, :] - palette
    nearest: NDArray[np.int64] = (gap * gap * CHANNEL_WEIGHTS).sum(-1).argmin(-1)
    return nearest


def components(mask: Mask, *, min_area_px: int = MIN_AREA_PX) -> list[Mask]:
    """Connected areas of at least min_area_px pixels, largest first."""
    names = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(names, 1)
        around = np.maximum.reduce([padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2], names])
        # A whole run at once: every pixel takes its name's newest name, so that long areas need few rounds.
        grown = np.where(mask, around, 0)
        newest = np.arange(mask.size + 1)
        np.maximum.at(newest, names[mask], grown[mask])
        grown = np.where(mask, newest[grown], 0)
        if np.array_equal(grown, names):
            break
        names = grown
    values, counts = np.unique(names[mask], return_counts=True)
    order = np.argsort(-counts)
    return [names == values[k] for k in order if counts[k] >= min_area_px]


def largest(mask: Mask) -> Mask:
    """The largest connected area, or nothing."""
    found = components(mask)
    return found[0] if found else np.zeros_like(mask)


def shape_of(area: Mask) -> Shape | None:
    """The shape whose ideal outline, stretched to the area's box, overlaps it best."""
    if area.sum() < MIN_AREA_PX:
        return None
    ys, xs = np.where(area)
    cut = area[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    height, width = cut.shape
    tile = Image.fromarray((cut * 255).astype(np.uint8)).resize((TEMPLATE_PX, TEMPLATE_PX), Image.Resampling.BILINEAR)
    seen = np.asarray(tile) > 127
    best: tuple[float, Shape | None] = (0.0, None)
    for shape, ideal in _templates().items():
        if shape in ("circle", "square", "ring", "cross") and not 0.72 < width / height < 1.39:
            continue
        overlap = float((seen & ideal).sum() / (seen | ideal).sum())
        best = max(best, (overlap, shape), key=lambda pair: pair[0])
    return best[1]


def size_of(area: Mask) -> Size | None:
    """How large an area is, by its longer side."""
    if not area.any():
        return None
    ys, xs = np.where(area)
    extent = max(ys.max() - ys.min(), xs.max() - xs.min()) + 1
    return "small" if extent < SIZE_LIMITS_PX[0] else "medium" if extent < SIZE_LIMITS_PX[1] else "large"


@lru_cache(maxsize=1)
def _templates() -> dict[Shape, Mask]:
    ideals: dict[Shape, Mask] = {}
    for shape in SHAPES:
        mask, _ = Canvas().paint(outline(shape, 64, 64, 50), (0, 0, 0))
        ys, xs = np.where(mask > 0.5)
        cut = Image.fromarray((mask * 255).astype(np.uint8)[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
        ideals[shape] = np.asarray(cut.resize((TEMPLATE_PX, TEMPLATE_PX), Image.Resampling.BILINEAR)) > 127
    return ideals


def _border_share(labels: NDArray[np.int64], colour: ColourName) -> float:
    frame = np.ones(labels.shape, dtype=bool)
    frame[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    return float((labels[frame] == COLOURS.index(colour)).mean())


def _is_background_right(labels: NDArray[np.int64], background: Background) -> bool:
    if background.second is None:
        return _border_share(labels, background.colour) > 0.7
    if background.kind == "stripes":
        return min(_border_share(labels, colour) for colour in background.colours()) > 0.25
    ends = (labels[:BORDER_PX], labels[-BORDER_PX:])
    pairs = zip(ends, background.colours(), strict=True)
    return all((end == COLOURS.index(colour)).mean() > 0.6 for end, colour in pairs)


def _foreground(labels: NDArray[np.int64], spec: Single) -> Mask:
    if spec.background.kind == "gradient":  # its middle passes through other colours
        return labels == COLOURS.index(spec.thing.colour)
    return ~np.isin(labels, [COLOURS.index(colour) for colour in spec.background.colours()])


def _pair_areas(labels: NDArray[np.int64], spec: Pair) -> tuple[Mask, Mask]:
    if spec.first.colour != spec.second.colour:
        return (
            largest(labels == COLOURS.index(spec.first.colour)),
            largest(labels == COLOURS.index(spec.second.colour)),
        )
    found = components(labels == COLOURS.index(spec.first.colour))
    nothing = np.zeros(labels.shape, dtype=bool)
    one, other = (*found[:2], nothing, nothing)[:2]
    # Two things of one colour are told apart by their shapes.
    is_swapped = shape_of(one) == spec.second.shape or shape_of(other) == spec.first.shape
    return (other, one) if is_swapped else (one, other)


def _is_related(first: Mask, second: Mask, spec: Pair) -> bool:
    down, right = (float(np.mean(a) - np.mean(b)) for a, b in zip(np.where(first), np.where(second), strict=True))
    match spec.relation:
        case "above":
            return down < -MIN_SHIFT_PX and abs(down) > abs(right)
        case "below":
            return down > MIN_SHIFT_PX and abs(down) > abs(right)
        case "left":
            return right < -MIN_SHIFT_PX and abs(right) > abs(down)
        case "right":
            return right > MIN_SHIFT_PX and abs(right) > abs(down)
        case "inside":
            inner, outer = np.argwhere(first), np.argwhere(second)
            return bool((inner.min(0) > outer.min(0)).all() and (inner.max(0) < outer.max(0)).all())
        case _:
            assert_never(spec.relation)
