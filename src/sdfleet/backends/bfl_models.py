"""What Black Forest Labs' service draws with: its models, their limits, and a request in their words.

As its API pages had it in November 2026. What a model does not take is told and left out, never sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sdfleet.backends.sent_pictures import ours_alone
from sdfleet.catalog.cards import Card, Ignored
from sdfleet.domain import Drawing, ImageRequest, Unsaid
from sdfleet.errors import InvalidValue, UnsupportedByModel

ID = "flux-api"
# What "automatic" means there for pictures that are told by their ratio.
RATIOS = ("21:9", "16:9", "3:2", "4:3", "5:4", "1:1", "4:5", "3:4", "2:3", "9:16", "9:21")


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """A number that a model takes, and what is sent where a request says nothing."""

    least: float
    most: float
    default: float

    def check(self, field: str, value: float | None, *, model: str) -> None:
        """Raise InvalidValue unless the service would take it."""
        if value is not None and not self.least <= value <= self.most:
            raise InvalidValue(field, f"{value:g} is not between {self.least:g} and {self.most:g}, as {model} takes it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One endpoint. size: what is drawn where a request says nothing.

    sides: least, most and multiple of a side; None: it is told a ratio and decides the size itself.
    picture: the field of an input picture. redraws: an input picture is what its words change, not what it is like.
    """

    title: str
    size: tuple[int, int] = (1024, 1024)
    sides: tuple[int, int, int] | None = None
    steps: Numbers | None = None
    guidance: Numbers | None = None
    picture: Literal["image_prompt", "input_image", "image"] = "input_image"
    takes_strength: bool = False
    takes_mask: bool = False
    takes_upsampling: bool = True

    @property
    def ignores(self) -> tuple[Ignored, ...]:
        """What has no effect on its pictures."""
        found: list[Ignored] = ["negative_prompt", "sampler"]
        found += ["steps"] if self.steps is None else []
        found += ["guidance"] if self.guidance is None else []
        return tuple(found)

    @property
    def unsaid(self) -> tuple[Unsaid, ...]:
        """What a drawing says and nothing is known of."""
        found: list[Unsaid] = ["sampler"]
        found += ["steps"] if self.steps is None else []
        found += ["guidance"] if self.guidance is None else []
        found += [] if self.takes_strength else ["strength"]
        return tuple(found)


_FLUX_1 = (256, 1440, 32)
# Theirs has no upper limit for a side but one for the whole, which the service tells by itself.
_FLUX_2 = (64, 4096, 16)

MODELS: Mapping[str, Model] = {
    "flux-dev": Model(
        title="FLUX.1 dev, at Black Forest Labs", size=(1024, 768), sides=_FLUX_1, picture="image_prompt",
        steps=Numbers(least=1, most=50, default=28), guidance=Numbers(least=1.5, most=5, default=3),
    ),
    "flux-pro-1.1": Model(title="FLUX 1.1 pro", size=(1024, 768), sides=_FLUX_1, picture="image_prompt"),
    "flux-pro-1.1-ultra": Model(
        title="FLUX 1.1 pro ultra", size=(2752, 1536), picture="image_prompt", takes_strength=True,
        takes_upsampling=False,
    ),
    "flux-kontext-pro": Model(title="FLUX.1 Kontext pro"),
    "flux-kontext-max": Model(title="FLUX.1 Kontext max"),
    "flux-2-pro": Model(title="FLUX.2 pro", sides=_FLUX_2),
    "flux-2-pro-preview": Model(title="FLUX.2 pro preview", sides=_FLUX_2),
    "flux-2-max": Model(title="FLUX.2 max", sides=_FLUX_2),
    "flux-2-flex": Model(
        title="FLUX.2 flex", sides=_FLUX_2, steps=Numbers(least=1, most=50, default=50),
        guidance=Numbers(least=1.5, most=10, default=5),
    ),
    "flux-2-klein-4b": Model(title="FLUX.2 klein 4B, at Black Forest Labs", sides=_FLUX_2),
    "flux-2-klein-9b": Model(title="FLUX.2 klein 9B, at Black Forest Labs", sides=_FLUX_2),
    # Its limits are from memory: nobody here has asked it.
    "flux-pro-1.0-fill": Model(
        title="FLUX.1 pro fill", picture="image", takes_mask=True, takes_upsampling=False,
        steps=Numbers(least=15, most=50, default=50), guidance=Numbers(least=1.5, most=100, default=60),
    ),
}  # fmt: skip


