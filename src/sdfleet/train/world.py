"""The small world the built-in model knows: what can be in a picture, and how a picture is drawn.

A spec says in words what is in a picture; `sample_spec` draws one at random, never one that is held out for
testing; `render` turns it into pixels and into one shape label per latent cell, the same ones for the same
random generator.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

import numpy as np
from numpy.typing import NDArray

from sdfleet.train import canvas
from sdfleet.train.canvas import Canvas, Ellipse, Part, Point, Polygon

Shape = Literal["circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond"]
ColourName = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray"]
Size = Literal["small", "medium", "large"]
Relation = Literal["above", "below", "left", "right", "inside"]
BackgroundKind = Literal["plain", "gradient", "stripes"]
SceneKind = Literal[
    "house", "tree", "sun", "moon", "mountains", "boat", "flower", "cat", "smiley", "car", "fish", "snowman"
]
TimeOfDay = Literal["day", "sunset", "night"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[ColourName, ...] = get_args(ColourName)
SIZES: tuple[Size, ...] = get_args(Size)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
SCENES: tuple[SceneKind, ...] = get_args(SceneKind)

PALETTE: dict[ColourName, canvas.Colour] = {
    "red": (220, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 217, 50),
    "green": (48, 160, 70),
    "blue": (45, 90, 215),
    "purple": (135, 60, 180),
    "pink": (250, 145, 190),
    "brown": (130, 80, 45),
    "black": (25, 25, 28),
    "white": (248, 248, 248),
    "gray": (140, 140, 145),
}
# What a prompt without a background gets: plain white, or blue where something in it is white.
UNSAID_BEHIND_WHITE: ColourName = "blue"

CELL_PX = 8
N_CELLS = canvas.SIDE_PX // CELL_PX
# Cell labels: 0 = nothing, 1.. = SHAPES in order, then one label for all scenes' pictures.
SCENE_LABEL = len(SHAPES) + 1
N_LABELS = SCENE_LABEL + 1

# Pairs of shape and colour the training set never holds, in any picture: prompts with them test composition.
HELD_OUT_PAIRS: frozenset[tuple[Shape, ColourName]] = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "pink"),
        ("star", "red"),
        ("heart", "green"),
        ("ring", "blue"),
        ("cross", "yellow"),
        ("diamond", "brown"),
    }
)
HELD_OUT_SHARE = 10  # one in ten combinations of each kind is kept for testing as well

# No object is smaller than 20 px in radius: five latent cells across is what it takes to tell a heart from a
# diamond once the picture has gone through the decoder.
RADIUS_PX: dict[Size, float] = {"small": 21.0, "medium": 33.0, "large": 47.0}
PAIR_RADIUS_PX: dict[Size, float] = {"small": 21.0, "medium": 24.5, "large": 27.5}
SHADOW = 0.14
STRIPE_PX = 16
BACKGROUND_LIGHT_LEVELS = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One flat shape in one colour."""

    shape: Shape
    colour: ColourName
    size: Size = "medium"


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """What is behind the things; `second` is the foot of a gradient or the other stripe."""

    kind: BackgroundKind = "plain"
    colour: ColourName = "white"
    second: ColourName | None = None
    is_unsaid: bool = False

    def colours(self) -> tuple[ColourName, ...]:
        """Every colour it has."""
        return (self.colour,) if self.second is None else (self.colour, self.second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One thing in the middle."""

    thing: Thing
    background: Background


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two things: `first` is `relation` of `second`."""

    first: Thing
    second: Thing
    relation: Relation
    background: Background


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Two to four equal things."""

    thing: Thing
    count: int
    background: Background


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A small picture of something; `second` colours the roof, the sail or what is behind a face."""

    kind: SceneKind
    colour: ColourName
    second: ColourName
    time: TimeOfDay


Spec = Single | Pair | Group | Scene

# Which times of day a scene is drawn at; the first is what a caption without a time means.
TIMES: dict[SceneKind, tuple[TimeOfDay, ...]] = {
    "house": ("day", "sunset", "night"),
    "tree": ("day", "sunset", "night"),
    "sun": ("day", "sunset"),
    "moon": ("night",),
    "mountains": ("day", "sunset", "night"),
    "boat": ("day", "sunset", "night"),
    "flower": ("day",),
    "cat": ("day",),
    "smiley": ("day",),
    "car": ("day", "sunset", "night"),
    "fish": ("day",),
    "snowman": ("day", "night"),
}
UNCOLOURED: frozenset[SceneKind] = frozenset({"tree", "sun", "moon", "mountains"})


def is_held_out(spec: Spec) -> bool:
    """Whether a spec is kept for testing: the training set never holds it."""
    match spec:
        case Single():
            key = f"{spec.thing.shape} {spec.thing.colour} {spec.background.colour}"
            return _is_pair_held_out(spec.thing) or _falls_out(key)
        case Group():
            key = f"{spec.count} {spec.thing.shape} {spec.thing.colour} {spec.background.colour}"
            return _is_pair_held_out(spec.thing) or _falls_out(key)
        case Pair():
            names = sorted(f"{thing.shape} {thing.colour}" for thing in (spec.first, spec.second))
            is_any = _is_pair_held_out(spec.first) or _is_pair_held_out(spec.second)
            return is_any or _falls_out(" ".join([*names, spec.relation]))
        case Scene():
            return spec.kind not in UNCOLOURED and _falls_out(f"{spec.kind} {spec.colour} {spec.time}")
        case _:
            assert_never(spec)


def sample_spec(rng: random.Random) -> Spec:
    """A random spec of the training set."""
    while True:
        spec = draw_spec(rng)
        if not is_held_out(spec):
            return spec


def draw_spec(rng: random.Random) -> Spec:
    """A random spec of the whole world, held out or not."""
    kind = rng.random()
    if kind < 0.33:
        thing = _draw_thing(rng, size=rng.choices(SIZES, (3, 4, 3))[0])
        return Single(thing=thing, background=_draw_background(rng, (thing.colour,)))
    if kind < 0.64:
        return _draw_pair(rng)
    if kind < 0.78:
        thing = _draw_thing(rng)
        return Group(thing=thing, count=rng.randint(2, 4), background=_draw_background(rng, (thing.colour,)))
    scene = rng.choice(SCENES)
    return Scene(
        kind=scene,
        colour=rng.choice([c for c in COLOURS if c != "white" or scene in ("house", "flower", "boat", "cat", "car")]),
        second=rng.choice(COLOURS),
        time=rng.choice(TIMES[scene]),
    )


def render(spec: Spec, rng: random.Random) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a spec: picture [128, 128, 3] uint8 and labels [16, 16] uint8, one per 8-pixel cell."""
    view = Canvas()
    labels = np.zeros((N_CELLS, N_CELLS), dtype=np.uint8)
    if isinstance(spec, Scene):
        from sdfleet.train.scenes import paint_scene

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


def things_of(spec: Spec) -> tuple[Thing, ...]:
    """The different things of a spec; a scene has none."""
    match spec:
        case Single() | Group():
            return (spec.thing,)
        case Pair():
            return (spec.first, spec.second)
        case Scene():
            return ()
        case _:
            assert_never(spec)


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


def jittered(colour: ColourName, rng: random.Random, *, levels: int = 5) -> canvas.Colour:
    """A palette colour with a little chance in it."""
    red, green, blue = PALETTE[colour]
    levels = 2 if colour == "white" else levels
    return (
        red + rng.randint(-levels, levels),
        green + rng.randint(-levels, levels),
        blue + rng.randint(-levels, levels),
    )


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


def _falls_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def _is_pair_held_out(thing: Thing) -> bool:
    return (thing.shape, thing.colour) in HELD_OUT_PAIRS


def _draw_thing(rng: random.Random, *, size: Size = "medium", but: tuple[ColourName, ...] = ()) -> Thing:
    return Thing(shape=rng.choice(SHAPES), colour=rng.choice([c for c in COLOURS if c not in but]), size=size)


def _draw_background(rng: random.Random, things: tuple[ColourName, ...]) -> Background:
    free = [c for c in COLOURS if c not in things]
    chance = rng.random()
    if chance < 0.2:
        unsaid: ColourName = UNSAID_BEHIND_WHITE if "white" in things else "white"
        # White on white and blue on blue cannot both be avoided: such a pair's background has to be said.
        if unsaid not in things:
            return Background(colour=unsaid, is_unsaid=True)
    if chance < 0.28 and "white" in free:
        return Background(colour="white")
    if chance < 0.86:
        return Background(colour=rng.choice(free))
    first, second = rng.sample(free, 2)
    return Background(kind="gradient" if chance < 0.93 else "stripes", colour=first, second=second)


def _draw_pair(rng: random.Random) -> Pair:
    relation = rng.choices(RELATIONS, (4, 4, 5, 4, 3))[0]
    sizes: tuple[Size, Size] = ("medium", "medium")
    if relation == "inside":
        sizes = ("small", "large")
    elif rng.random() < 0.2:
        sizes = (rng.choice(SIZES), rng.choice(SIZES))
    first = _draw_thing(rng, size=sizes[0])
    is_alike = relation != "inside" and rng.random() < 0.08
    second = (
        Thing(shape=rng.choice([s for s in SHAPES if s != first.shape]), colour=first.colour, size=sizes[1])
        if is_alike
        else _draw_thing(rng, size=sizes[1], but=(first.colour,))
    )
    background = _draw_background(rng, (first.colour, second.colour))
    return Pair(first=first, second=second, relation=relation, background=background)


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
