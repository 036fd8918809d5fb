"""AUTOMATIC1111's `/sdapi/v1`: pictures, progress, interrupting, options.

The origin is one program for one person: one job, one checkpoint chosen for everybody. Here these belong to the caller:
`progress` and `interrupt` are about the caller's own pictures, and a checkpoint chosen by `options` is theirs alone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from sdfleet import __version__
from sdfleet.api.a1111_wire import (
    Img2ImgAsked,
    PictureAnswer,
    ProgressAnswer,
    ProgressState,
    Txt2ImgAsked,
)
from sdfleet.api.access import caller_of, needs
from sdfleet.api.answering import as_json, house_of, submit, succeeded, wait, withheld_of
from sdfleet.api.asked import backend_named, client_of, read_picture, sides_of
from sdfleet.api.bodies import described, from_base64, json_body, read_json
from sdfleet.api.dialect import BadBody, error_response
from sdfleet.api.native import backend_of
from sdfleet.catalog.cards import Card
from sdfleet.compose import House
from sdfleet.domain import MAX_IMAGES, ImageRequest, Job, JobId, JobStatus, OwnerId, Picture, Submission
from sdfleet.engine.sampler_names import a1111_label, parse_sampler
from sdfleet.errors import (
    BadRequest,
    InvalidValue,
    NotAuthenticated,
    NotFound,
    SdfleetError,
    UnknownName,
    UnsupportedByModel,
)
from sdfleet.storage import pictures, retouch

log = logging.getLogger(__name__)

FAULTS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What happened and what to do.",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["detail"], "properties": {"detail": {}}}}
        },
    }
}
MAX_OPTIONS_BYTES = 2**18
# Callers whose choice of a checkpoint is remembered.
MAX_SEATS = 10_000


class A1111Dialect:
    """`{"error": "<class>", "detail", "body", "errors"}`; 422 with a list for a bad field; 401 asks for Basic."""

    name = "a1111"

    def error(self, error: SdfleetError) -> Response:
        if isinstance(error, NotAuthenticated):
            body: dict[str, Any] = {"detail": "Incorrect username or password"}
            return error_response(error, body, headers={"WWW-Authenticate": "Basic"})
        if isinstance(error, BadBody) and error.issues:
            return error_response(error, {"detail": list(error.issues)}, status=422)
        status = 422 if isinstance(error, BadRequest) and error.http_status == BadRequest.http_status else None
        body = {"error": type(error).__name__, "detail": str(error), "body": "", "errors": str(error)}
        return error_response(error, body, status=status)


DIALECT = A1111Dialect()
router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=FAULTS)


@dataclass(slots=True)
class Seat:
    """What one caller of this dialect has chosen and sees. preview: of the job that is being drawn."""

    options: dict[str, Any] = field(default_factory=dict)
    preview: tuple[JobId, Picture] | None = None
    watched: JobId | None = None
    is_interrupted: bool = False


def seat_of(request: Request) -> Seat:
    """The caller's own seat."""
    seats: dict[OwnerId, Seat] | None = getattr(request.app.state, "a1111_seats", None)
    if seats is None:
        seats = request.app.state.a1111_seats = {}
    owner = caller_of(request).owner
    if owner not in seats and len(seats) >= MAX_SEATS:
        seats.pop(next(iter(seats)))
    return seats.setdefault(owner, Seat())


@router.post(
    "/txt2img", dependencies=[needs("generate")], openapi_extra=described(Txt2ImgAsked), response_model=PictureAnswer
)
async def txt2img(request: Request, asked: Annotated[Txt2ImgAsked, Depends(json_body(Txt2ImgAsked))]) -> Response:
    """Pictures from a prompt."""
    return await _pictures(request, asked, image=None, mask=None, patch=None)


@router.post(
    "/img2img", dependencies=[needs("generate")], openapi_extra=described(Img2ImgAsked), response_model=PictureAnswer
)
async def img2img(request: Request, asked: Annotated[Img2ImgAsked, Depends(json_body(Img2ImgAsked))]) -> Response:
    """Pictures from another one, the whole of it or what a mask leaves white."""
    if not asked.init_images:
        raise NotFound("Init image not found", hint="send it in init_images")
    if len(asked.init_images) > 1:
        raise InvalidValue("init_images", f"{len(asked.init_images)} pictures given", hint="send one")
    house = house_of(request)
    image = await read_picture(house, asked.init_images[0], field="init_images")
    width, height = asked.width or image.width_px, asked.height or image.height_px
    if asked.mask is None:
        if asked.width is not None or asked.height is not None:
            image = await asyncio.to_thread(retouch.brought, image, width_px=width, height_px=height, fit=_fit(asked))
        return await _pictures(request, asked, image=image, mask=None, patch=None)
    patch = await _patch(asked, image, width_px=width, height_px=height)
    return await _pictures(request, asked, image=patch.image, mask=patch.mask, patch=patch)


