"""Jobs without waiting: submit, look, listen, cancel, try again; and every finished picture by its id."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import WithheldAnswer, house_of, submit, withheld_of
from sdfleet.api.asked import PictureFields, to_submission
from sdfleet.api.bodies import described, json_body
from sdfleet.api.lora_fields import LoraFields, fields_of
from sdfleet.api.native import DIALECT, FAULTS, MEDIA_TYPES, PICTURE
from sdfleet.domain import Caller, Job, JobEvent, JobId, JobState, JobStatus, Output, OutputId, OwnerId
from sdfleet.errors import NotFound
from sdfleet.storage import pictures

__all__ = ["DIALECT", "router"]

router = APIRouter(tags=["jobs"], responses=FAULTS)

HEARTBEAT_S = 15
THUMBNAIL_SIDE_PX = 256
# Outputs never change: a browser may keep them as long as it likes, but nobody between may.
CACHE = "private, max-age=31536000, immutable"

StateName = Literal["queued", "running", "done", "failed", "cancelled"]


class ProgressAnswer(BaseModel):
    """Steps over all pictures of the job."""

    step: int
    steps: int


class OutputAnswer(BaseModel):
    """One finished picture; `url` is a path on this server. safety: passed, flagged, off or none.

    prompt: its first 500 characters. created: seconds since 1970.
    """

    model_config = ConfigDict(protected_namespaces=())

    id: str
    job_id: str
    model: str
    prompt: str
    created: float
    favourite: bool
    url: str
    thumbnail_url: str
    seed: int
    width: int
    height: int
    format: str
    n_bytes: int
    safety: str


class JobAnswer(BaseModel):
    """A job. Times are seconds since 1970. error: `{"code", "message", "hint"}` when failed or cancelled.

    node: the machine of a fleet that drew it. why: there and not elsewhere, or why it waits.
    backend: what draws it; empty where that is not decided yet. cost_credits: what a service charged, as it said.
    """

    model_config = ConfigDict(protected_namespaces=())

    id: str
    state: StateName
    model: str
    prompt: str
    negative_prompt: str
    seed: int
    n: int
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    loras: list[LoraFields]
    task: str
    dialect: str
    priority: int
    user: str
    created: float
    started: float | None
    finished: float | None
    attempts: int
    node: str
    backend: str
    cost_credits: float | None
    why: str | None = None
    queue_position: int | None
    eta_s: float | None
    progress: ProgressAnswer
    outputs: list[OutputAnswer]
    withheld: list[WithheldAnswer]
    timings: dict[str, float]
    warnings: list[str]
    error: dict[str, str] | None


class JobsAnswer(BaseModel):
    """A page of jobs, newest first. next: what `before` of the next page is; null on the last."""

    jobs: list[JobAnswer]
    next: str | None


class OutputsAnswer(BaseModel):
    """A page of finished pictures, newest first."""

    outputs: list[OutputAnswer]
    next: str | None


@router.post(
    "/api/jobs",
    status_code=202,
    dependencies=[needs("generate")],
    response_model=JobAnswer,
    openapi_extra=described(PictureFields),
)
async def submit_job(request: Request, asked: Annotated[PictureFields, Depends(json_body(PictureFields))]) -> Response:
    """A job that is in the store for good when this answers."""
    job = await submit(request, await to_submission(request, asked, dialect=DIALECT.name))
    status = await house_of(request).desk.status(job.id)
    return JSONResponse(
        answer_of(status).model_dump(), status_code=202, headers={"Location": f"/api/jobs/{job.id}", "X-Job-Id": job.id}
    )


@router.get("/api/jobs")
async def list_jobs(
    request: Request,
    state: Annotated[list[StateName] | None, Query(description="only these")] = None,
    before: Annotated[str | None, Query(max_length=100, description="`next` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    search: Annotated[str | None, Query(max_length=200, description="part of the prompt")] = None,
) -> JobsAnswer:
    """The jobs of every dialect, newest first: all of them for a key that may manage, else one's own."""
    states: frozenset[JobState] | None = None if state is None else frozenset(state)
    page, following = await house_of(request).desk.statuses(
        owner=visible_to(request), states=states, before=before, limit=limit, search=search
    )
    return JobsAnswer(jobs=[answer_of(status) for status in page], next=following)


