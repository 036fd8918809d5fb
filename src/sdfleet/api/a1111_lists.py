"""The lists of `/sdapi/v1`: what can be chosen; empty ones where there is nothing; notes; extras."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any

import psutil
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from sdfleet.api.a1111 import FAULTS, chosen, hash_of, title_of
from sdfleet.api.a1111_wire import (
    ExtraAsked,
    ExtraBatchAnswer,
    ExtraBatchAsked,
    ExtraSingleAnswer,
    ExtraSingleAsked,
    PngInfoAsked,
)
from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import as_json, house_of
from sdfleet.api.bodies import described, from_base64, json_body
from sdfleet.catalog.adapter_use import fits
from sdfleet.engine.sampler_names import SamplerName, a1111_label, known_samplers, parse_sampler
from sdfleet.errors import InvalidValue, NotFound
from sdfleet.storage import pictures, retouch

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], responses=FAULTS)

_SCHEDULES = (("automatic", "Automatic"), ("karras", "Karras"), ("exponential", "Exponential"), ("beta", "Beta"))
# A picture above this is refused before it is enlarged.
MAX_UPSCALED_PX = 64 * 2**20


@router.get("/sd-models")
async def sd_models(request: Request) -> list[dict[str, Any]]:
    """The models that are here."""
    entries = await asyncio.to_thread(house_of(request).catalog.entries)
    return [
        {
            "title": title_of(entry.card),
            "model_name": entry.card.name,
            "hash": hash_of(entry.card),
            "sha256": None,
            "filename": f"{entry.card.name}.safetensors",
            "config": None,
        }
        for entry in entries
    ]


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    """Samplers by the names that these clients know."""
    rules = [parsed for name in known_samplers() if (parsed := parse_sampler(name)).spacing == "default"]
    return [{"name": a1111_label(rule), "aliases": _aliases(rule), "options": {}} for rule in rules]


def _aliases(sampler: SamplerName) -> list[str]:
    return [f"k_{sampler.rule}", sampler.rule]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """Noise schedules that a sampler can be combined with."""
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in _SCHEDULES
    ]


@router.get("/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    """Ways to enlarge a finished picture."""
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
        for name in ("None", *retouch.UPSCALERS)
    ]


@router.get("/latent-upscale-modes")
async def latent_upscale_modes() -> list[dict[str, str]]:
    """None: `enable_hr` is refused here."""
    return []


@router.get("/loras")
async def loras(request: Request) -> list[dict[str, Any]]:
    """The LoRAs that are here, for `<lora:name:scale>` in a prompt. path: below the models folder."""
    catalog = house_of(request).catalog
    return [
        {
            "name": adapter.name,
            "alias": adapter.alias,
            "path": str(adapter.path.relative_to(catalog.models_folder)),
            "metadata": dict(adapter.metadata),
        }
        for adapter in await asyncio.to_thread(catalog.adapters.all, "lora")
    ]


@router.get("/sd-vae")
@router.get("/sd-modules")
@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/prompt-styles")
@router.get("/script-info")
@router.get("/extensions")
async def nothing() -> list[dict[str, Any]]:
    """This server has none of these."""
    return []


@router.get("/embeddings")
async def embeddings(request: Request) -> dict[str, dict[str, Any]]:
    """The embeddings that the caller's checkpoint can read, by what a prompt calls them, and the others."""
    catalog = house_of(request).catalog
    card = await chosen(request)
    found = await asyncio.to_thread(lambda: catalog.inspect(catalog.resolve(card.name)))
    told: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for adapter in await asyncio.to_thread(catalog.adapters.all, "embedding"):
        told["loaded" if fits(adapter, found) else "skipped"][adapter.facts.word or adapter.name] = {
            "step": None,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
            "shape": sum((adapter.facts.widths or {}).values()),
            "vectors": adapter.facts.n_vectors,
        }
    return told


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """This server has none."""
    return {"txt2img": [], "img2img": []}


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, Any]:
    """Flags of another program's command line."""
    return {}