def _fit(asked: Img2ImgAsked) -> retouch.Fit:
    """How a picture of another shape is brought to the size asked for; 3 (in latent space) is 0 here."""
    match asked.resize_mode:
        case 1:
            return "crop"
        case 2:
            return "fill"
        case _:
            return "stretch"


async def _patch(asked: Img2ImgAsked, image: Picture, *, width_px: int, height_px: int) -> retouch.Patch:
    data = await asyncio.to_thread(from_base64, asked.mask or "", field="mask")
    mask = await asyncio.to_thread(pictures.decode_opaque_mask, data)
    if (mask.width_px, mask.height_px) != (image.width_px, image.height_px):
        mask = await asyncio.to_thread(pictures.resize, mask, width_px=image.width_px, height_px=image.height_px)
    if asked.inpainting_fill in {2, 3}:
        raise UnsupportedByModel(
            "inpainting_fill 2 and 3 (latent noise, latent nothing) are not here", hint="use 0 (fill) or 1 (original)"
        )
    blur = asked.mask_blur
    return await asyncio.to_thread(
        retouch.patch_of,
        image,
        mask,
        width_px=width_px,
        height_px=height_px,
        blur_px=(asked.mask_blur_x, asked.mask_blur_y) if blur is None else (blur, blur),
        is_inverted=bool(asked.inpainting_mask_invert),
        only_masked=asked.inpaint_full_res,
        padding_px=asked.inpaint_full_res_padding,
        fit=_fit(asked),
        fill=asked.inpainting_fill == 0,
    )


async def _pictures(
    request: Request,
    asked: Txt2ImgAsked,
    *,
    image: Picture | None,
    mask: Picture | None,
    patch: retouch.Patch | None,
) -> Response:
    house, seat = house_of(request), seat_of(request)
    submission = await _submission(request, asked, image=image, mask=mask)
    house.readiness.check()
    job = await submit(request, submission)
    seat.is_interrupted = False
    ended = await wait(request, job)
    if seat.is_interrupted and ended.state == "cancelled":
        # Their clients take nothing but 200, also for what they interrupted themselves.
        info = json.dumps({"interrupted": True})
        return await as_json(PictureAnswer(images=[], parameters=asked.model_dump(), info=info))
    succeeded(ended)
    card = await asyncio.to_thread(lambda: house.catalog.resolve(ended.request.model).card)
    contents = [await house.desk.picture(output) for output in ended.outputs]
    if patch is not None:
        contents = [await asyncio.to_thread(_put_back, patch, content) for content in contents]
    texts = await asyncio.to_thread(lambda: [base64.b64encode(content).decode() for content in contents])
    infotexts = await asyncio.to_thread(lambda: [pictures.read_infotext(content) for content in contents])
    backend = await backend_of(house, ended)
    facts = _info(ended, card, infotexts, strength=asked.denoising_strength)
    answer = PictureAnswer(
        images=texts if asked.send_images else [],
        parameters={**asked.model_dump(), "job_id": ended.id},
        info=json.dumps({**facts, "backend": backend}),
    )
    response = await as_json(answer)
    response.headers["X-Backend"] = backend
    return response


async def _submission(
    request: Request, asked: Txt2ImgAsked, *, image: Picture | None, mask: Picture | None
) -> Submission:
    _refuse_what_is_not_here(asked)
    house = house_of(request)
    named = asked.checkpoint or seat_of(request).options.get("sd_model_checkpoint")
    card = await checkpoint(house, named)
    n_images = asked.batch_size * asked.n_iter
    if n_images > MAX_IMAGES:
        raise InvalidValue("batch_size", f"{n_images} pictures asked for", hint=f"ask for at most {MAX_IMAGES}")
    width, height = sides_of(asked.width, asked.height)
    picture = ImageRequest(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt or "",
        model=card.name,
        width_px=width if image is None else image.width_px,
        height_px=height if image is None else image.height_px,
        steps=asked.steps,
        guidance=asked.cfg_scale,
        seed=None if asked.seed is None or asked.seed < 0 else asked.seed,
        n_images=n_images,
        sampler=_sampler(asked),
        image=image,
        mask=mask,
        strength=None if image is None else asked.denoising_strength,
        safety_checker=asked.safety_checker,
        backend=backend_named(house, asked.named_backend, model=named if isinstance(named, str) else None),
    )
    return Submission(request=picture, caller=caller_of(request), dialect=DIALECT.name, client=client_of(request))


