"""The shape of Black Forest Labs' API: submit, poll, fetch. Code for api.bfl.ai works after a change of address.

The names of their models stand for ours of the same name, or for the default model where there is none. Every job ends
in `Ready` or `Error`: some clients wait for ever on the other words.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import house_of, submit
from sdfleet.api.asked import client_of, read_picture, sides_of
from sdfleet.api.bodies import described, json_body
from sdfleet.api.dialect import BadBody, error_response, field_of
from sdfleet.api.links import signed_link
from sdfleet.compose import House
from sdfleet.domain import ImageRequest, JobId, JobStatus, Submission, Webhook
from sdfleet.errors import (
    BadRequest,
    CheckpointNotFound,
    InvalidValue,
    NotAuthenticated,
    NotFound,
    SdfleetError,
    UnknownName,
)

# Their endpoints, and the card of ours that is the same model; the others are drawn by the default model.
OURS: dict[str, str] = {
    "flux-dev": "flux-dev",
    "flux-2-klein-4b": "flux2-klein-4b",
}
MAX_WEBHOOK_CHARS = 2083
# Sides of a picture asked for by its ratio: about a megapixel, as theirs.
AREA_PX = 1024 * 1024
MULTIPLE_PX = 32
FAULTS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What happened and what to do.",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["detail"], "properties": {"detail": {}}}}
        },
    }
}


class BflDialect:
    """`{"detail": [...]}` with 422 for bad fields, `{"detail": "..."}` else; no key is 403, as theirs."""

    name = "bfl"

    def error(self, error: SdfleetError) -> Response:
        if isinstance(error, NotAuthenticated):
            return error_response(error, {"detail": str(error)}, status=403)
        if isinstance(error, BadRequest) and error.http_status == BadRequest.http_status:
            issues = list(error.issues) if isinstance(error, BadBody) else []
            loc = ["body", field] if (field := field_of(error)) is not None else ["body"]
            detail = issues or [{"loc": loc, "msg": str(error), "type": error.code}]
            return error_response(error, {"detail": detail}, status=422)
        return error_response(error, {"detail": str(error)})


DIALECT = BflDialect()
router = APIRouter(tags=["bfl"], responses=FAULTS)


class Asked(BaseModel):
    """A picture as their clients ask for it; every endpoint takes the same fields and ignores others."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    prompt: str = ""
    width: Annotated[int | None, Field(ge=0)] = None
    height: Annotated[int | None, Field(ge=0)] = None
    aspect_ratio: Annotated[str | None, Field(pattern=r"^\d{1,2}:\d{1,2}$")] = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    image_prompt: str | None = None
    input_image: str | None = None
    image: str | None = None
    mask: str | None = None
    output_format: Literal["jpeg", "png", "webp"] | None = None
    prompt_upsampling: bool | None = None
    safety_tolerance: Annotated[int, Field(ge=0, le=6)] | None = None
    webhook_url: Annotated[str | None, Field(min_length=1, max_length=MAX_WEBHOOK_CHARS)] = None
    webhook_secret: Annotated[str | None, Field(max_length=256)] = None


class Submitted(BaseModel):
    """Where to ask for the picture."""

    id: str
    polling_url: str


@router.post("/v1/flux-{kind}", dependencies=[needs("generate")], openapi_extra=described(Asked))
async def submit_flux(
    request: Request,
    kind: Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9.-]{0,40}$")],
    asked: Annotated[Asked, Depends(json_body(Asked))],
) -> Submitted:
    """A job; ask for its picture at `polling_url`."""
    house = house_of(request)
    submission = await _submission(request, asked, model=await _model(house, f"flux-{kind}"))
    job = await submit(request, submission)
    base = (house.settings.public_url or str(request.base_url)).rstrip("/")
    return Submitted(id=job.id, polling_url=f"{base}/v1/get_result?id={job.id}")


