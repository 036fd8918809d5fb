"""Captions say what is in a picture, in many ways, and say it short enough."""

from __future__ import annotations

import random

from sdfleet.train.captions import COLOUR_WORDS, SHAPE_WORDS, caption, plain_caption, plural
from sdfleet.train.world import Background, Group, Pair, Single, Thing, sample_spec


def _words(text: str) -> set[str]:
    return set(text.replace(",", " ").replace(".", " ").split())


def test_captions_cover_the_whole_vocabulary() -> None:
    rng = random.Random(1)
    seen = set().union(*(_words(caption(sample_spec(rng), rng)) for _ in range(6000)))
    wanted = {word for words in COLOUR_WORDS.values() for word in words}
    wanted |= {part for words in SHAPE_WORDS.values() for word in words for part in word.split()}
    assert wanted <= seen


def test_captions_stay_under_the_text_encoders_length() -> None:
    rng = random.Random(2)
    assert max(len(caption(sample_spec(rng), rng).split()) for _ in range(4000)) <= 26


def test_same_seed_gives_the_same_wording() -> None:
    first, second = random.Random(3), random.Random(3)
    one = [caption(sample_spec(first), first) for _ in range(50)]
    other = [caption(sample_spec(second), second) for _ in range(50)]
    assert one == other


def test_plain_captions_read_like_a_person_typed_them() -> None:
    red = Thing(shape="circle", colour="red")
    orange = Thing(shape="square", colour="orange", size="small")
    on_blue = Background(colour="blue")
    assert plain_caption(Single(thing=orange, background=on_blue)) == "a small orange square on a blue background"
    assert plain_caption(Group(thing=red, count=3, background=Background(is_unsaid=True))) == "three red circles"
    pair = Pair(first=red, second=orange, relation="left", background=on_blue)
    assert plain_caption(pair) == "a red circle to the left of an orange square on a blue background"


def test_plurals_are_english() -> None:
    assert [plural(noun) for noun in ("circle", "cross", "box", "star")] == ["circles", "crosses", "boxes", "stars"]


def test_a_pair_names_both_shapes_and_both_colours() -> None:
    rng = random.Random(4)
    for _ in range(1500):
        spec = sample_spec(rng)
        if not isinstance(spec, Pair):
            continue
        words = _words(caption(spec, rng))
        for thing in (spec.first, spec.second):
            assert words & set(COLOUR_WORDS[thing.colour])
            assert words & {part for word in SHAPE_WORDS[thing.shape] for part in word.split()}
