"""Ollama's API, as far as it is about pictures: its clients list models, show one, and draw with progress.

Image generation in `/api/generate` is as Ollama had it up to 0.32.5; later versions removed it, clients kept it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from sdfleet import __version__
from sdfleet.api import pages
from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import failure, house_of, staying, submit, submit_and_wait, succeeded
from sdfleet.api.asked import SAFETY_CHECKER, backend_named, client_of, model_named, read_picture, sides_of
from sdfleet.api.bodies import described, json_body
from sdfleet.api.dialect import error_response
from sdfleet.api.models import expires_at as expiry_of
from sdfleet.api.native import backend_of
from sdfleet.api.talk import NDJSON, answered, as_loaded, as_shown, as_tags
from sdfleet.catalog.store import Catalog, Entry
from sdfleet.compose import House
from sdfleet.domain import MAX_SIDE_PX, ImageRequest, Job, JobEvent, SafetyChecker, Submission
from sdfleet.errors import (
    BadRequest,
    CheckpointError,
    InvalidValue,
    NotAuthenticated,
    NotFound,
    NotReady,
    SdfleetError,
    UnknownName,
)
from sdfleet.language.asking import Ask, LanguageModel
from sdfleet.residents import Resident
from sdfleet.settings import seconds_of

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
NANOSECONDS = 1_000_000_000
KEEP_ALIVE_IGNORED = "keep_alive was ignored: how long a model stays is decided by keys with the right `manage`"


class OllamaDialect:
    """`{"error": "<one line>"}`."""

    name = "ollama"

    def error(self, error: SdfleetError) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, NotAuthenticated) else None
        return error_response(error, {"error": str(error)}, headers=headers)


DIALECT = OllamaDialect()
router = APIRouter(tags=["ollama"], responses=FAULTS)


@router.head("/", response_class=PlainTextResponse, include_in_schema=False)
@router.get("/", response_class=PlainTextResponse, responses=pages.AS_HTML)
async def root(request: Request) -> Response:
    """The page for a browser; for others that somebody is here. Ollama's own program wants to read its own name."""
    if pages.wants_page(request):
        return await pages.page("studio")
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
    house = house_of(request)
    described = await asyncio.to_thread(_described_all, house)
    drawing = list(described.values())
    return {"models": drawing + as_tags(_beside(house, drawing))}


@router.get("/api/ps")
async def loaded_models(request: Request) -> dict[str, list[dict[str, Any]]]:
    """The models that are in memory, with their bytes there and the time they leave at if nobody uses them."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    here = {resident.checkpoint: resident for resident in house.runtime.residents.here()}
    on_card = house.runtime.capabilities().facts.get("device") in {"cuda", "mps"}
    described = await asyncio.to_thread(_described_all, house, set(here))
    drawing = [_in_memory(entry, here[folder], on_card=on_card) for folder, entry in described.items()]
    return {"models": drawing + as_loaded(_beside(house, drawing))}


def _beside(house: House, drawing: Sequence[Mapping[str, Any]]) -> list[LanguageModel]:
    """The models that write, embed or listen; of a name that also draws, the one that draws is meant."""
    names = {entry["name"] for entry in drawing}
    return [model for model in house.language.models() if model.name not in names]


def _in_memory(entry: dict[str, Any], resident: Resident, *, on_card: bool) -> dict[str, Any]:
    size = resident.n_bytes or entry["size"]
    expires_at = expiry_of(resident) or "9999-12-31T23:59:59Z"
    return {**entry, "size": size, "size_vram": size if on_card else 0, "expires_at": expires_at, "context_length": 0}


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
    try:
        entry = await _entry(house, asked.model or asked.name)
    except (NotFound, NotReady):  # a router that has just begun does not know yet what its nodes draw with
        if (model := house.language.find(asked.model or asked.name)) is None:
            raise
        return as_shown(model)
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
    """A picture, as Ollama's clients ask for it. For a model that writes, other fields go to its server."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = ""
    prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    images: list[str] | None = None
    stream: bool | None = True
    options: dict[str, Any] | None = None
    keep_alive: Annotated[str | float | None, Field(description="0 with an empty prompt unloads")] = None
    backend: Annotated[str | None, Field(description="what draws, see /api/backends; also in options")] = None


