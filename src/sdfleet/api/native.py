"""Our own simple routes: `/generate`, `/api/txt2img`, `/api/img2img`, `/api/backends`."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import WithheldAnswer, as_json, house_of, submit_and_wait, withheld_of
from sdfleet.api.asked import PictureFields, SafetyCheckerField, sides_of, to_submission
from sdfleet.api.bodies import described, json_body
from sdfleet.api.dialect import BadBody, error_response, field_of
from sdfleet.api.lora_fields import LorasField
from sdfleet.backends.choice import own_id
from sdfleet.compose import House
from sdfleet.domain import AUTO, Job, PictureFormat
from sdfleet.errors import BadRequest, CheckpointError, InvalidValue, NotAuthenticated, SdfleetError, UnknownName

MEDIA_TYPES: dict[PictureFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Fault(BaseModel):
    """How these routes answer a fault: what happened and what to do, in one line, and for programs."""

    error: str
    code: str
    field: str | None = None
    hint: str = ""
    detail: list[dict[str, Any]] | None = None


FAULTS: dict[int | str, dict[str, Any]] = {"default": {"model": Fault, "description": "What happened and what to do."}}


SIMPLE_FAULTS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What happened and what to do.",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["detail"], "properties": {"detail": {}}}}
        },
    }
}
# What an answer with a picture's file looks like to OpenAPI.
PICTURE: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}}, **FAULTS}


class NativeDialect:
    """`{"error": "...", "code", "field", "hint"}`; `error` is what Ollama's clients show."""

    name = "native"

    def error(self, error: SdfleetError) -> Response:
        body: dict[str, Any] = {"error": str(error), "code": error.code, "field": field_of(error), "hint": error.hint}
        if isinstance(error, BadBody) and error.issues:
            body["detail"] = list(error.issues)
        headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, NotAuthenticated) else None
        return error_response(error, body, headers=headers)


class SimpleDialect:
    """`{"detail": ...}` as FastAPI services answer: 422 with a list for a bad field, else one line."""

    name = "simple"

    def error(self, error: SdfleetError) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, NotAuthenticated) else None
        if isinstance(error, BadRequest) and error.http_status == BadRequest.http_status:
            issues = list(error.issues) if isinstance(error, BadBody) else []
            loc = ["body", field] if (field := field_of(error)) is not None else ["body"]
            detail: Any = issues or [{"loc": loc, "msg": str(error), "type": error.code}]
            return error_response(error, {"detail": detail}, status=422, headers=headers)
        return error_response(error, {"detail": str(error), "code": error.code}, headers=headers)


DIALECT = NativeDialect()
SIMPLE_DIALECT = SimpleDialect()
router = APIRouter(tags=["native"])


