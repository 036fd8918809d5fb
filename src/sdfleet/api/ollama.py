"""Ollama's API, as far as it is about pictures: its clients list models, show one, and draw with progress.

Image generation in `/api/generate` is as Ollama had it up to 0.32.5; later versions removed it, clients kept it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from sdfleet import __version__
from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import failure, house_of, staying, submit, submit_and_wait, succeeded
from sdfleet.api.asked import client_of, model_named, read_picture, sides_of
from sdfleet.api.bodies import described, json_body
from sdfleet.api.dialect import error_response
from sdfleet.catalog.store import Catalog, Entry
from sdfleet.compose import House
from sdfleet.domain import MAX_SIDE_PX, ImageRequest, Job, JobEvent, Submission
from sdfleet.errors import (
    BadRequest,
    CheckpointError,
    InvalidValue,
    NotAuthenticated,
    NotFound,
    SdfleetError,
    UnknownName,
)

FAULTS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What happened and what to do.",
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
            }
        },
    }
}
NDJSON = "application/x-ndjson"
NANOSECONDS = 1_000_000_000


class OllamaDialect:
    """`{"error": "<one line>"}`."""

    name = "ollama"

    def error(self, error: SdfleetError) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, NotAuthenticated) else None
        return error_response(error, {"error": str(error)}, headers=headers)


DIALECT = OllamaDialect()
router = APIRouter(tags=["ollama"], responses=FAULTS)


@router.head("/", response_class=PlainTextResponse, include_in_schema=False)
@router.get("/", response_class=PlainTextResponse)
async def root(request: Request) -> PlainTextResponse:
    """That somebody is here; Ollama's own program wants to read its own name."""
    is_ollama = request.headers.get("user-agent", "").lower().startswith("ollama")
    return PlainTextResponse(
        "Ollama is running" if is_ollama else f"sdfleet {__version__} is running; see /openapi.json"
    )


@router.get("/api/version")
async def version() -> dict[str, str]:
    """The version of this server."""
    return {"version": __version__}


@router.get("/api/tags")
async def tags(request: Request) -> dict[str, list[dict[str, Any]]]:
    """The models that are here."""
    check_right(caller_of(request), "read")
    entries = await asyncio.to_thread(_described_all, house_of(request))
    return {"models": entries}


@router.get("/api/ps")
async def loaded_models(request: Request) -> dict[str, list[dict[str, Any]]]:
    """The models that are in memory; they stay until the memory is needed."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    facts = house.runtime.capabilities().facts
    loaded = facts.get("checkpoints")
    folders = {str(folder) for folder in loaded} if isinstance(loaded, list | tuple) else set()
    entries = await asyncio.to_thread(_described_all, house, folders)
    is_cpu = facts.get("device") == "cpu"
    never = "9999-12-31T23:59:59Z"
    return {
        "models": [
            {**entry, "expires_at": never, "size_vram": 0 if is_cpu else entry["size"], "context_length": 0}
            for entry in entries
        ]
    }


class ShowAsked(BaseModel):
    """Which model."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str = ""
    name: str = ""


@router.post("/api/show", openapi_extra=described(ShowAsked))
async def show(request: Request, asked: Annotated[ShowAsked, Depends(json_body(ShowAsked))]) -> dict[str, Any]:
    """What is known of one model."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    entry = await _entry(house, asked.model or asked.name)
    card = entry.card
    about = await asyncio.to_thread(_described, house.catalog, entry)
    defaults = {
        "width": card.width_px, "height": card.height_px, "steps": card.steps, "guidance": card.guidance,
        "sampler": card.sampler,
    }  # fmt: skip
    return {
        "license": card.licence or "",
        "modelfile": f"# {card.title or card.name}\nFROM {card.name}",
        "parameters": "\n".join(f"{name} {value}" for name, value in defaults.items()),
        "template": "",
        "details": about["details"],
        "model_info": {"general.architecture": card.family, **{f"{card.family}.{k}": v for k, v in defaults.items()}},
        "capabilities": about["capabilities"],
        "modified_at": about["modified_at"],
    }


class GenerateAsked(BaseModel):
    """A picture, as Ollama's clients ask for it."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str = ""
    prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    images: list[str] | None = None
    stream: bool | None = True
    options: dict[str, Any] | None = None
    keep_alive: Annotated[str | float | None, Field(description="0 with an empty prompt unloads")] = None


@router.post(
    "/api/generate",
    dependencies=[needs("generate")],
    openapi_extra=described(GenerateAsked),
    responses={200: {"content": {NDJSON: {}, "application/json": {}}}},
    response_class=JSONResponse,
)
async def generate(request: Request, asked: Annotated[GenerateAsked, Depends(json_body(GenerateAsked))]) -> Response:
    """A picture with its progress, one JSON object a line; or all at once with `stream: false`."""
    house = house_of(request)
    if not asked.model:
        raise InvalidValue("model", "it is missing", hint="see /api/tags")
    entry = await _entry(house, asked.model)
    if not asked.prompt.strip():
        return await _load(house, asked, entry)
    submission = await _submission(request, asked, entry)
    if asked.stream is False:
        job = await submit_and_wait(request, submission)
        return Response(await _last(house, asked.model, job), media_type="application/json")
    house.readiness.check()
    job = await submit(request, submission)
    return StreamingResponse(_lines(request, asked.model, job), media_type=NDJSON)


