"""What the page asks beside jobs and pictures: samplers, lengths of prompts, favourites, and how a picture was made."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import house_of
from sdfleet.api.asked import model_named, read_bytes
from sdfleet.api.bodies import described, json_body
from sdfleet.api.jobs import found_output
from sdfleet.api.lora_fields import LoraFields
from sdfleet.api.native import FAULTS
from sdfleet.domain import MAX_PROMPT_CHARS, TokenCount
from sdfleet.engine.sampler_names import a1111_label, known_samplers, parse_sampler
from sdfleet.engine.token_counts import count_tokens
from sdfleet.errors import BrokenPicture, InvalidValue, PromptSyntax, UnknownName
from sdfleet.storage import pictures
from sdfleet.storage.infotext import Metadata

router = APIRouter(tags=["page"], responses=FAULTS)


class SamplerAnswer(BaseModel):
    """A sampler by the name that requests carry, and as people write it."""

    name: str
    label: str


class SamplersAnswer(BaseModel):
    """All samplers, the plain ones first."""

    samplers: list[SamplerAnswer]


class TokensAsked(BaseModel):
    """Prompts in the making, and for which model."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""


class EncoderAnswer(BaseModel):
    """What one text encoder reads: tokens, and the windows of so many that they fill. Nothing is ever cut off."""

    encoder: str
    tokens: int
    window: int
    chunks: int


class TokensAnswer(BaseModel):
    """For each prompt, the encoders whose tokenizers are on this machine."""

    prompt: list[EncoderAnswer]
    negative_prompt: list[EncoderAnswer]


class PictureAsked(BaseModel):
    """A picture of this server or of any program: base64 or a data URL."""

    model_config = ConfigDict(extra="forbid")

    image: str


class MetadataAnswer(BaseModel):
    """How a picture was made, as far as it says so. source: who wrote it; none: it says nothing.

    The fields have the names and values that `/api/jobs` takes.
    """

    model_config = ConfigDict(protected_namespaces=())

    source: Literal["sdfleet", "a1111", "none"]
    prompt: str = ""
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: str | None = Field(default=None, description="as text: it may be longer than a number of a browser")
    sampler: str | None = None
    strength: float | None = None
    task: str | None = None
    loras: list[LoraFields] = []
    warnings: list[str] = []


@router.get("/api/samplers")
async def samplers(request: Request) -> SamplersAnswer:
    """The samplers that a request can name."""
    check_right(caller_of(request), "read")
    return SamplersAnswer(samplers=[SamplerAnswer(name=name, label=a1111_label(name)) for name in known_samplers()])


@router.post("/api/tokens", openapi_extra=described(TokensAsked))
async def tokens(request: Request, asked: Annotated[TokensAsked, Depends(json_body(TokensAsked))]) -> TokensAnswer:
    """How long prompts are, for each text encoder of a model."""
    check_right(caller_of(request), "read")
    house = house_of(request)

    def count(text: str, field: str) -> list[EncoderAnswer]:
        try:
            return [_encoder(count) for count in count_tokens(entry.folder, entry.card.family, text)]
        except PromptSyntax as exc:
            raise InvalidValue(field, exc.message, hint=exc.hint) from exc

    entry = await asyncio.to_thread(house.catalog.resolve, model_named(house, asked.model))
    return TokensAnswer(
        prompt=await asyncio.to_thread(count, asked.prompt, "prompt"),
        negative_prompt=await asyncio.to_thread(count, asked.negative_prompt, "negative_prompt"),
    )


@router.post("/api/metadata", openapi_extra=described(PictureAsked))
async def metadata(
    request: Request, asked: Annotated[PictureAsked, Depends(json_body(PictureAsked))]
) -> MetadataAnswer:
    """How a picture was made, out of its file: ours, or one with AUTOMATIC1111's line of settings."""
    check_right(caller_of(request), "read")
    data = await read_bytes(house_of(request), asked.image, field="image")
    return await _read(data)


@router.get("/api/outputs/{output_id}/metadata")
async def output_metadata(request: Request, output_id: str) -> MetadataAnswer:
    """How a finished picture was made; also when its job is long forgotten."""
    output = await found_output(request, output_id)
    return await _read(await house_of(request).desk.picture(output))


@router.put(
    "/api/outputs/{output_id}/favourite", status_code=204, response_class=Response, dependencies=[needs("generate")]
)
async def mark(request: Request, output_id: str) -> Response:
    """Make a finished picture a favourite: it is never removed for its age."""
    output = await found_output(request, output_id)
    await house_of(request).store.mark(output.id, is_favourite=True)
    return Response(status_code=204)


@router.delete(
    "/api/outputs/{output_id}/favourite", status_code=204, response_class=Response, dependencies=[needs("generate")]
)
async def unmark(request: Request, output_id: str) -> Response:
    """Make a finished picture a favourite no more."""
    output = await found_output(request, output_id)
    await house_of(request).store.mark(output.id, is_favourite=False)
    return Response(status_code=204)


def _encoder(count: TokenCount) -> EncoderAnswer:
    return EncoderAnswer(encoder=count.encoder, tokens=count.n_tokens, window=count.window, chunks=count.n_chunks)


async def _read(data: bytes) -> MetadataAnswer:
    try:
        found = await asyncio.to_thread(pictures.read_metadata, data)
    except BrokenPicture as exc:
        raise InvalidValue("image", exc.message, hint=exc.hint) from exc
    return MetadataAnswer(source="none") if found is None else _answer(found)


def _answer(found: Metadata) -> MetadataAnswer:
    return MetadataAnswer(
        source=found.source,
        prompt=found.prompt,
        negative_prompt=found.negative_prompt,
        model=found.model,
        width=found.width_px,
        height=found.height_px,
        steps=found.steps,
        guidance=found.guidance,
        seed=None if found.seed is None else str(found.seed),
        sampler=_sampler(found.sampler),
        strength=found.strength,
        task=found.task,
        loras=[LoraFields(name=lora.name, scale=lora.scale, text_scale=lora.text_scale) for lora in found.loras],
        warnings=list(found.warnings),
    )


def _sampler(name: str | None) -> str | None:
    """Our id of the sampler that a picture names; None for one of another program that we do not have."""
    try:
        return None if name is None else str(parse_sampler(name))
    except (UnknownName, InvalidValue):
        return None