@router.get("/memory")
async def memory(request: Request) -> dict[str, dict[str, Any]]:
    """Memory of the machine, in bytes."""
    check_right(caller_of(request), "read")
    found = psutil.virtual_memory()
    return {"ram": {"free": found.available, "used": found.used, "total": found.total}, "cuda": {}}


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
@router.post("/refresh-vae")
@router.post("/refresh-embeddings")
async def refresh() -> dict[str, Any]:
    """Nothing to do: the catalogue is read anew with every request."""
    return {}


@router.post("/reload-checkpoint", dependencies=[needs("manage")])
async def reload_checkpoint(request: Request) -> dict[str, Any]:
    """Have the caller's checkpoint in memory."""
    await house_of(request).runtime.load((await chosen(request)).name)
    return {}


@router.post("/unload-checkpoint", dependencies=[needs("manage")])
async def unload_checkpoint(request: Request) -> dict[str, Any]:
    """Let the caller's checkpoint leave the memory, as soon as the jobs that draw with it have ended."""
    await house_of(request).runtime.release((await chosen(request)).name)
    return {}


@router.post("/png-info", openapi_extra=described(PngInfoAsked))
async def png_info(asked: Annotated[PngInfoAsked, Depends(json_body(PngInfoAsked))]) -> dict[str, Any]:
    """How a picture was made, as its file says."""
    data = await asyncio.to_thread(from_base64, asked.image, field="image")
    metadata = await asyncio.to_thread(pictures.read_metadata, data)
    if metadata is None:
        return {"info": "", "items": {}, "parameters": {}}
    info = await asyncio.to_thread(pictures.read_infotext, data)
    parameters = metadata.model_dump(mode="json", exclude_none=True)
    return {"info": info, "items": {"parameters": info}, "parameters": parameters}


@router.post(
    "/extra-single-image",
    dependencies=[needs("generate")],
    response_model=ExtraSingleAnswer,
    openapi_extra=described(ExtraSingleAsked),
)
async def extra_single(asked: Annotated[ExtraSingleAsked, Depends(json_body(ExtraSingleAsked))]) -> Response:
    """A finished picture, enlarged."""
    return await as_json(ExtraSingleAnswer(image=await asyncio.to_thread(_enlarged, asked, asked.image)))


@router.post(
    "/extra-batch-images",
    dependencies=[needs("generate")],
    response_model=ExtraBatchAnswer,
    openapi_extra=described(ExtraBatchAsked),
)
async def extra_batch(asked: Annotated[ExtraBatchAsked, Depends(json_body(ExtraBatchAsked))]) -> Response:
    """Several finished pictures, enlarged."""
    images = [await asyncio.to_thread(_enlarged, asked, each.data) for each in asked.image_list]
    return await as_json(ExtraBatchAnswer(images=images))


def _enlarged(asked: ExtraAsked, image: str) -> str:
    if asked.gfpgan_visibility or asked.codeformer_visibility or asked.extras_upscaler_2_visibility:
        raise InvalidValue("extras", "faces are not restored here, and there is one upscaler at a time", hint="use 0")
    data = from_base64(image, field="image")
    picture = pictures.decode(data)
    if asked.upscaler_1 in {"", "None"}:
        return base64.b64encode(pictures.encode(picture, "png", pictures.read_metadata(data))).decode()
    if asked.resize_mode == 1:
        width, height = asked.upscaling_resize_w, asked.upscaling_resize_h
        fit: retouch.Fit = "crop" if asked.upscaling_crop else "stretch"
        picture = retouch.brought(picture, width_px=width, height_px=height, fit=fit)
    else:
        width = max(1, round(picture.width_px * asked.upscaling_resize))
        height = max(1, round(picture.height_px * asked.upscaling_resize))
    if width * height > MAX_UPSCALED_PX:
        raise InvalidValue("upscaling_resize", f"{width}x{height} is more than {MAX_UPSCALED_PX} pixels")
    larger = retouch.enlarged(picture, width_px=width, height_px=height, upscaler=asked.upscaler_1)
    return base64.b64encode(pictures.encode(larger, "png", pictures.read_metadata(data))).decode()


@router.post("/interrogate")
async def interrogate() -> dict[str, str]:
    """No model here describes pictures."""
    raise NotFound("Model not found", hint="no model on this server describes pictures")
