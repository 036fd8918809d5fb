"""The outlines of the eight shapes, in radii around their centre."""

from __future__ import annotations

import math
from typing import assert_never

from sdfleet.train import canvas
from sdfleet.train.canvas import Ellipse, Part, Point, Polygon
from sdfleet.train.world import Shape


def outline(shape: Shape, x: float, y: float, radius: float) -> list[Part]:
    """The parts of a shape around a centre, in pixels."""
    match shape:
        case "circle":
            return [canvas.disc(x, y, radius * 0.97)]
        case "ring":
            hole = radius * 0.58
            return [canvas.disc(x, y, radius), Ellipse(x=x, y=y, rx=hole, ry=hole, is_hole=True)]
        case "square" | "triangle" | "star" | "heart" | "cross" | "diamond":
            return [Polygon(points=tuple((x + u * radius, y + v * radius) for u, v in CORNERS[shape]))]
        case _:
            assert_never(shape)


def _star(inner: float) -> tuple[Point, ...]:
    turns = [(k * math.pi / 5, 1.08 if k % 2 == 0 else inner) for k in range(10)]
    return tuple((math.sin(turn) * reach, 0.06 - math.cos(turn) * reach) for turn, reach in turns)


def _heart() -> tuple[Point, ...]:
    points: list[Point] = []
    for k in range(64):
        turn = k / 64 * 2 * math.pi
        down = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
        points.append((math.sin(turn) ** 3, -down / 16 - 0.14))
    return tuple(points)


# Corners in radii around the centre. Plump on purpose: the arms of the cross and the tips of the star stay wider
# than one latent cell at the smallest radius.
CORNERS: dict[Shape, tuple[Point, ...]] = {
    "square": ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": ((0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)),
    "star": _star(0.48),
    "heart": _heart(),
    "diamond": ((0.0, -1.08), (0.74, 0.0), (0.0, 1.08), (-0.74, 0.0)),
    "cross": (
        (-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36), (1.0, 0.36), (0.36, 0.36),
        (0.36, 1.0), (-0.36, 1.0), (-0.36, 0.36), (-1.0, 0.36), (-1.0, -0.36), (-0.36, -0.36),
    ),
}  # fmt: skip
