"""The routes of Ollama Herd's clients: one PNG by POST, who can draw what, how it went, and the fleet (of one)."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import house_of, submit_and_wait
from sdfleet.api.asked import client_of, model_named, sides_of
from sdfleet.api.bodies import described, json_body
from sdfleet.api.native import backend_of, drawing_s
from sdfleet.api.nodes import holders_of, node_id, nodes_of
from sdfleet.api.ollama import DIALECT, FAULTS
from sdfleet.compose import House
from sdfleet.domain import ImageRequest, Submission
from sdfleet.errors import CheckpointError, InvalidValue, NotFound, OutOfMemory, SdfleetError, UnknownName

router = APIRouter(tags=["herd"], responses=FAULTS)

STATS_WINDOW_S = 24 * 3600.0
MAX_TAGS = 32
MAX_TAG_CHARS = 100
# What these clients call an engine, where we call it otherwise.
_ENGINES = {None: "local", "flux-api": "bfl"}


class RenderFailed(SdfleetError):
    """The picture could not be drawn; what Herd's clients know as 502."""

    code = "render_failed"
    http_status = 502


class Metadata(BaseModel):
    """What the caller notes about a request."""

    model_config = ConfigDict(extra="ignore")

    tags: list[str] = Field(default_factory=list)


class GenerateImageAsked(BaseModel):
    """One picture. What is left out comes from the model's card."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str = ""
    prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    negative_prompt: str | None = ""
    quantize: int | str | None = None
    backend: str | None = None
    metadata: Metadata | None = None
    user: str | None = None


@router.post(
    "/api/generate-image",
    dependencies=[needs("generate")],
    openapi_extra=described(GenerateImageAsked),
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
)
async def generate_image(
    request: Request, asked: Annotated[GenerateImageAsked, Depends(json_body(GenerateImageAsked))]
) -> Response:
    """A PNG; its headers say who drew it, how long that took, and the seed."""
    house = house_of(request)
    for name in ("model", "prompt"):
        if not getattr(asked, name).strip():
            raise InvalidValue(name, f"{name} is required", hint="see /api/image-models for models")
    model = await _model(house, asked.model)
    width, height = sides_of(asked.width, asked.height)
    picture = ImageRequest(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt or "",
        model=model,
        width_px=width,
        height_px=height,
        steps=asked.steps,
        guidance=asked.guidance,
        seed=None if asked.seed is None or asked.seed < 0 else asked.seed,
        backend=asked.backend or None,
    )
    submission = Submission(
        request=picture,
        caller=caller_of(request),
        dialect=DIALECT.name,
        client=client_of(request),
        label=(asked.user or "")[:256],
        tags=_tags(request, asked),
    )
    try:
        job = await submit_and_wait(request, submission)
    except SdfleetError as exc:
        if exc.http_status in {SdfleetError.http_status, OutOfMemory.http_status}:
            raise RenderFailed(f"the picture could not be drawn: {exc.message}", hint=exc.hint) from exc
        raise
    output = job.outputs[0]
    wait_s = max(0.0, (job.started_s or job.created_s) - job.created_s)
    headers = {
        "X-Fleet-Node": job.node or node_id(),
        "X-Fleet-Model": job.request.model,
        "X-Fleet-Served-Model": job.request.model,
        "X-Fleet-Requested-Model": _header(asked.model),
        "X-Fleet-Fallback": "false",
        "X-Fleet-Backend": "image",
        "X-Backend": await backend_of(house, job),
        "X-Fleet-Retries": str(max(0, job.attempts - 1)),
        "X-Generation-Time": str(round(drawing_s(job) * 1000)),
        "X-Queue-Time": str(round(wait_s * 1000)),
        "X-Seed": str(output.seed),
        "X-Safety": output.safety,
        "X-Job-Id": job.id,
    }
    if job.warnings:
        headers["X-Warnings"] = _header("; ".join(job.warnings))
    return Response(await house.desk.picture(output), media_type="image/png", headers=headers)


def _header(text: str) -> str:
    """Text that a header may hold."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:500])


async def _model(house: House, name: str) -> str:
    try:
        entry = await asyncio.to_thread(house.catalog.resolve, model_named(house, name))
    except (UnknownName, CheckpointError) as exc:
        here = ", ".join(entry.card.name for entry in await asyncio.to_thread(house.catalog.entries))
        raise NotFound(f"model {name[:80]!r} is not available on any node", hint=f"available: {here}") from exc
    return entry.card.name


