"""What people may write for a picture of the world: many wordings, one meaning.

`caption` picks a wording at random; `plain_caption` is the one a person would most likely type. A caption never
says what is not in the picture; it may leave out what it is free to leave out (a plain white background, the
colour of a car), so those prompts have a meaning as well.
"""

from __future__ import annotations

import random
from typing import assert_never

from sdfleet.train.world import (
    UNCOLOURED,
    Background,
    ColourName,
    Group,
    Pair,
    Relation,
    Scene,
    Shape,
    Single,
    Size,
    Spec,
    Thing,
    TimeOfDay,
)

COLOUR_WORDS: dict[ColourName, tuple[str, ...]] = {
    "red": ("red", "red", "red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "yellow", "yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
}
SHAPE_WORDS: dict[Shape, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc", "disk", "dot"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "ring", "ring", "hoop", "donut"),
    "cross": ("cross", "cross", "cross", "plus", "plus sign"),
    "diamond": ("diamond", "diamond", "diamond", "rhombus"),
}
SIZE_WORDS: dict[Size, tuple[str, ...]] = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("", "", "", "medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "above": ("above", "above", "over", "on top of"),
    "below": ("below", "below", "under", "beneath", "underneath"),
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "inside": ("inside", "inside", "in", "within", "inside of"),
}
OPPOSITE: dict[Relation, Relation] = {"above": "below", "below": "above", "left": "right", "right": "left"}
COUNT_WORDS: dict[int, tuple[str, ...]] = {
    2: ("two", "two", "2", "a pair of", "a couple of"),
    3: ("three", "three", "3", "a group of three"),
    4: ("four", "four", "4", "a group of four"),
}
TIME_WORDS: dict[TimeOfDay, tuple[str, ...]] = {
    "day": ("by day", "during the day", "on a sunny day", "under a blue sky", "in the daytime", "in daylight"),
    "sunset": ("at sunset", "at sunset", "in the evening", "at dusk", "at sunrise", "under an orange sky"),
    "night": ("at night", "at night", "by night", "under the stars", "under a starry sky", "at midnight"),
}
OPENINGS: tuple[str, ...] = (
    "a picture of", "a drawing of", "an image of", "an illustration of", "a photo of", "a painting of",
    "a simple drawing of", "draw", "show me", "there is", "a sketch of", "an icon of",
)  # fmt: skip
PRAISE: tuple[str, ...] = (
    "nice", "simple", "cute", "pretty", "colorful", "flat", "clean", "bright", "beautiful", "lovely", "single",
)  # fmt: skip
ENDINGS: tuple[str, ...] = (
    "simple", "flat design", "cute", "high quality", "best quality", "highly detailed", "masterpiece", "4k",
    "cartoon style", "clean lines", "minimal", "vector art", "digital art", "children's book", "soft light",
    "centered", "icon", "please",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def caption(spec: Spec, rng: random.Random) -> str:
    """One random wording of a spec, lower case, at most about 25 words."""
    match spec:
        case Single():
            text = _with_background(_single(spec, rng), spec.background, rng)
        case Group():
            text = _with_background(_group(spec, rng), spec.background, rng)
        case Pair():
            text = _with_background(_pair(spec, rng), spec.background, rng)
        case Scene():
            text = _scene(spec, rng)
        case _:
            assert_never(spec)
    return _decorated(" ".join(text.split()).replace(" ,", ","), rng)


def plain_caption(spec: Spec) -> str:
    """The plainest wording of a spec."""
    match spec:
        case Single():
            size = "" if spec.thing.size == "medium" else spec.thing.size
            text = _article(f"{size} {spec.thing.colour} {spec.thing.shape}") + _plain_background(spec.background)
        case Group():
            number = ("two", "three", "four")[spec.count - 2]
            text = f"{number} {spec.thing.colour} {plural(spec.thing.shape)}" + _plain_background(spec.background)
        case Pair():
            first, second = (_article(f"{t.colour} {t.shape}") for t in (spec.first, spec.second))
            text = f"{first} {RELATION_WORDS[spec.relation][0]} {second}" + _plain_background(spec.background)
        case Scene():
            time = "" if spec.time == "day" or spec.kind == "moon" else f" {TIME_WORDS[spec.time][0]}"
            text = {
                "house": f"a {spec.colour} house with a {spec.second} roof",
                "tree": "a tree",
                "sun": "the sun",
                "moon": "the moon and stars",
                "mountains": "mountains",
                "boat": f"a {spec.colour} boat on the sea",
                "flower": f"a {spec.colour} flower",
                "cat": f"a {spec.colour} cat face",
                "smiley": f"a {spec.colour} smiling face",
                "car": f"a {spec.colour} car",
                "fish": f"a {spec.colour} fish",
                "snowman": f"a snowman with a {spec.colour} scarf",
            }[spec.kind] + time
        case _:
            assert_never(spec)
    return text


def plural(noun: str) -> str:
    """The plural of a noun of this world."""
    return noun + ("es" if noun[-1] in "sx" else "s")


def _single(spec: Single, rng: random.Random) -> str:
    thing = spec.thing
    size, colour, shape = _words(thing, rng)
    chance = rng.random()
    if chance < 0.62:
        return _any_article(f"{size} {colour} {shape}", rng)
    if chance < 0.70:
        return _any_article(f"{colour} {size} {shape}", rng)
    if chance < 0.76:
        return f"{_article(f'{size} {shape}')} {rng.choice(('in', 'that is', 'colored', 'which is'))} {colour}"
    if chance < 0.82:
        return f"{shape}, {colour}" + (f", {size}" if size else "")
    if chance < 0.88:
        return f"one {size} {colour} {shape}"
    if chance < 0.95:
        return f"{_article(f'{rng.choice(PRAISE)} {size} {colour} {shape}')}"
    return _any_article(f"{size} {shape}", rng)  # any colour will do


def _group(spec: Group, rng: random.Random) -> str:
    number = rng.choice(COUNT_WORDS[spec.count])
    _, colour, shape = _words(spec.thing, rng)
    things = plural(shape)
    chance = rng.random()
    if chance < 0.8:
        return f"{number} {rng.choice(('', '', '', 'small', rng.choice(PRAISE)))} {colour} {things}"
    if chance < 0.9:
        return f"{number} {things} in {colour}"
    return f"{things}, {number}, {colour}" if number.isalnum() else f"{number} {colour} {things}"


def _pair(spec: Pair, rng: random.Random) -> str:
    relation = spec.relation
    is_sized = "large" in (spec.first.size, spec.second.size) or "small" in (spec.first.size, spec.second.size)
    if relation == "inside":
        is_sized = rng.random() < 0.25
    first, second = (_any_article(_phrase(thing, rng, is_sized=is_sized), rng) for thing in (spec.first, spec.second))
    chance = rng.random()
    if relation == "inside":
        if chance < 0.12:
            return f"{second} with {first} {rng.choice(('inside', 'inside it', 'in it', 'in the middle'))}"
        if chance < 0.2:
            return f"{second} {rng.choice(('around', 'containing', 'surrounding'))} {first}"
        return f"{first} {rng.choice(RELATION_WORDS[relation])} {second}"
    if chance < 0.22:
        return f"{second} {rng.choice(RELATION_WORDS[OPPOSITE[relation]])} {first}"
    if chance < 0.32:
        sides = {
            "above": ("at the top", "at the bottom"), "below": ("at the bottom", "at the top"),
            "left": ("on the left", "on the right"), "right": ("on the right", "on the left"),
        }[relation]  # fmt: skip
        return f"{first} {sides[0]}{rng.choice((',', ' and'))} {second} {sides[1]}"
    if relation == "left" and chance < 0.52:
        return f"{first} {rng.choice(('and', 'and', 'next to', 'beside'))} {second}"
    return f"{first} {rng.choice(('', '', '', 'is'))} {rng.choice(RELATION_WORDS[relation])} {second}"


def _scene(spec: Scene, rng: random.Random) -> str:
    colour, second = (rng.choice(COLOUR_WORDS[c]) for c in (spec.colour, spec.second))
    is_colour_said = rng.random() < 0.85
    if not is_colour_said:
        colour = ""
    pale = rng.choice(
        ("", f"on a light {second} background", f"light {second} background", f"on a {second} background")
    )
    match spec.kind:
        case "house":
            walls = _article(f"{colour} house")
            bodies = [f"{walls} with a {second} roof", f"{walls}, {second} roof", f"{colour} house with {second} roof"]
            bodies += [walls, f"a house with {colour} walls and a {second} roof"] if is_colour_said else [walls]
        case "tree":
            bodies = ["a tree", "a green tree", "a tree on grass", "tree in a meadow", "a big tree", "one tree"]
        case "sun":
            bodies = ["the sun", "a sun", "a bright sun in the sky", "sun over a meadow", "the shining sun"]
        case "moon":
            bodies = ["the moon and stars", "moon and stars", "a moon with stars", "a crescent moon", "the moon"]
            bodies += [
                "a night sky with a moon",
                "moon and stars in the night sky",
                "a starry night sky",
                "stars and a moon",
            ]
        case "mountains":
            bodies = [
                "mountains",
                "snowy mountains",
                "mountains with snow",
                "a mountain landscape",
                "a mountain",
                "three mountains",
            ]
        case "boat":
            boat = rng.choice(("boat", "boat", "sailboat", "ship", "sailing boat"))
            sea = rng.choice(("on the sea", "on the water", "on the ocean", "at sea", "in the sea", ""))
            bodies = [
                f"{_article(f'{colour} {boat}')} {sea}",
                f"{colour} {boat} {sea}",
                f"the sea with {_article(f'{colour} {boat}')}",
            ]
        case "flower":
            bodies = [
                _article(f"{colour} flower"),
                f"{colour} flower",
                f"{_article(f'{colour} flower')} with green leaves",
            ]
            bodies += [f"a flower with {colour} petals"] if is_colour_said else ["a blooming flower"]
        case "cat":
            bodies = [
                f"{_article(f'{colour} {animal}')} {pale}" for animal in ("cat", "cat face", "kitten", "cat head")
            ]
            bodies += [f"the face of {_article(f'{colour} cat')} {pale}"]
        case "smiley":
            bodies = [
                f"{_article(f'{colour} {face}')} {pale}"
                for face in ("smiling face", "smiley", "happy face", "smiley face")
            ]
            bodies += [f"a smiling {colour} face {pale}", f"a {colour} face with a smile {pale}"]
        case "car":
            road = rng.choice(("", "", "on a road", "on the street", "on the road"))
            bodies = [
                f"{_article(f'{colour} car')} {road}",
                f"{colour} car {road}",
                f"{_article(f'small {colour} car')} {road}",
            ]
        case "fish":
            water = rng.choice(("", "", "in the water", "in the sea", "under water", "swimming in the ocean"))
            bodies = [f"{_article(f'{colour} fish')} {water}", f"{colour} fish {water}", f"one {colour} fish {water}"]
        case "snowman":
            bodies = [
                f"a snowman with {_article(f'{colour} scarf')}",
                f"snowman, {colour} scarf",
                f"a snowman wearing {_article(f'{colour} scarf')}",
            ]
            bodies += ["a snowman"]
        case _:
            assert_never(spec.kind)
    body = rng.choice(bodies)
    if spec.kind not in UNCOLOURED and not is_colour_said:
        body = body.replace(",  scarf", " with a scarf")
    is_time_free = spec.kind in ("flower", "cat", "smiley", "fish")
    if is_time_free or (spec.time == "day" and rng.random() < 0.65) or (spec.kind == "moon" and rng.random() < 0.7):
        return body
    time = rng.choice(TIME_WORDS[spec.time])
    return f"{time}, {body}" if rng.random() < 0.1 else f"{body} {time}"


def _with_background(body: str, background: Background, rng: random.Random) -> str:
    if background.is_unsaid:
        return body
    first = rng.choice(COLOUR_WORDS[background.colour])
    if background.second is None:
        plain = rng.choice(("", "", "", "plain ", "solid "))
        wordings = [f"on {_article(plain + first)} background"] * 5
        wordings += [
            f"on {first}",
            f"with {_article(first)} background",
            f", {first} background",
            f"against {_article(first)} background",
        ]
        wordings += [
            f"in front of {_article(first)} background",
            f"on {_article(first)} backdrop",
            f", background {first}",
        ]
        openings = [f"{first} background, {body}", f"{_article(first)} background with {body}"]
    else:
        second = rng.choice(COLOUR_WORDS[background.second])
        if background.kind == "gradient":
            wordings = [
                f"on a gradient from {first} to {second}",
                f"on {_article(first)} to {second} gradient background",
            ]
            wordings += [
                f"on {_article(first)} and {second} gradient",
                f", gradient background from {first} to {second}",
            ]
            wordings += [
                f"on a gradient background, {first} to {second}",
                f"with {_article(first)} to {second} gradient behind",
            ]
        else:
            if rng.random() < 0.3:
                first, second = second, first
            wordings = [f"on a striped {first} and {second} background", f"on {first} and {second} stripes"]
            wordings += [
                f"on {_article(first)} and {second} striped background",
                f", {first} and {second} stripes behind",
            ]
            wordings += [f"on a background with {first} and {second} stripes", f"with {first} and {second} stripes"]
        openings = [f"{body} {wording}" for wording in wordings]
    if rng.random() < 0.06:
        return rng.choice(openings)
    return f"{body} {rng.choice(wordings)}"


def _plain_background(background: Background) -> str:
    if background.is_unsaid:
        return ""
    if background.second is None:
        return f" on {_article(background.colour)} background"
    if background.kind == "gradient":
        return f" on a gradient from {background.colour} to {background.second}"
    return f" on a striped {background.colour} and {background.second} background"


def _decorated(text: str, rng: random.Random) -> str:
    """The same caption with words around it that mean nothing for the picture."""
    chance = rng.random()
    if chance < 0.12:
        text = f"{rng.choice(OPENINGS)} {text}"
    elif chance < 0.2:
        text = f"{text}, {rng.choice(ENDINGS)}"
    elif chance < 0.23:
        text = f"{text}, {rng.choice(ENDINGS)}, {rng.choice(ENDINGS)}"
    elif chance < 0.27:
        # A word nobody taught: the model learns to pass over the pieces such words are cut into.
        unknown = "".join(rng.choices(LETTERS, k=rng.randint(3, 8)))
        text = f"{text}, {unknown}" if rng.random() < 0.6 else f"{unknown} {text}"
    if rng.random() < 0.08:
        text += "."
    return text


def _words(thing: Thing, rng: random.Random) -> tuple[str, str, str]:
    return (
        rng.choice(SIZE_WORDS[thing.size]),
        rng.choice(COLOUR_WORDS[thing.colour]),
        rng.choice(SHAPE_WORDS[thing.shape]),
    )


def _phrase(thing: Thing, rng: random.Random, *, is_sized: bool) -> str:
    size, colour, shape = _words(thing, rng)
    return f"{size if is_sized else ''} {colour} {shape}"


def _article(noun: str) -> str:
    noun = " ".join(noun.split())
    return ("an " if noun[0] in "aeio" else "a ") + noun


def _any_article(noun: str, rng: random.Random) -> str:
    noun = " ".join(noun.split())
    chance = rng.random()
    if chance < 0.22:
        return noun
    return f"the {noun}" if chance < 0.3 else _article(noun)
