"""What our own routes are asked: one set of fields, with the names that people bring from other programs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator
from starlette.requests import Request

from sdfleet.api.access import caller_of
from sdfleet.api.answering import house_of
from sdfleet.api.bodies import decoded, decoded_mask, from_base64
from sdfleet.api.fetching import fetch_picture, is_url
from sdfleet.api.lora_fields import LorasField, uses_of
from sdfleet.compose import House
from sdfleet.domain import (
    AUTO,
    MAX_SEED,
    ImageRequest,
    Picture,
    PictureFormat,
    SafetyChecker,
    StepCache,
    Submission,
    Webhook,
)
from sdfleet.errors import InvalidValue

MAX_PRIORITY = 100
MAX_DEADLINE_S = 7 * 24 * 3600.0

ReadablePicture = Annotated[str, Field(description="base64, a data URL, or (if the server allows it) an http URL")]


def _switch(value: object) -> object:
    """True and false, as other programs say it; a form has them as words."""
    return {"true": "on", "false": "off"}.get(str(value).lower(), value) if isinstance(value, bool | str) else value


SafetyCheckerField = Annotated[
    SafetyChecker | None,
    BeforeValidator(_switch),
    Field(description="what becomes of a picture that the model's checker flags; less than the server's needs a scope"),
]

SAFETY_CHECKER: TypeAdapter[SafetyChecker | None] = TypeAdapter(SafetyCheckerField)


class WebhookFields(BaseModel):
    """Where the end of the job is told."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(max_length=2083)]
    secret: Annotated[str, Field(max_length=256)] | None = None


class PictureFields(BaseModel):
    """A picture as our own routes are asked for it. What is left out comes from the model's card."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = None
    height: int | None = None
    steps: Annotated[int | None, Field(validation_alias=AliasChoices("steps", "num_inference_steps"))] = None
    guidance: Annotated[
        float | None, Field(validation_alias=AliasChoices("guidance", "guidance_scale", "cfg_scale"))
    ] = None
    seed: Annotated[int | None, Field(ge=-1, le=MAX_SEED, description="-1 or nothing: random")] = None
    n: int = 1
    sampler: Annotated[str | None, Field(validation_alias=AliasChoices("sampler", "scheduler", "sampler_name"))] = None
    image: ReadablePicture | None = None
    mask: ReadablePicture | None = None
    strength: Annotated[float | None, Field(validation_alias=AliasChoices("strength", "denoising_strength"))] = None
    t5: Literal["auto", "keep", "skip"] = "auto"
    reproducible: bool = False
    step_cache: StepCache = "off"
    loras: LorasField = []
    allow_degraded: bool = False
    safety_checker: SafetyCheckerField = None
    backend: str | None = None
    output_format: Literal["png", "jpeg", "jpg", "webp"] = "png"
    quality: Annotated[int | None, Field(ge=1, le=100, description="of jpeg and webp")] = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    deadline_s: Annotated[float | None, Field(gt=0, le=MAX_DEADLINE_S)] = None
    webhook: WebhookFields | str | None = None
    user: Annotated[str, Field(max_length=256)] = ""
    save: Annotated[bool, Field(description="accepted for old clients: pictures are always kept")] = True

    @model_validator(mode="after")
    def _one_size(self) -> PictureFields:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together")
        return self

    @property
    def format(self) -> PictureFormat:
        """How the pictures are stored and answered."""
        return "jpeg" if self.output_format == "jpg" else self.output_format


async def to_submission(request: Request, asked: PictureFields, *, dialect: str, **changed: Any) -> Submission:
    """The submission that these fields mean. Raises a BadRequest that names the field.

    changed: fields of the submission that the route decides.
    """
    house = house_of(request)
    image = None if asked.image is None else await read_picture(house, asked.image, field="image")
    mask = None if asked.mask is None else await read_picture(house, asked.mask, field="mask", as_mask=True)
    if asked.strength is not None and image is None:
        raise InvalidValue("strength", "there is no picture to redraw", hint="send it as image")
    picture = ImageRequest(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        model=model_named(house, asked.model),
        width_px=asked.width,
        height_px=asked.height,
        steps=asked.steps,
        guidance=asked.guidance,
        seed=None if asked.seed == -1 else asked.seed,
        n_images=asked.n,
        sampler=asked.sampler,
        image=image,
        strength=asked.strength,
        mask=mask,
        t5=asked.t5,
        reproducible=asked.reproducible,
        step_cache=asked.step_cache,
        loras=uses_of(asked.loras),
        allow_degraded=asked.allow_degraded,
        safety_checker=asked.safety_checker,
        backend=backend_named(house, asked.backend, model=asked.model),
    )
    facts: dict[str, Any] = {
        "format": asked.format,
        "quality": asked.quality,
        "priority": asked.priority,
        "deadline_s": asked.deadline_s,
        "webhook": _webhook(asked.webhook),
        "label": asked.user,
        "client": client_of(request),
    }
    return Submission(request=picture, caller=caller_of(request), dialect=dialect, **(facts | changed))


def sides_of(width: int | None, height: int | None) -> tuple[int | None, int | None]:
    """Width and height as foreign clients mean them: one alone makes a square, 0 leaves a side open.

    >>> sides_of(512, None), sides_of(0, 512), sides_of(None, 0)
    ((512, 512), (512, 512), (None, None))
    """
    return width or height or None, height or width or None


def model_named(house: House, name: str | None) -> str:
    """The model that is meant: what is left out is the server's default, and `:latest` adds nothing."""
    return house.settings.model if not name else name.removesuffix(":latest")


async def read_picture(house: House, text: str, *, field: str, as_mask: bool = False) -> Picture:
    """The pixels of a picture in a request: base64, data URL, or URL where the server allows it."""
    data = await read_bytes(house, text, field=field)
    return await (decoded_mask if as_mask else decoded)(data, field=field)


async def read_bytes(house: House, text: str, *, field: str) -> bytes:
    """The file of a picture in a request, not looked into yet."""
    if is_url(text):
        return await fetch_picture(text, field=field, settings=house.settings)
    return await asyncio.to_thread(from_base64, text, field=field)


def backend_named(house: House, backend: str | None, *, model: str | None) -> str | None:
    """The backend that is meant: a request that names neither it nor a model is for the server's default alone."""
    named = backend or (house.settings.default_backend if not model else None)
    return None if named == AUTO else named


def client_of(request: Request) -> str:
    """The address of the caller, for logs and traces."""
    return "" if request.client is None else request.client.host


def _webhook(given: WebhookFields | str | None) -> Webhook | None:
    if given is None:
        return None
    return Webhook(url=given) if isinstance(given, str) else Webhook(url=given.url, secret=given.secret)
