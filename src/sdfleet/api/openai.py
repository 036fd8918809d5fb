"""OpenAI's Images API: generations, edits, variations, models. Pictures that are streamed: `openai_stream.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from sdfleet.api.access import caller_of, needs
from sdfleet.api.answering import LargeResponse, house_of, submit, submit_and_wait, withheld_of
from sdfleet.api.asked import backend_named, client_of
from sdfleet.api.bodies import decoded, decoded_alpha_mask, decoded_mask, described, json_body
from sdfleet.api.dialect import BadBody, error_response, field_of, printable
from sdfleet.api.links import signed_link
from sdfleet.api.lora_fields import uses_of
from sdfleet.api.native import MEDIA_TYPES, backend_of, picture_accepted, raw_picture
from sdfleet.api.openai_forms import Files, read
from sdfleet.api.openai_stream import EventStream, Kind, Telling, size_of, spliced, told, usage_of
from sdfleet.api.openai_wire import (
    Asked,
    Edit,
    FaultAnswer,
    Generation,
    Image,
    ImagesAnswer,
    ModelAnswer,
    ModelsAnswer,
    UnsupportedParameter,
    Variation,
    check_size,
    is_alias,
    steps_of,
)
from sdfleet.catalog.store import Entry
from sdfleet.compose import House
from sdfleet.domain import ImageRequest, Job, Picture, PictureFormat, Submission
from sdfleet.errors import (
    BrokenPicture,
    ContentWithheld,
    CreditsNeeded,
    InvalidValue,
    NotAuthenticated,
    NotReady,
    SdfleetError,
    UnknownName,
)
from sdfleet.storage import pictures

# Where we say width and height, these clients said size.
_PARAMETER_OF = {"width": "size", "height": "size"}
# The largest multiple of sides that a family of ours asks for; sizes that fit it fit every model.
_SAFE_MULTIPLE_PX = 32
# What a variation is drawn after when neither the caller nor the picture says.
ANY_PROMPT = "a picture"
# How far a variation or an edit with input_fidelity "high" is redrawn.
HIGH_FIDELITY_STRENGTH = 0.5


class OpenAIDialect:
    """`{"error": {"message", "type", "param", "code"}}`, by whose status the SDKs choose the class they raise."""

    name = "openai"

    def error(self, error: SdfleetError) -> Response:
        status = error.http_status
        code, param = "invalid_value" if isinstance(error, BadBody) else error.code, field_of(error)
        if isinstance(error, UnknownName):
            kind = getattr(error, "kind", "")
            param = param or kind or None
            # Only a model is looked for; any other name that is not known is a bad value.
            status, code = (404, "model_not_found") if kind == "model" else (400, "invalid_value")
        kind_of_error = _type_of(status)
        if isinstance(error, ContentWithheld):
            code, kind_of_error = "moderation_blocked", "image_generation_user_error"
        headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, NotAuthenticated) else {}
        if isinstance(error, CreditsNeeded):
            # As OpenAI says it of its own: a 429 that waiting does not help.
            status, code, kind_of_error = 429, "insufficient_quota", "insufficient_quota"
            headers["x-should-retry"] = "false"
        if param is not None:
            param = param.removeprefix("body.").partition(".")[0]
            param = None if param == "body" else _PARAMETER_OF.get(param, param)
        body = {"error": {"message": str(error), "type": kind_of_error, "param": param, "code": code}}
        return error_response(error, body, status=status, headers=headers)


def _type_of(status: int) -> str:
    named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return named.get(status, "server_error" if status >= 500 else "invalid_request_error")


DIALECT = OpenAIDialect()
FAULTS: dict[int | str, dict[str, Any]] = {
    "default": {"model": FaultAnswer, "description": "What happened and what to do."}
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesAnswer,
        "content": {"text/event-stream": {"schema": {"type": "string"}}, **{kind: {} for kind in MEDIA_TYPES.values()}},
    },
    **FAULTS,
}
router = APIRouter(tags=["openai"], responses=FAULTS)


def _described_twice(model: type[Asked]) -> dict[str, Any]:
    """`openapi_extra` for a body that is a form or JSON."""
    as_form, as_json = described(model, form=True), described(model)
    content = as_form["requestBody"]["content"] | as_json["requestBody"]["content"]
    return {"requestBody": {**as_form["requestBody"], "content": content}}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What came along with the fields: input pictures, and what to tell about how they were read."""

    prompt: str
    image: Picture | None = None
    mask: Picture | None = None
    strength: float | None = None
    notes: tuple[str, ...] = ()


@router.post(
    "/v1/images/generations",
    dependencies=[needs("generate")],
    response_model=ImagesAnswer,
    responses=_ANSWERS,
    openapi_extra=described(Generation),
)
async def generations(request: Request, asked: Annotated[Generation, Depends(json_body(Generation))]) -> Response:
    """Pictures from a prompt: JSON, events with `stream`, or the picture itself for `Accept: image/png` or its like."""
    return await _answer(request, asked, _Given(prompt=asked.prompt), kind="image_generation")