async def _model(house: House, name: str) -> str:
    """Our model of that name, else the default one."""
    try:
        card = (await asyncio.to_thread(house.catalog.resolve, OURS.get(name, name))).card
    except (UnknownName, CheckpointNotFound):
        return house.settings.model
    # The path alone is no word that the prompt may be sent to the service whose paths these are.
    is_service = card.backend is not None and card.backend != house.settings.default_backend
    return house.settings.model if is_service else card.name


async def _submission(request: Request, asked: Asked, *, model: str) -> Submission:
    house = house_of(request)
    given = next(
        ((name, text) for name in ("input_image", "image", "image_prompt") if (text := getattr(asked, name))), None
    )
    image = None if given is None else await read_picture(house, given[1], field=given[0])
    mask = None if not asked.mask else await read_picture(house, asked.mask, field="mask", as_mask=True)
    width, height = sides_of(asked.width, asked.height)
    if width is None and asked.aspect_ratio is not None:
        width, height = _sides(asked.aspect_ratio)
    picture = ImageRequest(
        prompt=asked.prompt,
        model=model,
        width_px=width,
        height_px=height,
        steps=asked.steps,
        guidance=asked.guidance,
        seed=None if asked.seed is None or asked.seed < 0 else asked.seed,
        image=image,
        mask=mask,
    )
    webhook = None if asked.webhook_url is None else Webhook(url=asked.webhook_url, secret=asked.webhook_secret)
    return Submission(
        request=picture,
        caller=caller_of(request),
        dialect=DIALECT.name,
        client=client_of(request),
        format=asked.output_format or "jpeg",
        webhook=webhook,
    )


def _sides(ratio: str) -> tuple[int, int]:
    """Width and height of about a megapixel.

    >>> _sides("1:1"), _sides("16:9")
    ((1024, 1024), (1376, 768))
    """
    across, down = (int(part) for part in ratio.split(":"))
    if not across or not down or not 1 / 7 <= across / down <= 7:
        raise InvalidValue("aspect_ratio", f"{ratio} is not between 1:7 and 7:1")
    width = (AREA_PX * across / down) ** 0.5
    return round(width / MULTIPLE_PX) * MULTIPLE_PX, round(width * down / across / MULTIPLE_PX) * MULTIPLE_PX


class Result(BaseModel):
    """How a job stands. result.sample: a link to the picture, good for an hour."""

    id: str
    status: Literal["Pending", "Ready", "Error", "Task not found"]
    result: dict[str, Any] | None = None
    progress: float | None = None
    details: dict[str, Any] | None = None
    preview: dict[str, Any] | None = None


@router.get("/v1/get_result", responses={200: {"model": Result}, 404: {"model": Result}})
async def result(request: Request, id: Annotated[str, Query(max_length=64)]) -> Response:  # noqa: A002 - their name
    """How a job stands."""
    caller = caller_of(request)
    owner = None if "manage" in caller.scopes else caller.owner
    try:
        status = await house_of(request).desk.status(JobId(id), owner=owner)
    except NotFound:
        return JSONResponse(Result(id=id, status="Task not found").model_dump(), status_code=404)
    return JSONResponse(_result(request, status).model_dump())


def _result(request: Request, status: JobStatus) -> Result:
    job = status.job
    match job.state:
        case "done":
            output = job.outputs[0]
            found = {
                "sample": signed_link(request, output),
                "prompt": job.request.prompt,
                "model": job.request.model,
                "seed": output.seed,
                "safety": output.safety,
                "start_time": job.started_s,
                "end_time": job.finished_s,
                "duration": round((job.finished_s or 0.0) - (job.started_s or 0.0), 3),
            }
            return Result(id=job.id, status="Ready", result=found, progress=1.0)
        case "failed" | "cancelled":
            return Result(id=job.id, status="Error", details=dict(job.error or {}))
        case "queued" | "running":
            progress = status.step / status.n_steps if status.n_steps else 0.0
            return Result(id=job.id, status="Pending", progress=round(progress, 3))


@router.get("/v1/credits")
async def credits(request: Request) -> dict[str, float]:  # noqa: A001 - their name
    """Pictures cost nothing here; some clients ask before they draw."""
    check_right(caller_of(request), "read")
    return {"credits": 1_000_000.0}
