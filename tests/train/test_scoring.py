"""The checker agrees with pictures known to be right, and disagrees with ones known to be wrong."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import numpy as np

from sdfleet.train.pictures import render
from sdfleet.train.scoring import components, score
from sdfleet.train.world import Background, Group, Pair, Scene, Single, Thing, draw_spec


def test_at_least_95_percent_of_drawn_pictures_pass_every_check() -> None:
    rng = random.Random(7)
    hits: dict[str, list[bool]] = defaultdict(list)
    for _ in range(160):
        spec = draw_spec(rng)
        if not isinstance(spec, Scene):
            for check, is_right in score(render(spec, rng)[0], spec).items():
                hits[check].append(is_right)
    assert set(hits) == {"background", "colour", "shape", "size", "count", "relation", "both_shapes"}
    assert {check: np.mean(found) for check, found in hits.items() if np.mean(found) < 0.95} == {}


def test_a_picture_of_something_else_fails_the_check_that_differs() -> None:
    spec = Single(thing=Thing(shape="circle", colour="red"), background=Background(colour="yellow"))
    picture, _ = render(spec, random.Random(0))
    other_shape = replace(spec, thing=Thing(shape="square", colour="red"))
    other_colour = replace(spec, thing=Thing(shape="circle", colour="blue"))
    other_background = replace(spec, background=Background(colour="green"))
    assert not score(picture, other_shape)["shape"]
    assert not score(picture, other_colour)["colour"]
    assert not score(picture, other_background)["background"]


def test_a_mirrored_pair_fails_its_relation() -> None:
    first, second = Thing(shape="star", colour="blue"), Thing(shape="heart", colour="pink")
    spec = Pair(first=first, second=second, relation="left", background=Background())
    picture, _ = render(spec, random.Random(0))
    assert score(picture, spec)["relation"]
    assert not score(np.ascontiguousarray(picture[:, ::-1]), spec)["relation"]


def test_a_missing_thing_fails_the_count() -> None:
    spec = Group(thing=Thing(shape="ring", colour="green"), count=3, background=Background())
    picture, _ = render(spec, random.Random(0))
    assert score(picture, spec)["count"]
    assert not score(picture, replace(spec, count=4))["count"]


def test_components_tell_touching_areas_from_separate_ones() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[5:25, 5:25] = True
    mask[25:30, 24:50] = True  # touches the first at one edge
    mask[40:60, 5:25] = True
    assert [int(area.sum()) for area in components(mask)] == [530, 400]