@router.post(
    "/v1/images/edits",
    dependencies=[needs("generate")],
    response_model=ImagesAnswer,
    responses=_ANSWERS,
    openapi_extra=_described_twice(Edit),
)
async def edits(request: Request) -> Response:
    """A picture drawn anew after a prompt; with a mask, only where the mask is transparent. Form or JSON."""
    asked, files = await read(request, Edit)
    given = await _given(files, prompt=asked.prompt, strength=asked.strength)
    if given.strength is None and asked.input_fidelity == "high" and given.mask is None:
        note = f"input_fidelity 'high' was taken as strength {HIGH_FIDELITY_STRENGTH:g}"
        given = replace(given, strength=HIGH_FIDELITY_STRENGTH, notes=(*given.notes, note))
    return await _answer(request, asked, given, kind="image_edit")


@router.post(
    "/v1/images/variations",
    dependencies=[needs("generate")],
    response_model=ImagesAnswer,
    responses=_ANSWERS,
    openapi_extra=_described_twice(Variation),
)
async def variations(request: Request) -> Response:
    """Pictures like another one, each with its own seed. Without a prompt, the one noted in the picture is taken."""
    asked, files = await read(request, Variation)
    given = await _given(files, prompt=asked.prompt, strength=asked.strength)
    if not asked.prompt:
        noted = await asyncio.to_thread(_noted_prompt, files.images[0])
        note = "the prompt was read from the picture" if noted else f"without a prompt, {ANY_PROMPT!r} was drawn"
        given = replace(given, prompt=noted or ANY_PROMPT, notes=(*given.notes, note))
    return await _answer(request, asked, given, kind="image_edit")


@router.get("/v1/models")
async def models(request: Request) -> ModelsAnswer:
    """The models of this server; any key may see them."""
    entries = await asyncio.to_thread(house_of(request).catalog.entries)
    found = await asyncio.to_thread(lambda: [_model(entry) for entry in entries])
    names = {one.id for one in found}
    beside = [ModelAnswer(id=one.name, root=one.name) for one in house_of(request).language.models()]
    return ModelsAnswer(data=[*found, *(one for one in beside if one.id not in names)])


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> ModelAnswer:
    """One model; OpenAI's names answer too, `root` says what they stand for here."""
    try:
        entry = await asyncio.to_thread(_entry, house_of(request), name)
    except (UnknownName, NotReady):
        if (beside := house_of(request).language.find(name)) is None:
            raise
        return ModelAnswer(id=name, root=beside.name)
    found = await asyncio.to_thread(_model, entry)
    return found.model_copy(update={"id": name})


def _model(entry: Entry) -> ModelAnswer:
    folder = Path(entry.folder)
    created = int(folder.stat().st_mtime) if folder.exists() else 0
    return ModelAnswer(id=entry.card.name, created=created, root=entry.card.name)


def _entry(house: House, name: str | None) -> Entry:
    """The checkpoint that is meant: OpenAI's names mean the default, unless a checkpoint here is called so."""
    default = house.settings.model
    named = (name or default).removesuffix(":latest")
    try:
        return house.catalog.resolve(named)
    except UnknownName:
        if not is_alias(named):
            raise
        return house.catalog.resolve(default)


# --------------------------------------------------------------------------------------------- what came in, to a job


async def _answer(request: Request, asked: Asked, given: _Given, *, kind: Kind) -> Response:
    """Submit what was asked and answer with it: as events, as one picture, or as JSON."""
    house = house_of(request)
    raw = None if asked.stream or asked.n != 1 else picture_accepted(request.headers.get("accept", ""))
    format = raw if raw is not None and "output_format" not in asked.model_fields_set else asked.format
    submission, notes = await asyncio.to_thread(_submission, house, asked, given, format)
    submission = replace(submission, caller=caller_of(request), client=client_of(request))
    if asked.stream:
        house.readiness.check()
        job = await submit(request, submission)
        telling = Telling(asked=asked, submission=submission, notes=notes, kind=kind, fault_of=_fault_of)
        return EventStream(told(request, job, telling))
    job = await submit_and_wait(request, submission)
    if raw is not None:
        return await raw_picture(house, job)
    return await _as_json(request, asked, submission, job, notes=notes)


