"""Pictures drawn by our engine and by diffusers' own pipelines, from the same folder and request, to be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sdfleet.domain import Drawing, JobId, Picture
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, Event, JobFailed, PictureDone
from sdfleet.engine.sampler_names import parse_sampler
from tests import tiny, toys

Pixels = npt.NDArray[np.uint8]

FAMILY_OF = {
    "sd15": "sd", "sd15-checked": "sd", "sd15-inpaint": "sd", "sd21": "sd",
    "sdxl": "sdxl", "sdxl-inpaint": "sdxl",
    "sdxl-refiner": "sdxl",
    "sd3": "sd3", "sd3-no-t5": "sd3", "sd35": "sd3",
    "flux-dev": "flux", "flux-schnell": "flux", "flux-fill": "flux", "flux-kontext": "flux",
    "klein": "flux2", "klein-base": "flux2", "zimage": "zimage",
}  # fmt: skip
PIPELINES = {
    "sd": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "sd3": ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "flux": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    # Of one family, but told apart by the class that the folder names.
    "FluxFillPipeline": ("", "", "FluxFillPipeline"),
    "FluxKontextPipeline": ("FluxKontextPipeline", "FluxKontextPipeline", "FluxKontextInpaintPipeline"),
}
FLOW_FAMILIES = ("sd3", "flux")
FLOAT32 = EngineOptions(device="cpu", dtype="float32", n_threads=1)


def drawing(name: str, folder: Path, *, job: str = "job", **changes: Any) -> Drawing:
    """A drawing on a toy checkpoint, with everything filled in."""
    fields: dict[str, Any] = {
        "job_id": JobId(job),
        "checkpoint": str(folder),
        "family": FAMILY_OF[name],
        "prompt": "a cat on the moon",
        "negative_prompt": "blurry",
        "width_px": toys.SIDE_PX,
        "height_px": toys.SIDE_PX,
        "steps": 4,
        "guidance": 5.0,
        "seed": 7,
        "n_images": 1,
        "sampler": "euler",
    }
    return Drawing(**{**fields, **changes})


def photo(side_px: int = toys.SIDE_PX) -> Picture:
    """An input picture with a ramp in every channel."""
    y, x = np.mgrid[0:side_px, 0:side_px] * 255 // (side_px - 1)
    pixels = np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)
    return Picture(width_px=side_px, height_px=side_px, mode="RGB", data=pixels.tobytes())


def square_mask(side_px: int = toys.SIDE_PX) -> Picture:
    """White in the middle, black around."""
    pixels = np.zeros((side_px, side_px), np.uint8)
    pixels[side_px // 4 : side_px * 3 // 4, side_px // 4 : side_px * 3 // 4] = 255
    return Picture(width_px=side_px, height_px=side_px, mode="L", data=pixels.tobytes())


def pixels_of(picture: Picture) -> Pixels:
    """[h, w, 3] uint8."""
    return np.frombuffer(picture.data, np.uint8).reshape(picture.height_px, picture.width_px, 3)


def run(engine: Engine, *, most_turns: int = 10_000) -> list[Event]:
    """Step until idle; everything that was said."""
    events: list[Event] = []
    for _ in range(most_turns):
        if engine.is_idle:
            return events
        events += engine.step()
    raise AssertionError("the engine is still busy")


def pictures(events: Iterable[Event]) -> Mapping[tuple[str, int], Pixels]:
    """Pixels by (job, image index). A failed job is an error of the test."""
    drawn: dict[tuple[str, int], Pixels] = {}
    for event in events:
        if isinstance(event, JobFailed):
            raise event.error
        if isinstance(event, PictureDone):
            drawn[event.job_id, event.image_index] = pixels_of(event.finished.picture)
    return drawn


def ours(*drawings: Drawing, options: EngineOptions = FLOAT32) -> list[Pixels]:
    """The first picture of each drawing, all submitted at once to one engine."""
    engine = Engine(options)
    try:
        for one in drawings:
            engine.submit(one)
        drawn = pictures(run(engine))
        return [drawn[one.job_id, 0] for one in drawings]
    finally:
        engine.close()


def theirs(one: Drawing) -> Pixels:
    """The same picture by diffusers' own pipeline."""
    import diffusers

    base = tiny.load(Path(one.checkpoint))
    names = PIPELINES.get(type(base).__name__) or PIPELINES[one.family]
    cls = getattr(diffusers, names[("txt2img", "img2img", "inpaint").index(one.task)])
    more = {"requires_safety_checker": False} if one.family == "sd" else {}
    if base.config.get("requires_aesthetics_score"):
        more = {key: base.config[key] for key in ("requires_aesthetics_score", "force_zeros_for_empty_prompt")}
    pipe = cls(**base.components, **more)
    pipe.scheduler = _scheduler(one, pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": one.prompt,
        "num_inference_steps": one.steps,
        "guidance_scale": one.guidance,
        "generator": torch.Generator().manual_seed(one.seed),
        "output_type": "latent",
    }
    if one.guidance > 1 and one.negative_prompt and one.family != "flux":
        arguments["negative_prompt"] = one.negative_prompt
    if one.image is not None:
        arguments |= {"image": _image(one.image), "strength": one.strength}
    if one.mask is not None:
        arguments["mask_image"] = _image(one.mask)
    if one.task != "img2img" or one.family in FLOW_FAMILIES:
        arguments |= {"width": one.width_px, "height": one.height_px}
    if one.family == "flux":
        arguments["max_sequence_length"] = 512 if pipe.transformer.config.guidance_embeds else 256
    if "Kontext" in cls.__name__:
        # Its own idea of size is 1024x1024 pixels in the nearest of seventeen shapes.
        arguments |= {"max_area": one.width_px * one.height_px, "_auto_resize": False}
        arguments = {key: value for key, value in arguments.items() if key != "strength" or one.mask is not None}
    with torch.inference_mode():
        # Decoded here and not by the pipeline: SD3's inpainting pipeline forgets the VAE's shift when it decodes.
        latents = pipe(**arguments).images
        if one.family == "flux":
            latents = pipe._unpack_latents(latents, one.height_px, one.width_px, 8)
        config = pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        decoded = pipe.vae.decode(latents / config.scaling_factor + shift, return_dict=False)[0]
    return np.asarray((decoded[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).round().to(torch.uint8))


def _image(picture: Picture) -> Image.Image:
    return Image.frombytes(picture.mode, (picture.width_px, picture.height_px), picture.data)


def _scheduler(one: Drawing, config: Any) -> Any:
    """diffusers' class for the sampler, made from the folder's own config as a diffusers user would."""
    import diffusers

    name = parse_sampler(one.sampler)
    is_flow = one.family in FLOW_FAMILIES
    more: dict[str, Any] = {}
    if name.spacing != "default":
        more[f"use_{name.spacing}_sigmas"] = True
    if name.rule == "pndm":
        more["skip_prk_steps"] = True  # as every SD 1.5 checkpoint's own config says
    if name.rule == "dpm++_2m_sde":
        more["algorithm_type"] = "sde-dpmsolver++"
    if is_flow:
        if one.family == "flux" and name.rule == "heun":
            return _heun_on_euler_sigmas(config)
        flow = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
        if name.rule in flow:
            return getattr(diffusers, flow[name.rule]).from_config(config, **more)
        more |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
    return getattr(diffusers, name.class_name).from_config(config, **more)


def _heun_on_euler_sigmas(config: Any) -> Any:
    """diffusers' Heun, which FLUX's pipelines cannot use as it is: it takes no sigmas and knows no shift by size."""
    import diffusers

    class Heun(diffusers.FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
        def set_timesteps(self, _n_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None) -> None:
            euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
            euler.set_timesteps(sigmas=sigmas, mu=mu, device=device)
            super().set_timesteps(len(sigmas), device)
            self.timesteps = torch.cat([euler.timesteps[:1], euler.timesteps[1:].repeat_interleave(2)])
            inner = euler.sigmas[1:-1].repeat_interleave(2)
            self.sigmas = torch.cat([euler.sigmas[:1], inner, euler.sigmas[-1:]])

    return Heun.from_config(config)


def most_levels_apart(a: Pixels, b: Pixels) -> int:
    """The largest difference of any value, in levels of 255."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())