@router.post(
    "/api/generate",
    dependencies=[needs("generate")],
    openapi_extra=described(GenerateAsked),
    responses={200: {"content": {NDJSON: {}, "application/json": {}}}},
    response_class=JSONResponse,
)
async def generate(request: Request, asked: Annotated[GenerateAsked, Depends(json_body(GenerateAsked))]) -> Response:
    """A picture with its progress, or a text, one JSON object a line; or all at once with `stream: false`."""
    house = house_of(request)
    if not asked.model:
        raise InvalidValue("model", "it is missing", hint="see /api/tags")
    try:
        entry = await _entry(house, asked.model)
    except (NotFound, NotReady) as exc:  # none that draws: one that writes, if there is one
        if isinstance(exc, NotReady) and house.language.find(asked.model) is None:
            raise
        ask = Ask(door="/api/generate", model=asked.model, body=asked.model_dump(exclude_unset=True))
        return answered(request, ask, dialect=DIALECT)
    if not asked.prompt.strip():
        return await _load(request, asked, entry)
    submission = await _submission(request, asked, entry)
    notes = await _keep(request, asked, entry, after_next_job=True)
    if asked.stream is False:
        job = await submit_and_wait(request, submission)
        last = await _last(house, asked.model, job, notes=notes)
        return Response(last, media_type="application/json", headers={"X-Backend": await backend_of(house, job)})
    house.readiness.check()
    job = await submit(request, submission)
    headers = {"X-Backend": await backend_of(house, job)}
    return StreamingResponse(_lines(request, asked.model, job, notes=notes), media_type=NDJSON, headers=headers)


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
        safety_checker=_safety_checker(options.get("safety_checker")),
        backend=backend_named(house_of(request), _backend(asked), model=asked.model),
    )
    return Submission(
        request=picture,
        caller=caller_of(request),
        dialect=DIALECT.name,
        client=client_of(request),
    )


def _backend(asked: GenerateAsked) -> str | None:
    """What is to draw: an option, as clients send no other fields, or beside the model as in our other routes."""
    named = asked.backend or (asked.options or {}).get("backend")
    if named is not None and not isinstance(named, str):
        raise InvalidValue("options.backend", "it is no name of a backend", hint="see /api/backends")
    return named or None


def _safety_checker(said: object) -> SafetyChecker | None:
    try:
        return SAFETY_CHECKER.validate_python(said)
    except ValidationError as exc:
        raise InvalidValue("options.safety_checker", f"{str(said)[:40]!r} is not on, flag or off") from exc


def _number(options: Mapping[str, Any], name: str, *, whole: bool = False) -> float | int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and int(value) != value):
        raise InvalidValue(f"options.{name}", f"{str(value)[:40]!r} is not a {'whole ' if whole else ''}number")
    return int(value) if whole else float(value)


def _keep_alive_s(asked: GenerateAsked) -> float | None:
    """Seconds, or None for ever."""
    try:
        return seconds_of(asked.keep_alive)
    except ValueError as exc:
        raise InvalidValue("keep_alive", f"{str(asked.keep_alive)[:40]!r} {exc}") from exc


async def _keep(request: Request, asked: GenerateAsked, entry: Entry, *, after_next_job: bool) -> Sequence[str]:
    """Let the model stay as long as asked, for callers who may decide that for all others; the others are told."""
    if asked.keep_alive is None:
        return ()
    keep_alive_s = _keep_alive_s(asked)
    if "manage" not in caller_of(request).scopes:
        # Clients send it with every request without being asked to, so it is no reason to fail.
        return (KEEP_ALIVE_IGNORED,)
    await house_of(request).runtime.keep(entry.card.name, keep_alive_s, after_next_job=after_next_job)
    return ()


async def _load(request: Request, asked: GenerateAsked, entry: Entry) -> Response:
    """An empty prompt: load the model, or (keep_alive 0) unload it as soon as the jobs that draw with it have ended."""
    house = house_of(request)
    is_unload = asked.keep_alive is not None and _keep_alive_s(asked) == 0
    notes: Sequence[str] = ()
    if is_unload:
        check_right(caller_of(request), "manage")
        await house.runtime.release(entry.card.name)
    else:
        house.readiness.check()
        await house.runtime.load(entry.card.name)
        notes = await _keep(request, asked, entry, after_next_job=False)
    answer = {
        "model": asked.model,
        "created_at": _now(),
        "response": "",
        "done": True,
        "done_reason": "unload" if is_unload else "load",
        "warnings": list(notes),
    }
    return JSONResponse(answer)


async def _lines(request: Request, model: str, job: Job, *, notes: Sequence[str]) -> AsyncIterator[bytes]:
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
            yield await _last(house, model, succeeded(ended), notes=notes)
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


async def _last(house: House, model: str, job: Job, *, notes: Sequence[str]) -> bytes:
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
        "safety": job.outputs[0].safety,
        "job_id": job.id,
        "warnings": [*notes, *job.warnings],
        "backend": await backend_of(house, job),
        "cost_credits": job.cost_credits,
    }
    return await asyncio.to_thread(lambda: _line({**facts, "image": base64.b64encode(content).decode()}))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


async def _entry(house: House, name: str) -> Entry:
    try:
        return await asyncio.to_thread(house.catalog.resolve, model_named(house, name))
    except UnknownName as exc:
        raise NotFound(f"model {name[:80]!r} not found", hint=exc.hint) from exc


def _described_all(house: House, folders: set[str] | None = None) -> dict[str, dict[str, Any]]:
    """By folder, all models or those of some folders."""
    found = {str(entry.folder): entry for entry in house.catalog.entries()}
    return {f: _described(house.catalog, entry) for f, entry in found.items() if folders is None or f in folders}


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