def _submission(house: House, asked: Asked, given: _Given, format: PictureFormat) -> tuple[Submission, list[str]]:
    """The submission without its caller, and what the answer should tell. Blocks: cards and folders are read."""
    notes = [*asked.notes(format), *given.notes]
    size = asked.asked_size()
    entry = _entry(house, asked.model)
    if size is not None:
        check_size(*size)
        if not entry.card.resizes and any(side_px % _SAFE_MULTIPLE_PX for side_px in size):
            check_size(*size, multiple_px=house.catalog.inspect(entry).side_multiple_px)
    steps = asked.steps
    if steps is None:
        steps = steps_of(asked.quality, card_steps=entry.card.steps)
        if steps is not None:
            notes.append(
                f"quality {asked.quality!r} was drawn in {steps} steps; {entry.card.name} takes {entry.card.steps}"
            )
    if asked.strength is not None and given.image is None:
        raise UnsupportedParameter("strength", "there is no picture to redraw", hint="send one to /v1/images/edits")
    if asked.input_fidelity is not None and given.image is None:
        notes.append("input_fidelity has no effect without an input picture")
    picture = ImageRequest(
        prompt=given.prompt,
        negative_prompt=asked.negative_prompt,
        model=entry.card.name,
        width_px=None if size is None else size[0],
        height_px=None if size is None else size[1],
        steps=steps,
        guidance=asked.guidance,
        seed=None if asked.seed == -1 else asked.seed,
        n_images=asked.n,
        sampler=asked.sampler_name,
        image=given.image,
        strength=given.strength,
        mask=given.mask,
        t5=asked.t5,
        reproducible=asked.reproducible,
        allow_degraded=asked.allow_degraded,
        step_cache=asked.step_cache,
        loras=uses_of(asked.loras),
        safety_checker=asked.safety_checker,
        backend=backend_named(house, asked.backend, model=asked.model),
    )
    submission = Submission(
        request=picture,
        dialect=DIALECT.name,
        priority=asked.priority,
        deadline_s=asked.deadline_s,
        format=format,
        quality=asked.quality_of_file(format),
        label=asked.identifier,
        wants_previews=asked.stream and asked.partial_images > 0,
    )
    return submission, notes


async def _given(files: Files, *, prompt: str, strength: float | None) -> _Given:
    """The input pictures as pixels. Raises a BadRequest that names the field."""
    if not files.images:
        raise InvalidValue("image", "it is missing", hint="send a file named image, or base64 or a data URL as JSON")
    if len(files.images) > 1:
        raise UnsupportedParameter(
            "image", f"{len(files.images)} pictures came, the models here take one", hint="send the one to be redrawn"
        )
    image = await decoded(files.images[0], field="image")
    mask, notes = None, files.notes
    if files.mask is not None:
        mask, how = await _mask_of(files.mask)
        notes += how
    return _Given(prompt=prompt, image=image, mask=mask, strength=strength, notes=notes)


async def _mask_of(data: bytes) -> tuple[Picture, tuple[str, ...]]:
    """The mask, and what to tell about it: clear is drawn anew; a file without transparency is black and white."""
    try:
        return await decoded_alpha_mask(data, field="mask"), ()
    except BrokenPicture:
        # It says the same of itself if it is no picture at all.
        mask = await decoded_mask(data, field="mask")
    return mask, ("the mask has no transparency: its white part was drawn anew",)


def _noted_prompt(data: bytes) -> str:
    """The prompt a picture was made with, if it says so."""
    metadata = pictures.read_metadata(data)
    return "" if metadata is None else metadata.prompt


# ------------------------------------------------------------------------------------------------- a job, to an answer


async def _as_json(
    request: Request, asked: Asked, submission: Submission, job: Job, *, notes: Sequence[str]
) -> Response:
    house = house_of(request)
    is_link = asked.response_format == "url"
    contents = [] if is_link else [await house.desk.picture(output) for output in job.outputs]
    answer = ImagesAnswer(
        created=int(job.finished_s or job.created_s),
        data=[
            Image(
                url=signed_link(request, output) if is_link else None,
                revised_prompt=job.request.prompt,
                seed=output.seed,
                id=output.id,
                safety=output.safety,
            )
            for output in job.outputs
        ],
        background="opaque",
        output_format=submission.format,
        quality=asked.told_quality,
        size=size_of(job),
        usage=usage_of(submission, job.outputs),
        safety_identifier=asked.identifier or None,
        job_id=job.id,
        model=job.request.model,
        backend=await backend_of(house, job),
        cost_credits=job.cost_credits,
        withheld=withheld_of(job) or None,
        warnings=[*notes, *job.warnings],
    )
    body = await asyncio.to_thread(_spelled, answer, contents)
    return LargeResponse(body, media_type="application/json", headers={"X-Job-Id": job.id})


def _spelled(answer: ImagesAnswer, contents: Sequence[bytes]) -> bytes:
    """The answer as JSON, with the pictures put in as base64. Blocks for milliseconds per megabyte."""
    fields = answer.model_dump(exclude_none=True)
    items = fields.pop("data")
    if contents:
        parts = [spliced(item, "b64_json", content) for item, content in zip(items, contents, strict=True)]
    else:
        parts = [json.dumps(printable(item)).encode() for item in items]
    return json.dumps(printable(fields)).encode()[:-1] + b', "data": [' + b", ".join(parts) + b"]}"


def _fault_of(error: SdfleetError) -> bytes:
    """The body of the answer to a fault, for a stream whose status has been sent."""
    return bytes(DIALECT.error(error).body)
