"""OpenAI's Images API as it stands on the wire: what comes in, what goes out, and what its words mean here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdfleet.api.answering import WithheldAnswer
from sdfleet.api.asked import SafetyCheckerField
from sdfleet.api.lora_fields import LorasField
from sdfleet.domain import MAX_SEED, MAX_SIDE_PX, SIDE_MULTIPLE_PX, Picture, PictureFormat
from sdfleet.errors import InvalidValue

MAX_IMAGES = 10
MIN_SIDE_PX = 16

Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]

# Steps as a share of what the model's card takes by default. docs/clients/openai.md has the table.
SHARE_OF_STEPS: dict[Quality, float] = {
    "low": 0.5,
    "medium": 1.0,
    "auto": 1.0,
    "standard": 1.0,
    "high": 1.5,
    "hd": 1.5,
    "xhigh": 2.0,
    "max": 3.0,
}
# What an answer says: the newest names only, as OpenAI's types have them.
_TOLD_QUALITY: dict[Quality, str] = {"auto": "medium", "standard": "medium", "hd": "high"}

# Programs go on asking for these after OpenAI has retired them, some with no way to change it: they mean the default.
_ALIAS = re.compile(r"(?:openai/)?(?:dall-e-|gpt-image-|chatgpt-image-).{0,100}")

SYNONYMS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "sampler_name": "sampler",
    "denoising_strength": "strength",
    "num_images": "n",
    "num_images_per_prompt": "n",
}
# These would give another picture than the one we draw: taking them and drawing on would be a lie.
_UNSUPPORTED = frozenset((
    "adetailer", "aspect_ratio", "clip_skip", "control_image", "controlnet", "enable_hr", "frame_count", "image_prompt",
    "ip_adapter", "lora", "markup", "refiner", "subseed", "svg", "tiling",
))  # fmt: skip
# No parameters of generations, where a picture that is sent is meant to be seen.
_OF_EDITS = frozenset(("image", "images", "init_image", "init_images", "mask"))
_SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX*]\s*([0-9]{1,5})\s*")
# How CLIP's tokenizer cuts a text before it looks words up: letters, single digits, runs of marks.
_WORDS = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_+")
# OpenAI's own bill for a large picture comes to about one token for a square of this side.
_TOKEN_SIDE_PX = 16


class UnsupportedParameter(InvalidValue):
    """A parameter that would change the picture, and that nothing here can honour."""

    code = "unsupported_parameter"


class Asked(BaseModel):
    """What the three routes share. Nulls and empty texts count as left out; what is unknown is kept for `notes`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: Annotated[str, Field(max_length=256)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    size: Annotated[str, Field(description="auto, or WIDTHxHEIGHT")] = "auto"
    quality: Quality = "auto"
    background: Literal["transparent", "opaque", "auto"] = "auto"
    output_format: Literal["png", "jpeg", "jpg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    moderation: str | None = None
    style: str | None = None
    input_fidelity: Literal["high", "low"] | None = None
    user: Annotated[str, Field(max_length=512)] = ""
    safety_identifier: Annotated[str, Field(max_length=512)] = ""

    # Ours, out of `extra_body`.
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED, description="-1 or nothing: random")] | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    scheduler: Annotated[str | None, Field(description="with sampler: its spacing (karras); alone: a sampler")] = None
    strength: float | None = None
    t5: Literal["auto", "keep", "skip"] = "auto"
    reproducible: bool = False
    allow_degraded: bool = False
    step_cache: Literal["off", "light", "strong"] = "off"
    loras: LorasField = []
    safety_checker: SafetyCheckerField = None
    backend: Annotated[str, Field(max_length=64, description="see /api/backends")] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    deadline_s: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _under_one_name(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        given = {name: item for name, item in value.items() if item is not None and (item != "" or name == "prompt")}
        for synonym, name in SYNONYMS.items():
            if synonym not in given:
                continue
            item = given.pop(synonym)
            if given.setdefault(name, item) != item:
                raise InvalidValue(
                    synonym, f"it says {item!r}, but {name} says {given[name]!r}", hint="give one of them"
                )
        return given

    @property
    def format(self) -> PictureFormat:
        """How the pictures are stored and answered."""
        return "jpeg" if self.output_format == "jpg" else self.output_format

    @property
    def told_quality(self) -> str:
        """What the answer calls the quality."""
        return _TOLD_QUALITY.get(self.quality, self.quality)

    @property
    def identifier(self) -> str:
        """Who asks, in the caller's own words."""
        return self.safety_identifier or self.user

    @property
    def sampler_name(self) -> str | None:
        """The sampler as one name, spacing and all."""
        return " ".join(filter(None, (self.sampler, self.scheduler))) or None

    def asked_size(self) -> tuple[int, int] | None:
        """Width and height in pixels; None for the model's own. Raises InvalidValue."""
        if self.size.strip().lower() == "auto":
            if (self.width is None) != (self.height is None):
                raise InvalidValue("size", "width and height go together", hint="give both, or size as WIDTHxHEIGHT")
            return None if self.width is None or self.height is None else (self.width, self.height)
        found = _SIZE.fullmatch(self.size)
        if found is None:
            raise InvalidValue(
                "size", f"{self.size[:40]!r} is not WIDTHxHEIGHT", hint="use auto, or for example 1024x1024"
            )
        return int(found[1]), int(found[2])

    def quality_of_file(self, format: PictureFormat) -> int | None:
        """1 to 100 for jpeg and webp; None where the file has no such choice or the caller made none."""
        return None if self.output_compression is None or format == "png" else max(1, self.output_compression)

    def notes(self, format: PictureFormat) -> list[str]:
        """What the answer says about parameters without effect. Raises UnsupportedParameter for those that need one."""
        if self.background == "transparent":
            raise UnsupportedParameter(
                "background", "the models here draw no transparency", hint="use opaque or auto, or leave it out"
            )
        unknown = self._unknown()
        told = [f"{name[:40]!r} is not known here and was ignored" for name in unknown]
        if self.style is not None:
            told.append("style has no effect: say it in the prompt")
        if self.moderation == "low":
            told.append("moderation has no effect: pictures are not judged here")
        if self.output_compression not in {None, 100} and format == "png":
            told.append("output_compression has no effect on png")
        if self.partial_images and not self.stream:
            told.append("partial_images has no effect without stream")
        if self.quality not in {"auto", "standard", "medium"} and self.steps is not None:
            told.append(f"quality {self.quality!r} has no effect: steps was given")
        if self.size.strip().lower() != "auto" and (self.width is not None or self.height is not None):
            told.append("width and height have no effect: size was given")
        return told

    def _unknown(self) -> list[str]:
        extra = self.model_extra or {}
        for name, value in extra.items():
            known_as = name.partition("[")[0]
            if value in ([], {}, 0):  # switched off
                continue
            if known_as in _UNSUPPORTED:
                raise UnsupportedParameter(known_as[:80], "it cannot be honoured here", hint="leave it out")
            if known_as in _OF_EDITS:
                raise UnsupportedParameter(known_as, "this route takes no pictures", hint="send it to /v1/images/edits")
        return list(extra)


class Generation(Asked):
    """What `/v1/images/generations` is asked."""

    prompt: str


class FromPicture(Asked):
    """What edits and variations share. As JSON, pictures are base64, data URLs, or objects with `image_url`."""

    image: Any = None
    images: Any = None
    mask: Any = None


class Edit(FromPicture):
    """What `/v1/images/edits` is asked."""

    prompt: str


class Variation(FromPicture):
    """What `/v1/images/variations` is asked; without a prompt, the one that the picture was made with is taken."""

    prompt: str = ""


class InputTokens(BaseModel):
    """See `Usage`."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """text_tokens: words, digits and marks of the prompts, as CLIP's tokenizer cuts them before it looks words up.

    image_tokens, output_tokens: squares of 16 px of the input picture and of the finished ones.
    """

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class Image(BaseModel):
    """One finished picture: its bytes, or where they are. seed, id and safety (the checker's verdict) are ours."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str
    seed: int
    id: str
    safety: str


class ImagesAnswer(BaseModel):
    """What the three routes answer. job_id, model, backend, cost_credits, withheld, warnings are ours."""

    model_config = ConfigDict(protected_namespaces=())

    created: int
    data: list[Image]
    background: str
    output_format: str
    quality: str
    size: str
    usage: Usage
    safety_identifier: str | None = None
    job_id: str
    model: str
    backend: str
    cost_credits: float | None = None
    withheld: list[WithheldAnswer] | None = None
    warnings: list[str]


class ModelAnswer(BaseModel):
    """One model. root: what an alias stands for."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "sdfleet"
    root: str


class ModelsAnswer(BaseModel):
    """The models of this server."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class Fault(BaseModel):
    """See `FaultAnswer`."""

    message: str
    type: str
    param: str | None
    code: str | None


class FaultAnswer(BaseModel):
    """How these routes answer a fault."""

    error: Fault


def is_alias(name: str) -> bool:
    """Whether this is one of OpenAI's image models, which stand for the server's default here.

    >>> [is_alias(name) for name in ("dall-e-3", "gpt-image-1", "chatgpt-image-latest", "starter", "gpt-4o")]
    [True, True, True, False, False]
    """
    return _ALIAS.fullmatch(name) is not None


def check_size(width_px: int, height_px: int, *, multiple_px: int = SIDE_MULTIPLE_PX) -> None:
    """Raise InvalidValue, naming the nearest sizes, unless a model with such sides can draw it.

    >>> check_size(1000, 1001)
    Traceback (most recent call last):
    sdfleet.errors.InvalidValue: size: 1000x1001 cannot be drawn: sides are multiples of 8, 16 to 4096 px; the nearest \
are 1000x1000 and 1000x1008
    """
    lowest_px = -(-MIN_SIDE_PX // multiple_px) * multiple_px

    def side(side_px: int) -> tuple[int, int]:
        down = min(MAX_SIDE_PX, max(lowest_px, side_px // multiple_px * multiple_px))
        up = min(MAX_SIDE_PX, max(lowest_px, -(-side_px // multiple_px) * multiple_px))
        return down, up

    widths, heights = side(width_px), side(height_px)
    if widths == (width_px, width_px) and heights == (height_px, height_px):
        return
    nearest = dict.fromkeys(f"{w}x{h}" for w, h in zip(widths, heights, strict=True))
    sides = f"multiples of {multiple_px}, {lowest_px} to {MAX_SIDE_PX} px"
    raise InvalidValue(
        "size",
        f"{width_px}x{height_px} cannot be drawn: sides are {sides}",
        hint=f"the nearest {'is' if len(nearest) == 1 else 'are'} {' and '.join(nearest)}",
    )


def steps_of(quality: Quality, *, card_steps: int) -> int | None:
    """The steps a quality stands for; None for the card's own.

    >>> steps_of("low", card_steps=20), steps_of("hd", card_steps=5), steps_of("auto", card_steps=20)
    (10, 8, None)
    """
    share = SHARE_OF_STEPS[quality]
    return None if share == 1 else max(1, int(card_steps * share + 0.5))


def usage(*, texts: Iterable[str], images: Iterable[Picture | None], sizes: Iterable[tuple[int, int]]) -> Usage:
    """What a job took in and gave out; no one is billed by it. sizes: of the finished pictures."""
    text_tokens = sum(len(_WORDS.findall(text)) for text in texts)
    image_tokens = sum(_tokens(image.width_px, image.height_px) for image in images if image is not None)
    output_tokens = sum(_tokens(*size) for size in sizes)
    return Usage(
        input_tokens=text_tokens + image_tokens,
        input_tokens_details=InputTokens(text_tokens=text_tokens, image_tokens=image_tokens),
        output_tokens=output_tokens,
        total_tokens=text_tokens + image_tokens + output_tokens,
    )


def _tokens(width_px: int, height_px: int) -> int:
    return -(-width_px // _TOKEN_SIDE_PX) * -(-height_px // _TOKEN_SIDE_PX)