@router.get("/api/jobs/{job_id}")
async def show_job(request: Request, job_id: str) -> JobAnswer:
    """A job as it stands; of a router's, also which node has it, and why that one."""
    house, status = house_of(request), await _status(request, job_id)
    answer = answer_of(status)
    if house.fleet is None:
        return answer
    why = house.fleet.why(status.job)
    node = answer.node or house.fleet.node_of(status.job.id)
    return answer.model_copy(update={"node": node, "why": None if why is None else why.text})


@router.get(
    "/api/jobs/{job_id}/events",
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def job_events(
    request: Request,
    job_id: str,
    *,
    previews: Annotated[bool, Query(description="send pictures in the making")] = True,
) -> EventSourceResponse:
    """Server-sent events until the job has ended: `status`, `step`, `preview`, then `done`, `failed` or `cancelled`.

    Goes on where `Last-Event-ID` says.
    """
    status = await _status(request, job_id)
    last = request.headers.get("last-event-id", "")
    after = int(last[:18]) if last.isascii() and last.isdigit() else 0
    events = house_of(request).desk.watch(status.job.id, after=after, previews=previews)
    return EventSourceResponse(_told(events), ping=HEARTBEAT_S)


async def _told(events: AsyncIterator[JobEvent]) -> AsyncIterator[ServerSentEvent]:
    async for event in events:
        answer = answer_of(event.status)
        name = answer.state if event.status.job.has_ended else ("status" if event.progress is None else "step")
        yield ServerSentEvent(answer.model_dump_json(), event=name, id=str(event.number))
        if event.progress is not None and event.progress.preview is not None:
            preview = event.progress.preview
            png = await asyncio.to_thread(pictures.encode, preview, "png")
            told = {
                "image_index": event.progress.image_index,
                "step": event.progress.step,
                "width": preview.width_px,
                "height": preview.height_px,
                "b64_png": base64.b64encode(png).decode(),
            }
            yield ServerSentEvent(_json(told), event="preview")


def _json(value: dict[str, Any]) -> str:
    return bytes(JSONResponse(value).body).decode()


@router.delete("/api/jobs/{job_id}", dependencies=[needs("generate")])
async def cancel_job(request: Request, job_id: str) -> JobAnswer:
    """Stop a job before its next step; a job that has ended stays as it is."""
    return answer_of(await house_of(request).desk.cancel(JobId(job_id), owner=visible_to(request)))


@router.post("/api/jobs/{job_id}/retry", status_code=202, dependencies=[needs("generate")])
async def retry_job(request: Request, job_id: str) -> JobAnswer:
    """Another try of a job that failed or was cancelled, with the same seed and settings."""
    desk = house_of(request).desk
    job = await desk.retry(JobId(job_id), owner=visible_to(request))
    return answer_of(await desk.status(job.id))


@router.get("/api/outputs")
async def list_outputs(
    request: Request,
    before: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    search: Annotated[str | None, Query(max_length=200, description="part of the prompt")] = None,
    *,
    favourites: Annotated[bool, Query(description="only these")] = False,
) -> OutputsAnswer:
    """Finished pictures, newest first."""
    outputs, following = await house_of(request).store.outputs(
        owner=visible_to(request), before=before, limit=limit, search=search, only_favourites=favourites
    )
    return OutputsAnswer(outputs=[output_answer(output) for output in outputs], next=following)


@router.get("/api/outputs/{output_id}", response_class=Response, responses=PICTURE)
async def show_output(request: Request, output_id: str) -> Response:
    """A finished picture, with how it was made inside the file."""
    output = await found_output(request, output_id)
    content = await house_of(request).desk.picture(output)
    headers = {"Cache-Control": CACHE, "X-Seed": str(output.seed), "X-Job-Id": output.job_id, "X-Safety": output.safety}
    return Response(content, media_type=MEDIA_TYPES[output.format], headers=headers)


@router.get("/api/outputs/{output_id}/thumbnail", response_class=Response, responses=PICTURE)
async def show_thumbnail(request: Request, output_id: str) -> Response:
    """A small WebP of a finished picture."""
    output = await found_output(request, output_id)
    content = await asyncio.to_thread(house_of(request).files.thumbnail, output, side_px=THUMBNAIL_SIDE_PX)
    return Response(content, media_type="image/webp", headers={"Cache-Control": CACHE})


@router.delete("/api/outputs/{output_id}", status_code=204, response_class=Response, dependencies=[needs("generate")])
async def delete_output(request: Request, output_id: str) -> Response:
    """Remove a finished picture for good; its job stays in the list."""
    house = house_of(request)
    output = await found_output(request, output_id)
    await house.store.forget_outputs([output.id])
    await asyncio.to_thread(house.files.delete, output)
    return Response(status_code=204)


async def found_output(request: Request, output_id: str) -> Output:
    """A finished picture that the caller may see. Raises NotFound, NotAllowed."""
    output = await house_of(request).store.output(OutputId(output_id), owner=visible_to(request))
    if output is None:
        raise NotFound("there is no picture of that id", hint="see /api/outputs")
    return output


async def _status(request: Request, job_id: str) -> JobStatus:
    return await house_of(request).desk.status(JobId(job_id), owner=visible_to(request))


def visible_to(request: Request) -> OwnerId | None:
    """Whose jobs the caller sees: everybody's for who may manage, else their own. Raises NotAllowed."""
    caller: Caller = caller_of(request)
    if "manage" in caller.scopes:
        return None
    if "generate" not in caller.scopes:
        check_right(caller, "read")
    return caller.owner


def answer_of(status: JobStatus) -> JobAnswer:
    """A job as clients see it."""
    job, asked = status.job, status.job.request
    return JobAnswer(
        id=job.id,
        state=job.state,
        model=asked.model,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        seed=asked.seed or 0,
        n=asked.n_images,
        width=asked.width_px or 0,
        height=asked.height_px or 0,
        steps=asked.steps or 0,
        guidance=asked.guidance or 0.0,
        sampler=asked.sampler or "",
        loras=fields_of(asked.loras),
        task=asked.task,
        dialect=job.submission.dialect,
        priority=job.submission.priority,
        user=job.submission.label,
        created=job.created_s,
        started=job.started_s,
        finished=job.finished_s,
        attempts=job.attempts,
        node=job.node,
        backend=job.backend or asked.backend or "",
        cost_credits=job.cost_credits,
        queue_position=status.queue_position,
        eta_s=status.eta_s,
        progress=ProgressAnswer(step=status.step, steps=status.n_steps),
        outputs=[output_answer(output) for output in job.outputs],
        withheld=withheld_of(job),
        timings=dict(job.timings_s),
        warnings=list(job.warnings),
        error=None if job.error is None else dict(job.error),
    )


def body_of(job: Job) -> bytes:
    """What a webhook is sent at the end of a job."""
    n_steps = (job.request.steps or 0) * job.request.n_images
    return answer_of(JobStatus(job=job, step=n_steps, n_steps=n_steps)).model_dump_json().encode()


def output_answer(output: Output) -> OutputAnswer:
    return OutputAnswer(
        id=output.id,
        job_id=output.job_id,
        model=output.model,
        prompt=output.prompt,
        created=output.created_s,
        favourite=output.is_favourite,
        url=f"/api/outputs/{output.id}",
        thumbnail_url=f"/api/outputs/{output.id}/thumbnail",
        seed=output.seed,
        width=output.width_px,
        height=output.height_px,
        format=output.format,
        n_bytes=output.n_bytes,
        safety=output.safety,
    )