def _tags(request: Request, asked: GenerateImageAsked) -> tuple[str, ...]:
    given = [tag.strip() for tag in request.headers.get("x-herd-tags", "").split(",")]
    given += asked.metadata.tags if asked.metadata is not None else []
    return tuple(dict.fromkeys(tag[:MAX_TAG_CHARS] for tag in given if tag))[:MAX_TAGS]


@router.get("/api/image-models")
async def image_models(request: Request) -> dict[str, list[dict[str, Any]]]:
    """The models that draw, and where they are."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    entries = await asyncio.to_thread(house.catalog.entries)
    return {
        "models": [
            {
                "name": entry.card.name,
                "type": "image",
                "backend": _ENGINES.get(entry.card.backend, entry.card.backend),
                "fleet_nodes": holders_of(house, entry.card.name),
            }
            for entry in entries
        ]
    }


@router.get("/dashboard/api/image-stats")
async def image_stats(request: Request, limit: Annotated[int, Query(ge=1, le=500)] = 50) -> dict[str, Any]:
    """What was drawn in the last 24 hours, as the store remembers it."""
    check_right(caller_of(request), "read")
    stats = await house_of(request).store.image_stats(since_s=time.time() - STATS_WINDOW_S, n_recent=limit)
    n_total = stats.n_done + stats.n_failed
    return {
        "total": n_total,
        "completed": stats.n_done,
        "failed": stats.n_failed,
        "avg_generation_ms": round((stats.avg_generation_s or 0.0) * 1000, 1),
        "by_node": {node or node_id(): n for node, n in stats.by_node.items()},
        "by_model": dict(stats.by_model),
        "recent": [
            {
                "timestamp": recent.finished_s,
                "model": recent.model,
                "node_id": recent.node or node_id(),
                "status": "completed" if recent.state == "done" else "failed",
                "generation_ms": None if recent.generation_s is None else round(recent.generation_s * 1000, 1),
                "width": recent.width_px,
                "height": recent.height_px,
                "error": recent.error,
            }
            for recent in stats.recent
        ],
    }


@router.get("/fleet/status")
async def fleet_status(request: Request) -> dict[str, Any]:
    """The fleet: a router's nodes; of one machine, that machine."""
    check_right(caller_of(request), "read")
    return await status_of(house_of(request))


async def status_of(house: House) -> dict[str, Any]:
    """What `/fleet/status` answers."""
    nodes = await nodes_of(house)
    return {
        "fleet": {
            "nodes_total": len(nodes),
            "nodes_online": sum(node.status == "online" for node in nodes),
            "models_loaded": sum(len(node.loaded) for node in nodes),
            "requests_active": house.desk.load().n_running,
        },
        "nodes": [node.to_json() for node in nodes],
        "queues": await _queues(house),
        "timestamp": time.time(),
    }


@router.get("/fleet/queue")
async def fleet_queue(request: Request) -> dict[str, Any]:
    """How much waits, and how long one picture of the default model, asked for now, would."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    load = house.desk.load()
    counts = await house.store.counts()
    wait_s = await _wait_s(house)
    return {
        "queue_depth": load.n_queued + load.n_running,
        "pending": load.n_queued,
        "in_flight": load.n_running,
        "completed": counts.get("done", 0),
        "failed": counts.get("failed", 0),
        "estimated_wait_ms": None if wait_s is None else round(wait_s * 1000),
        "nodes_online": sum(node.status == "online" for node in await nodes_of(house)),
        "queues": await _queues(house),
        "timestamp": time.time(),
    }


async def _wait_s(house: House) -> float | None:
    if house.fleet is None:
        return house.desk.load().wait_s
    try:
        card = (await asyncio.to_thread(house.catalog.resolve, house.settings.model)).card
    except (UnknownName, CheckpointError):
        return None
    return house.fleet.wait_s(model=card.name, megapixels=card.width_px * card.height_px / 2**20, steps=card.steps)


async def _queues(house: House) -> dict[str, Any]:
    """One queue for each node and model that had work in the last day, as Herd names them: `node:model:latest`.

    In a fleet nothing waits at a node: what is not begun, and what failed, stands with the router.
    """
    queues = {}
    for place in await house.store.places():
        node, by_state = place.node or node_id(), place.by_state
        queues[f"{node}:{place.model}:latest"] = {
            "node_id": node,
            "model": f"{place.model}:latest",
            "pending": by_state.get("queued", 0),
            "in_flight": by_state.get("running", 0),
            "completed": by_state.get("done", 0),
            "failed": by_state.get("failed", 0),
            "concurrency": 1,
            "request_type": "image",
            "avg_latency_ms": round((place.avg_generation_s or 0.0) * 1000, 1),
        }
    return queues