def _refuse_what_is_not_here(asked: Txt2ImgAsked) -> None:
    if asked.script_name:
        raise InvalidValue("script_name", "Script not found", hint="see /sdapi/v1/scripts")
    for name in asked.alwayson_scripts or {}:
        raise InvalidValue(
            "alwayson_scripts", f"always on script {name[:40]!r} not found", hint="see /sdapi/v1/scripts"
        )
    for name in asked.refused_features():
        raise InvalidValue(name, "this server does not do that", hint="leave it out")


def _sampler(asked: Txt2ImgAsked) -> str | None:
    if asked.sampler is None:
        return None
    try:
        return str(parse_sampler(asked.sampler))
    except UnknownName as exc:
        raise NotFound("Sampler not found", hint=exc.hint) from exc


def title_of(card: Card) -> str:
    """A model as these clients name it: `file.safetensors [hash]`."""
    return f"{card.name}.safetensors [{hash_of(card)}]"


def hash_of(card: Card) -> str:
    """Ten hex digits that tell one model from another."""
    import hashlib

    return hashlib.sha256(f"{card.name}:{card.folder}".encode()).hexdigest()[:10]


async def checkpoint(house: House, named: object) -> Card:
    """The card behind a title, a file name or a name; the server's default for none. Raises NotFound."""
    if not isinstance(named, str) or not named:
        named = house.settings.model
    name = named.partition(" [")[0].removesuffix(".safetensors")
    try:
        return (await asyncio.to_thread(house.catalog.resolve, name)).card
    except UnknownName as exc:
        raise NotFound(f"Checkpoint {named[:80]!r} not found", hint=exc.hint) from exc


async def chosen(request: Request) -> Card:
    """The card of the checkpoint that the caller has chosen."""
    return await checkpoint(house_of(request), seat_of(request).options.get("sd_model_checkpoint"))


def _put_back(patch: retouch.Patch, content: bytes) -> bytes:
    """The redrawn part in its picture, with the notes of how it was drawn."""
    return pictures.encode(patch.applied(pictures.decode(content)), "png", pictures.read_metadata(content))


def _info(job: Job, card: Card, infotexts: list[str], *, strength: float | None) -> dict[str, Any]:
    asked, n_images = job.request, job.request.n_images
    first = job.outputs[0]
    seeds = [output.seed for output in job.outputs]
    return {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(seeds),
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": [asked.negative_prompt] * len(seeds),
        "seed": first.seed,
        "all_seeds": seeds,
        "subseed": first.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": first.width_px,
        "height": first.height_px,
        "sampler_name": a1111_label(asked.sampler or card.sampler),
        "cfg_scale": asked.guidance,
        "steps": asked.steps,
        "batch_size": n_images,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": card.name,
        "sd_model_hash": hash_of(card),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": asked.strength if asked.image is not None or strength is not None else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": _timestamp(job.created_s),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"sdfleet {__version__}",
        "job_id": job.id,
        "safety": [output.safety for output in job.outputs],
        "withheld": [one.model_dump() for one in withheld_of(job)],
        "warnings": list(job.warnings),
        "cost_credits": job.cost_credits,
    }


