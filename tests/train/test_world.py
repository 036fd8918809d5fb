"""The drawn world: same seed, same pixels; nothing held out is ever drawn for training."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sdfleet.train.canvas import SIDE_PX
from sdfleet.train.pictures import place, render
from sdfleet.train.scoring import name_colours
from sdfleet.train.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    N_CELLS,
    SCENE_LABEL,
    SCENES,
    SHAPES,
    TIMES,
    UNSAID_BEHIND_WHITE,
    Background,
    Scene,
    Single,
    Thing,
    draw_spec,
    is_held_out,
    sample_spec,
    things_of,
)


def test_same_seed_draws_the_same_pixels() -> None:
    first, second = random.Random(5), random.Random(5)
    for _ in range(20):
        picture, labels = render(sample_spec(first), first)
        again, labels_again = render(sample_spec(second), second)
        assert np.array_equal(picture, again)
        assert np.array_equal(labels, labels_again)


def test_pictures_have_the_promised_size_and_type() -> None:
    rng = random.Random(1)
    picture, labels = render(sample_spec(rng), rng)
    assert picture.shape == (SIDE_PX, SIDE_PX, 3)
    assert labels.shape == (N_CELLS, N_CELLS)
    assert picture.dtype == labels.dtype == np.uint8


def test_training_specs_are_never_held_out() -> None:
    rng = random.Random(2)
    specs = [sample_spec(rng) for _ in range(3000)]
    assert not any(is_held_out(spec) for spec in specs)
    seen = {(thing.shape, thing.colour) for spec in specs for thing in things_of(spec)}
    assert not seen & HELD_OUT_PAIRS


def test_every_kind_of_spec_has_held_out_members() -> None:
    rng = random.Random(3)
    kinds = {type(spec).__name__ for spec in (draw_spec(rng) for _ in range(3000)) if is_held_out(spec)}
    assert kinds == {"Single", "Pair", "Group", "Scene"}


def test_training_covers_every_shape_colour_and_scene() -> None:
    rng = random.Random(4)
    specs = [sample_spec(rng) for _ in range(3000)]
    assert {thing.shape for spec in specs for thing in things_of(spec)} == set(SHAPES)
    assert {thing.colour for spec in specs for thing in things_of(spec)} == set(COLOURS)
    scenes = {(spec.kind, spec.time) for spec in specs if isinstance(spec, Scene)}
    assert scenes == {(kind, time) for kind in SCENES for time in TIMES[kind]}


@pytest.mark.parametrize("colour", COLOURS)
def test_light_and_shade_never_change_the_name_of_a_colour(colour: str) -> None:
    colour_name = next(name for name in COLOURS if name == colour)
    behind = next(name for name in COLOURS if name != colour_name)
    for size in ("small", "large"):
        thing = Thing(shape="square", colour=colour_name, size="small" if size == "small" else "large")
        spec = Single(thing=thing, background=Background(colour=behind))
        picture, _ = render(spec, random.Random(size))
        named = name_colours(picture)
        middle = named[58:70, 58:70]
        assert (middle == COLOURS.index(colour_name)).all()
        assert (named[:4] == COLOURS.index(behind)).all()


def test_no_thing_is_smaller_than_twenty_pixels_in_radius_or_leaves_the_picture() -> None:
    rng = random.Random(6)
    for _ in range(500):
        spec = sample_spec(rng)
        if isinstance(spec, Scene):
            continue
        for _, x, y, radius in place(spec, rng):
            assert radius >= 19.4
            assert min(x, y) - radius > -1
            assert max(x, y) + radius < SIDE_PX + 1


def test_labels_name_the_shape_in_the_middle() -> None:
    for index, shape in enumerate(SHAPES):
        if shape == "ring":
            continue
        spec = Single(thing=Thing(shape=shape, colour="red"), background=Background())
        _, labels = render(spec, random.Random(0))
        assert labels[8, 8] == index + 1
        assert labels[0, 0] == 0


def test_scenes_have_one_label() -> None:
    spec = Scene(kind="house", colour="red", second="blue", time="day")
    assert (render(spec, random.Random(0))[1] == SCENE_LABEL).all()


def test_unsaid_backgrounds_are_white_or_blue_behind_white() -> None:
    rng = random.Random(8)
    for _ in range(2000):
        spec = draw_spec(rng)
        if isinstance(spec, Scene) or not spec.background.is_unsaid:
            continue
        colours = {thing.colour for thing in things_of(spec)}
        assert spec.background.colour == (UNSAID_BEHIND_WHITE if "white" in colours else "white")
        assert spec.background.colour not in colours
