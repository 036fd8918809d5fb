"""The small world the built-in model knows: what can be in a picture.

A spec says in words what is in a picture; `sample_spec` draws one at random, never one that is held out for
testing. `sdfleet.train.pictures` turns a spec into pixels.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

from sdfleet.train import canvas

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


def jittered(colour: ColourName, rng: random.Random, *, levels: int = 5) -> canvas.Colour:
    """A palette colour with a little chance in it."""
    red, green, blue = PALETTE[colour]
    levels = 2 if colour == "white" else levels
    return (
        red + rng.randint(-levels, levels),
        green + rng.randint(-levels, levels),
        blue + rng.randint(-levels, levels),
    )


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