async def _submission(request: Request, asked: GenerateAsked, entry: Entry) -> Submission:
    options = asked.options or {}
    for name in ("width", "height"):
        if (getattr(asked, name) or 0) > MAX_SIDE_PX:
            raise BadRequest(f"width and height must be <= {MAX_SIDE_PX}")
    width, height = sides_of(asked.width, asked.height)
    images = asked.images or []
    if len(images) > 1:
        raise InvalidValue("images", f"{len(images)} pictures given", hint="send one picture to be redrawn")
    image = await read_picture(house_of(request), images[0], field="images") if images else None
    seed = _number(options, "seed", whole=True)
    guidance = next(
        (value for name in ("guidance", "cfg_scale") if (value := _number(options, name)) is not None), None
    )
    steps = asked.steps if asked.steps is not None else _number(options, "steps", whole=True)
    picture = ImageRequest(
        prompt=asked.prompt,
        negative_prompt=str(options.get("negative_prompt") or ""),
        model=entry.card.name,
        width_px=width,
        height_px=height,
        # Their clients send 0 for what is left open.
        steps=int(steps) if steps else None,
        guidance=guidance,
        seed=None if seed is None or seed < 0 else int(seed),
        image=image,
    )
    return Submission(
        request=picture,
        caller=caller_of(request),
        dialect=DIALECT.name,
        client=client_of(request),
    )


def _number(options: Mapping[str, Any], name: str, *, whole: bool = False) -> float | int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and int(value) != value):
        raise InvalidValue(f"options.{name}", f"{str(value)[:40]!r} is not a {'whole ' if whole else ''}number")
    return int(value) if whole else float(value)


async def _load(house: House, asked: GenerateAsked, entry: Entry) -> Response:
    """An empty prompt: load the model, or (keep_alive 0) let it go when its memory is needed."""
    is_unload = asked.keep_alive in {0, "0", "0s", "0m"}
    if not is_unload:
        house.readiness.check()
        await house.runtime.generate(ImageRequest(prompt="warm-up", model=entry.card.name, steps=1, seed=0))
    answer = {
        "model": asked.model,
        "created_at": _now(),
        "response": "",
        "done": True,
        "done_reason": "unload" if is_unload else "load",
    }
    return JSONResponse(answer)


async def _lines(request: Request, model: str, job: Job) -> AsyncIterator[bytes]:
    house = house_of(request)
    try:
        async with staying(request, job):
            told = -1
            async for event in house.desk.watch(job.id):
                if event.status.job.has_ended:
                    break
                if event.status.step > told and event.status.n_steps:
                    told = event.status.step
                    yield _line(_progress(model, event))
            ended = await house.desk.wait(job.id)
            yield await _last(house, model, succeeded(ended))
    except SdfleetError as exc:
        yield _line({"error": str(exc)})


def _progress(model: str, event: JobEvent) -> dict[str, Any]:
    return {
        "model": model,
        "created_at": _now(),
        "response": "",
        "done": False,
        "completed": event.status.step,
        "total": event.status.n_steps,
    }


async def _last(house: House, model: str, job: Job) -> bytes:
    """The line with the picture, written in a worker thread."""
    if job.state != "done":
        raise failure(job)
    content = await house.desk.picture(job.outputs[0])
    total_s = (job.finished_s or time.time()) - job.created_s
    facts = {
        "model": model,
        "created_at": _now(),
        "response": "",
        "done": True,
        "done_reason": "stop",
        "total_duration": round(total_s * NANOSECONDS),
        "load_duration": round(job.timings_s.get("load", 0.0) * NANOSECONDS),
        "seed": job.outputs[0].seed,
        "job_id": job.id,
        "warnings": list(job.warnings),
    }
    return await asyncio.to_thread(lambda: _line({**facts, "image": base64.b64encode(content).decode()}))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


async def _entry(house: House, name: str) -> Entry:
    try:
        return await asyncio.to_thread(house.catalog.resolve, model_named(house, name))
    except UnknownName as exc:
        raise NotFound(f"model {name[:80]!r} not found", hint=exc.hint) from exc


def _described_all(house: House, folders: set[str] | None = None) -> list[dict[str, Any]]:
    entries = house.catalog.entries()
    return [_described(house.catalog, entry) for entry in entries if folders is None or str(entry.folder) in folders]


def _described(catalog: Catalog, entry: Entry) -> dict[str, Any]:
    """A model as `/api/tags` lists it; what Ollama's types require is never null."""
    card = entry.card
    files = [path for path in entry.folder.rglob("*") if path.is_file()] if entry.folder.is_dir() else []
    newest_s = max((path.stat().st_mtime for path in files), default=0.0)
    return {
        "name": card.name,
        "model": card.name,
        "modified_at": datetime.fromtimestamp(newest_s, UTC).isoformat().replace("+00:00", "Z"),
        "size": _size(catalog, entry),
        "digest": hashlib.sha256(card.model_dump_json().encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": card.family,
            "families": [card.family],
            "parameter_size": "",
            "quantization_level": "",
        },
        "capabilities": ["image"],
    }


def _size(catalog: Catalog, entry: Entry) -> int:
    """Bytes of the weights, wherever they lie; 0 for a checkpoint that cannot be used."""
    try:
        return catalog.inspect(entry).n_bytes
    except CheckpointError:
        return 0


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
