"""Turns a spec into pixels and into one shape label per latent cell, the same ones for the same random generator."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from sdfleet.train import canvas
from sdfleet.train.canvas import Canvas
from sdfleet.train.outlines import outline
from sdfleet.train.scenes import paint_scene
from sdfleet.train.world import (
    CELL_PX,
    N_CELLS,
    SCENE_LABEL,
    SHAPES,
    Group,
    Pair,
    Scene,
    Single,
    Size,
    Spec,
    Thing,
    jittered,
    things_of,
)

# No object is smaller than 20 px in radius: five latent cells across is what it takes to tell a heart from a
# diamond once the picture has gone through the decoder.
RADIUS_PX: dict[Size, float] = {"small": 21.0, "medium": 33.0, "large": 47.0}
PAIR_RADIUS_PX: dict[Size, float] = {"small": 21.0, "medium": 24.5, "large": 27.5}
SHADOW = 0.14
STRIPE_PX = 16
BACKGROUND_LIGHT_LEVELS = 4.0


def render(spec: Spec, rng: random.Random) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a spec: picture [128, 128, 3] uint8 and labels [16, 16] uint8, one per 8-pixel cell."""
    view = Canvas()
    labels = np.zeros((N_CELLS, N_CELLS), dtype=np.uint8)
    if isinstance(spec, Scene):
        paint_scene(view, spec, rng)
        labels[:] = SCENE_LABEL
        return view.to_uint8(), labels
    _paint_background(view, spec, rng)
    shades = {thing.colour: jittered(thing.colour, rng) for thing in things_of(spec)}
    for thing, x, y, radius in place(spec, rng):
        mask, (left, top, right, foot) = view.paint(
            outline(thing.shape, x, y, radius), shades[thing.colour], shadow=SHADOW
        )
        cover = np.zeros((canvas.SIDE_PX, canvas.SIDE_PX), dtype=np.float32)
        cover[top:foot, left:right] = mask
        share = cover.reshape(N_CELLS, CELL_PX, N_CELLS, CELL_PX).mean((1, 3))
        labels[share > 0.3] = 1 + SHAPES.index(thing.shape)
    return view.to_uint8(), labels


def place(spec: Single | Pair | Group, rng: random.Random) -> list[tuple[Thing, float, float, float]]:
    """Things with centre and radius in pixels, back to front."""

    def jitter(reach: float) -> float:
        return rng.uniform(-reach, reach)

    if isinstance(spec, Single):
        radius = RADIUS_PX[spec.thing.size] * rng.uniform(0.95, 1.05)
        reach = 3.0 if spec.thing.size == "large" else 6.0
        return [(spec.thing, 64 + jitter(reach), 64 + jitter(reach), radius)]
    if isinstance(spec, Group):
        spots = {
            2: [(37, 64), (91, 64)],
            3: [(64, 37), (36, 91), (92, 91)],
            4: [(37, 37), (91, 37), (37, 91), (91, 91)],
        }[spec.count]
        radius = (23.0 if spec.count == 2 else 22.0) * rng.uniform(0.95, 1.05)
        return [(spec.thing, x + jitter(2.5), y + jitter(2.5), radius) for x, y in spots]
    if spec.relation == "inside":
        x, y = 64 + jitter(3), 64 + jitter(3)
        drop = {"triangle": 12.0, "heart": -3.0, "star": 3.0}.get(spec.second.shape, 0.0)
        inner = 20.0 * rng.uniform(0.97, 1.05)
        return [
            (spec.second, x, y, 56 * rng.uniform(0.97, 1.03)),
            (spec.first, x + jitter(1), y + drop + jitter(1), inner),
        ]
    near = (34 + jitter(2), 64 + jitter(4))
    far = (94 + jitter(2), 64 + jitter(4))
    if spec.relation in ("right", "below"):
        near, far = far, near
    if spec.relation in ("above", "below"):
        near, far = near[::-1], far[::-1]
    return [
        (thing, x, y, PAIR_RADIUS_PX[thing.size] * rng.uniform(0.96, 1.04))
        for thing, (x, y) in ((spec.second, far), (spec.first, near))
    ]


def _paint_background(view: Canvas, spec: Single | Pair | Group, rng: random.Random) -> None:
    background = spec.background
    if background.second is None:
        colour = jittered(background.colour, rng)
        view.fill_gradient(colour, colour)
    elif background.kind == "gradient":
        view.fill_gradient(jittered(background.colour, rng), jittered(background.second, rng))
    else:
        view.fill_stripes(jittered(background.colour, rng), jittered(background.second, rng), width_px=STRIPE_PX)
    view.light(BACKGROUND_LIGHT_LEVELS)