class OnePicture(BaseModel):
    """What `/generate` is asked."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    prompt: str
    negative_prompt: str = ""
    num_inference_steps: Annotated[int, Field(ge=1, le=150)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=20)] | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str | None = None
    allow_degraded: bool = False
    safety_checker: SafetyCheckerField = None
    loras: LorasField = []
    backend: str | None = None


class PictureAnswer(BaseModel):
    """What `/generate` answers. generation_time: seconds of drawing alone. seed: the one that was used.

    safety: passed, flagged, off or none, see docs/safety.md.
    """

    model_config = ConfigDict(protected_namespaces=())

    image_base64: str
    generation_time: float
    seed: int
    width: int
    height: int
    model: str
    backend: str
    job_id: str
    safety: str
    warnings: list[str]


@router.post(
    "/generate",
    dependencies=[needs("generate")],
    openapi_extra=described(OnePicture),
    response_model=PictureAnswer,
    responses=SIMPLE_FAULTS,
)
async def generate(request: Request, asked: Annotated[OnePicture, Depends(json_body(OnePicture))]) -> Response:
    """One picture, in the answer."""
    width, height = sides_of(asked.width, asked.height)
    fields = PictureFields(
        prompt=asked.prompt, negative_prompt=asked.negative_prompt, model=asked.model, seed=_seed(asked.seed),
        width=width, height=height, steps=asked.num_inference_steps, guidance=asked.guidance_scale,
        allow_degraded=asked.allow_degraded, safety_checker=asked.safety_checker, loras=asked.loras,
        backend=asked.backend,
    )  # fmt: skip
    job = await submit_and_wait(request, await to_submission(request, fields, dialect=SIMPLE_DIALECT.name))
    output = job.outputs[0]
    answer = PictureAnswer(
        image_base64=(await as_base64(house_of(request), job))[0],
        generation_time=drawing_s(job),
        seed=output.seed,
        width=output.width_px,
        height=output.height_px,
        model=job.request.model,
        backend=await backend_of(house_of(request), job),
        job_id=job.id,
        safety=output.safety,
        warnings=list(job.warnings),
    )
    return await as_json(answer)


def _seed(seed: int | None) -> int | None:
    if seed is not None and not -1 <= seed < 2**64:
        raise InvalidValue("seed", f"{seed} does not fit 64 bits", hint="use 0 to 18446744073709551615")
    return seed


class ImageAnswer(BaseModel):
    """One picture of an answer. safety: passed, flagged, off or none."""

    b64_json: str
    seed: int
    url: str
    safety: str


class ImagesAnswer(BaseModel):
    """What `/api/txt2img` and `/api/img2img` answer. timings: seconds by phase.

    cost_credits: what a service charged for all of them, as it said.
    """

    model_config = ConfigDict(protected_namespaces=())

    images: list[ImageAnswer]
    backend: str
    model: str
    job_id: str
    timings: dict[str, float]
    cost_credits: float | None
    withheld: list[WithheldAnswer]
    warnings: list[str]


_PICTURE_OR_JSON: dict[int | str, dict[str, Any]] = {
    200: {"model": ImagesAnswer, "content": {kind: {} for kind in MEDIA_TYPES.values()}},
    **FAULTS,
}


@router.post(
    "/api/txt2img",
    dependencies=[needs("generate")],
    openapi_extra=described(PictureFields),
    response_model=ImagesAnswer,
    responses=_PICTURE_OR_JSON,
)
async def txt2img(request: Request, asked: Annotated[PictureFields, Depends(json_body(PictureFields))]) -> Response:
    """Pictures from a prompt. With `Accept: image/png` (jpeg, webp) the first picture itself is the answer."""
    return await _pictures(request, asked)


@router.post(
    "/api/img2img",
    dependencies=[needs("generate")],
    openapi_extra=described(PictureFields),
    response_model=ImagesAnswer,
    responses=_PICTURE_OR_JSON,
)
async def img2img(request: Request, asked: Annotated[PictureFields, Depends(json_body(PictureFields))]) -> Response:
    """Pictures from another picture: `image`, and a `mask` whose white part is drawn anew."""
    if asked.image is None:
        raise InvalidValue("image", "it is missing", hint="send the picture as base64, or use /api/txt2img")
    return await _pictures(request, asked)


async def _pictures(request: Request, asked: PictureFields) -> Response:
    house = house_of(request)
    wanted = picture_accepted(request.headers.get("accept", ""))
    changed = {} if wanted is None else {"format": wanted}
    job = await submit_and_wait(request, await to_submission(request, asked, dialect=DIALECT.name, **changed))
    if wanted is not None:
        return await raw_picture(house, job)
    texts = await as_base64(house, job)
    answer = ImagesAnswer(
        images=[
            ImageAnswer(b64_json=text, seed=output.seed, url=f"/api/outputs/{output.id}", safety=output.safety)
            for text, output in zip(texts, job.outputs, strict=True)
        ],
        backend=await backend_of(house, job),
        model=job.request.model,
        job_id=job.id,
        timings=dict(job.timings_s),
        cost_credits=job.cost_credits,
        withheld=withheld_of(job),
        warnings=list(job.warnings),
    )
    return await as_json(answer)


class BackendAnswer(BaseModel):
    """One way to make pictures, and why it cannot be used if it cannot."""

    id: str
    engine: str
    available: bool
    reason: str
    models: list[str]
    default: bool


@router.get("/api/backends", responses=FAULTS)
async def backends(request: Request) -> list[BackendAnswer]:
    """What can make pictures here."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    await house.runtime.backends.look()
    return await asyncio.to_thread(_backends, house)


def _backends(house: House) -> list[BackendAnswer]:
    backends = house.runtime.backends
    entries = house.catalog.entries()
    default: str = house.settings.default_backend
    if default == AUTO:
        default = _default_of(house, house.settings.model)
    answers = []
    for standing in backends.standings():
        models = backends.models_of(standing.id, entries)
        reason = standing.reason
        if not models and not reason:
            reason = "no model that it draws is here: sdfleet models pull, or import"
        answers.append(
            BackendAnswer(
                id=standing.id,
                engine=standing.engine,
                available=not reason,
                reason=reason,
                models=models,
                default=standing.id == default,
            )
        )
    return answers


def _default_of(house: House, model: str) -> str:
    """What draws a model where nobody says so; nothing where there is no such model."""
    try:
        card = house.catalog.resolve(model).card
    except (UnknownName, CheckpointError):
        return ""
    return card.backend or own_id(card)


async def backend_of(house: House, job: Job) -> str:
    """Which backend drew a job."""
    if found := job.backend or job.request.backend:
        return found
    return await asyncio.to_thread(_default_of, house, job.request.model)


def picture_accepted(accept: str) -> PictureFormat | None:
    """The picture format that an Accept header asks for before anything else.

    >>> picture_accepted("image/png"), picture_accepted("application/json, */*"), picture_accepted("image/webp;q=0.9")
    ('png', None, 'webp')
    """
    first = accept.partition(",")[0].partition(";")[0].strip().lower()
    return next((name for name, kind in MEDIA_TYPES.items() if kind == first), None)


async def raw_picture(house: House, job: Job) -> Response:
    """The first picture of a job as the whole answer."""
    output = job.outputs[0]
    headers = {
        "X-Job-Id": job.id,
        "X-Seed": str(output.seed),
        "X-Generation-Time": str(round(drawing_s(job) * 1000)),
        "X-Model": job.request.model,
        "X-Backend": await backend_of(house, job),
        "X-Safety": output.safety,
    }
    return Response(await house.desk.picture(output), media_type=MEDIA_TYPES[output.format], headers=headers)


async def as_base64(house: House, job: Job) -> list[str]:
    """The pictures of a job as base64, in their order."""
    contents = [await house.desk.picture(output) for output in job.outputs]
    return await asyncio.to_thread(lambda: [base64.b64encode(content).decode() for content in contents])


def drawing_s(job: Job) -> float:
    """Seconds of drawing alone, without waiting."""
    return round(sum(job.timings_s.get(phase, 0.0) for phase in ("encode", "denoise", "decode")), 4)