def _timestamp(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y%m%d%H%M%S")


# ------------------------------------------------------------------------------------------ progress and interrupting


@router.get("/progress")
async def progress(
    request: Request, *, skip_current_image: Annotated[bool, Query(description="leave the preview out")] = False
) -> ProgressAnswer:
    """How far the caller's pictures are, with a preview of the one in the making."""
    seat = seat_of(request)
    open_jobs = await _open_jobs(request)
    running = [status for status in open_jobs if status.job.state == "running"]
    if not open_jobs:
        return ProgressAnswer(progress=0.0, eta_relative=0.0, state=ProgressState(), current_image=None, textinfo=None)
    shown = (running or open_jobs)[0]
    if not skip_current_image and running and seat.watched != shown.job.id:
        seat.watched = shown.job.id
        request.app.state.background(_keep_preview(house_of(request), seat, shown.job.id))
    current = None
    if not skip_current_image and seat.preview is not None and seat.preview[0] == shown.job.id:
        png = await asyncio.to_thread(pictures.encode, seat.preview[1], "png")
        current = base64.b64encode(png).decode()
    n_steps = sum(status.n_steps for status in open_jobs)
    done = sum(status.step for status in open_jobs)
    return ProgressAnswer(
        progress=round(done / n_steps, 4) if n_steps else 0.0,
        eta_relative=max((status.eta_s or 0.0 for status in open_jobs), default=0.0),
        state=ProgressState(
            interrupted=seat.is_interrupted,
            job=shown.job.id,
            job_count=len(open_jobs),
            job_timestamp=_timestamp(shown.job.created_s),
            job_no=0,
            sampling_step=shown.step,
            sampling_steps=shown.n_steps,
        ),
        current_image=current,
        textinfo=None if running else "Waiting in line",
    )


async def _keep_preview(house: House, seat: Seat, job_id: JobId) -> None:
    """Keep the newest preview of a job while it runs; it is computed only because somebody has asked."""
    try:
        async for event in house.desk.watch(job_id, previews=True):
            if event.progress is not None and event.progress.preview is not None:
                seat.preview = (job_id, event.progress.preview)
    except SdfleetError:
        pass  # the job was pruned, or the server stops: there is nothing to show
    finally:
        if seat.watched == job_id:
            seat.watched = seat.preview = None


async def _open_jobs(request: Request) -> list[JobStatus]:
    """The caller's jobs of this dialect that have not ended, those that run first."""
    statuses, _ = await house_of(request).desk.statuses(
        owner=caller_of(request).owner, states=frozenset({"queued", "running"}), limit=200
    )
    ours = [s for s in statuses if s.job.submission.dialect == DIALECT.name and not s.job.has_ended]
    return sorted(ours, key=lambda status: (status.job.state != "running", status.job.created_s))


@router.post("/interrupt", dependencies=[needs("generate")])
async def interrupt(request: Request) -> dict[str, Any]:
    """Stop the caller's pictures, and those of the caller alone."""
    seat = seat_of(request)
    for status in await _open_jobs(request):
        seat.is_interrupted = True
        await house_of(request).desk.cancel(status.job.id)
    return {}


@router.post("/skip", dependencies=[needs("generate")])
async def skip(request: Request) -> dict[str, Any]:
    """Stop the picture that is being drawn; those that wait go on."""
    open_jobs = await _open_jobs(request)
    if open_jobs and open_jobs[0].job.state == "running":
        seat_of(request).is_interrupted = True
        await house_of(request).desk.cancel(open_jobs[0].job.id)
    return {}


# ----------------------------------------------------------------------------------------------------------- options


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """The caller's options."""
    chosen = seat_of(request).options
    card = await checkpoint(house_of(request), chosen.get("sd_model_checkpoint"))
    return {
        "samples_save": True,
        "samples_format": "png",
        "grid_save": False,
        "img2img_fix_steps": False,
        "CLIP_stop_at_last_layers": 1,
        "sd_vae": "Automatic",
        "sd_checkpoint_hash": hash_of(card),
        "show_progress_every_n_steps": 1,
        "live_previews_enable": True,
        **chosen,
        "sd_model_checkpoint": title_of(card),
    }


async def _bring(house: House, card: Card) -> None:
    """Have a checkpoint that was just chosen in memory before its first picture is asked for."""
    try:
        await house.runtime.load(card.name)
    except SdfleetError as exc:
        # The first picture will tell its caller.
        log.info("a chosen checkpoint cannot be loaded", extra={"model": card.name, "why": str(exc)})


@router.post(
    "/options", openapi_extra={"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}}
)
async def set_options(request: Request) -> None:
    """Choose the caller's checkpoint; other options are kept and given back, and change nothing."""
    data = await request.body()
    if len(data) > MAX_OPTIONS_BYTES:
        raise InvalidValue("options", f"they are longer than {MAX_OPTIONS_BYTES} bytes")
    given = read_json(data)
    if "sd_model_checkpoint" in given:
        card = await checkpoint(house_of(request), given["sd_model_checkpoint"])
        given["sd_model_checkpoint"] = title_of(card)
        if given["sd_model_checkpoint"] != seat_of(request).options.get("sd_model_checkpoint"):
            request.app.state.background(_bring(house_of(request), card))
    seat = seat_of(request)
    chosen = {**seat.options, **given}
    if len(json.dumps(chosen)) > MAX_OPTIONS_BYTES:
        raise InvalidValue("options", f"all together they are longer than {MAX_OPTIONS_BYTES} bytes")
    seat.options = chosen