def cards() -> tuple[Card, ...]:
    """The models as the model list shows them."""
    return tuple(_card(name, model) for name, model in MODELS.items())


def _card(name: str, model: Model) -> Card:
    least, most, multiple = model.sides or (None, None, None)
    return Card(
        name=name,
        family="other",
        title=model.title,
        licence="Black Forest Labs API terms",
        licence_url="https://bfl.ai/legal",
        width_px=model.size[0],
        height_px=model.size[1],
        # Of one whose steps nobody is told, the picture is the only one.
        steps=1 if model.steps is None else int(model.steps.default),
        guidance=1.0 if model.guidance is None else model.guidance.default,
        sampler="euler",
        min_side_px=least,
        max_side_px=most,
        ignores=model.ignores,
        backend=ID,
        side_multiple_px=multiple or 8,
    )


def check(card: Card, request: ImageRequest) -> tuple[str, ...]:
    """What would be left out of a request, as warnings. Raises a BadRequest for what the model cannot draw.

    >>> request = ImageRequest(prompt="a fox", width_px=1504, height_px=512)
    >>> check(next(card for card in cards() if card.name == "flux-dev"), request)
    Traceback (most recent call last):
    sdfleet.errors.InvalidValue: width: 1504 px is not between 256 and 1440, as flux-dev takes it
    """
    model, name = MODELS[card.name], card.name
    if request.mask is not None and not model.takes_mask:
        raise UnsupportedByModel(f"{name} takes no mask", hint="flux-pro-1.0-fill does")
    if request.mask is None and model.takes_mask:
        raise UnsupportedByModel(f"{name} fills a part of a picture", hint="send a picture and a mask")
    warnings = []
    size = None if request.width_px is None or request.height_px is None else (request.width_px, request.height_px)
    if size is not None and model.sides is not None:
        for field, side_px in zip(("width", "height"), size, strict=True):
            _check_side(field, side_px, model.sides, name=name)
    elif size is not None and not model.takes_mask:
        warnings.append(f"{name} decides the size itself: it is told the ratio {ratio_of(*size)}")
    if model.steps is not None:
        model.steps.check("steps", request.steps, model=name)
    if model.guidance is not None:
        model.guidance.check("guidance", request.guidance, model=name)
    if request.image is not None and request.strength is not None and not model.takes_strength:
        warnings.append(f"strength has no effect on {name}")
    warnings += [f"{field} has no effect on {name}" for field in ours_alone(request)]
    return tuple(warnings)


def _check_side(field: str, side_px: int, sides: tuple[int, int, int], *, name: str) -> None:
    least, most, multiple = sides
    if not least <= side_px <= most:
        raise InvalidValue(field, f"{side_px} px is not between {least} and {most}, as {name} takes it")
    if side_px % multiple:
        down = side_px // multiple * multiple
        raise InvalidValue(
            field,
            f"{side_px} px is not a multiple of {multiple}, as {name} takes it",
            hint=f"use {max(least, down)} or {down + multiple}",
        )


def body_of(model: Model, drawing: Drawing, *, seed: int, image: str | None, mask: str | None) -> dict[str, object]:
    """The request in their words. image, mask: PNG in base64."""
    body: dict[str, object] = {"prompt": drawing.prompt, "seed": seed, "output_format": "png"}
    if model.sides is not None:
        body |= {"width": drawing.width_px, "height": drawing.height_px}
    elif not model.takes_mask:
        body["aspect_ratio"] = ratio_of(drawing.width_px, drawing.height_px)
    if model.steps is not None:
        body["steps"] = drawing.steps
    if model.guidance is not None:
        body["guidance"] = drawing.guidance
    if model.takes_upsampling:
        # Else flex would draw another prompt than the one that it was given.
        body["prompt_upsampling"] = False
    if image is not None:
        body[model.picture] = image
        if model.takes_strength:
            # Theirs says how much of the picture is kept.
            body["image_prompt_strength"] = round(1.0 - drawing.strength, 4)
    if mask is not None:
        body["mask"] = mask
    return body


def ratio_of(width_px: int, height_px: int) -> str:
    """The nearest ratio that the service knows.

    >>> ratio_of(1024, 768), ratio_of(1000, 1010), ratio_of(300, 4000)
    ('4:3', '1:1', '9:21')
    """
    wanted = math.log(width_px / height_px)

    def distance(ratio: str) -> float:
        across, down = map(int, ratio.split(":"))
        return abs(math.log(across / down) - wanted)

    return min(RATIOS, key=distance)
