"""Which folders and requests the engines of other projects can draw, and what they make of each option.

Asked twice: by the parent process when a request comes in, and by the child before it loads anything. It reads a few
small files and needs only the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from sdfleet.domain import Drawing, StepCache, T5Use, Unsaid
from sdfleet.engine.prompt import parse_prompt
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

GuestId = Literal["mflux", "diffusionkit"]
Kind = Literal["zimage", "flux_dev", "flux_schnell", "klein", "klein_base", "sd3"]

TITLES: Mapping[GuestId, str] = {"mflux": "mflux", "diffusionkit": "DiffusionKit"}
FAMILIES: Mapping[GuestId, tuple[str, ...]] = {"mflux": ("zimage", "flux", "flux2"), "diffusionkit": ("sd3",)}
SAMPLER = "euler"
# Both cut latents into patches of two, eight pixels each.
SIDE_MULTIPLE_PX = 16
# DiffusionKit's encoder shrinks any other picture to such a size.
DIFFUSIONKIT_IMAGE_MULTIPLE_PX = 64

_PIPELINES: Mapping[GuestId, tuple[str, ...]] = {
    "mflux": ("ZImagePipeline", "FluxPipeline", "Flux2KleinPipeline"),
    "diffusionkit": ("StableDiffusion3Pipeline",),
}
_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "ZImagePipeline": ("transformer", "vae", "text_encoder"),
    "FluxPipeline": ("transformer", "vae", "text_encoder", "text_encoder_2"),
    "Flux2KleinPipeline": ("transformer", "vae", "text_encoder"),
    "StableDiffusion3Pipeline": ("transformer", "vae", "text_encoder", "text_encoder_2"),
}
_ELSEWHERE = "take sdfleet's own engine for it: backend sd or flux-local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a folder is to a guest. weights_bytes: of all safetensors files that are read."""

    guest: GuestId
    kind: Kind
    takes_guidance: bool
    takes_negative_prompt: bool
    weights_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What of a request matters to a guest. None: filled in from the card, which these models were made for."""

    prompt: str
    negative_prompt: str = ""
    width_px: int | None = None
    height_px: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    has_image: bool = False
    has_mask: bool = False
    strength: float | None = None
    has_loras: bool = False
    has_embeddings: bool = False
    t5: T5Use = "auto"
    step_cache: StepCache = "off"
    allow_degraded: bool = False


def wish_of(drawing: Drawing) -> Wish:
    """The wish that a drawing stands for."""
    return Wish(
        prompt=drawing.prompt,
        negative_prompt=drawing.negative_prompt,
        width_px=drawing.width_px,
        height_px=drawing.height_px,
        steps=drawing.steps,
        guidance=drawing.guidance,
        sampler=drawing.sampler,
        has_image=drawing.image is not None,
        has_mask=drawing.mask is not None,
        strength=drawing.strength,
        has_loras=bool(drawing.loras),
        has_embeddings=bool(drawing.embeddings),
        t5=drawing.t5,
        step_cache=drawing.step_cache,
        allow_degraded=drawing.allow_degraded,
    )


def fit(guest: GuestId, folder: Path) -> Fit:
    """What the folder is to this guest. Raises UnsupportedByModel, or BrokenCheckpoint for configs that are no JSON."""
    title = TITLES[guest]
    index = _read(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in _PIPELINES[guest]:
        raise UnsupportedByModel(
            f"{title} draws {', '.join(_PIPELINES[guest])}, and {folder.name} is a {pipeline}", hint=_ELSEWHERE
        )
    config = _read(folder / "transformer" / "config.json")
    if "quantization_config" in config:
        raise UnsupportedByModel(f"the weights of {folder.name} are quantised in a way {title} cannot read")
    if guest == "diffusionkit" and config.get("dual_attention_layers"):
        raise UnsupportedByModel(f"{title} knows no Stable Diffusion 3.5 medium", hint=_ELSEWHERE)
    kind = _kind(pipeline, index, config)
    return Fit(
        guest=guest,
        kind=kind,
        takes_guidance=kind in {"flux_dev", "klein_base", "sd3"},
        takes_negative_prompt=kind == "sd3",
        weights_bytes=_weights_bytes(folder, pipeline, title),
    )


def remarks(fitted: Fit, wish: Wish) -> tuple[str, ...]:
    """What the caller should be told, one warning each. Raises UnsupportedByModel for what cannot be drawn so."""
    title = TITLES[fitted.guest]
    _refuse(fitted, wish, title)
    said = []
    if wish.guidance is not None and wish.guidance > 1 and not fitted.takes_guidance:
        said.append(f"guidance was left out: this model takes none with {title}")
    if wish.negative_prompt and not fitted.takes_negative_prompt:
        said.append(f"the negative prompt was left out: this model takes none with {title}")
    if wish.sampler not in {None, SAMPLER}:
        said.append(f"{title} has one sampler, {SAMPLER}: {wish.sampler} was not used")
    if parse_prompt(wish.prompt).is_weighted or parse_prompt(wish.negative_prompt).is_weighted:
        said.append(f"{title} knows no weights within prompts: they were left out, the words stayed")
    if wish.step_cache != "off":
        said.append(f"{title} has no step cache: every step was computed")
    if wish.t5 == "skip":
        said.append(f"{title} reads the prompt with every text encoder that is here, T5 too")
    return tuple(said)


def plain_prompt(text: str) -> str:
    """A prompt without brackets and weights, for text encoders that read it as it stands."""
    parsed = parse_prompt(text)
    return parsed.text if parsed.is_weighted else text


def unsaid(fitted: Fit, wish: Wish) -> tuple[Unsaid, ...]:
    """Names of the fields that had no part in the picture, for its metadata."""
    found: list[Unsaid] = [] if fitted.takes_guidance else ["guidance"]
    if wish.sampler not in {None, SAMPLER}:
        found.append("sampler")
    return tuple(found)


def _refuse(fitted: Fit, wish: Wish, title: str) -> None:
    if wish.has_loras or wish.has_embeddings:
        what = "LoRAs" if wish.has_loras else "embeddings"
        raise UnsupportedByModel(f"{title} is not given {what} by sdfleet", hint=_ELSEWHERE)
    if wish.has_mask:
        raise UnsupportedByModel(f"{title} redraws whole pictures, without a mask", hint=_ELSEWHERE)
    for name, side_px in (("width", wish.width_px), ("height", wish.height_px)):
        if side_px is not None and side_px % SIDE_MULTIPLE_PX:
            raise UnsupportedByModel(
                f"{title} draws sides that are multiples of {SIDE_MULTIPLE_PX} px, and the {name} is {side_px}",
                hint=f"use {side_px - side_px % SIDE_MULTIPLE_PX or SIDE_MULTIPLE_PX}",
            )
    if not wish.has_image:
        return
    if fitted.kind in {"klein", "klein_base"} and (wish.strength is None or wish.strength >= 1):
        # Its editing class takes pictures as references; at full strength this one would not look at them at all.
        raise UnsupportedByModel(
            f"{title} redraws pictures with this model and does not edit them",
            hint="give a strength below 1, or take backend flux-local, which edits",
        )
    if fitted.guest == "mflux":
        if wish.steps is not None and wish.strength is not None and steps_to_draw(wish.steps, wish.strength) < 1:
            raise UnsupportedByModel(
                f"{wish.steps} steps at strength {wish.strength:g} leave none to draw", hint="ask for more steps"
            )
        return
    for side_px in (wish.width_px, wish.height_px):
        if side_px is not None and side_px % DIFFUSIONKIT_IMAGE_MULTIPLE_PX:
            raise UnsupportedByModel(
                f"{title} redraws pictures whose sides are multiples of {DIFFUSIONKIT_IMAGE_MULTIPLE_PX} px",
                hint=f"use {max(64, side_px - side_px % DIFFUSIONKIT_IMAGE_MULTIPLE_PX)}",
            )


def steps_to_draw(steps: int, strength: float) -> int:
    """Of so many steps, those that a picture redrawn at this strength goes through in mflux, which skips one at least.

    >>> steps_to_draw(8, 0.75), steps_to_draw(4, 0.25), steps_to_draw(1, 0.5), steps_to_draw(4, 1.0)
    (6, 1, 0, 4)
    """
    return steps if strength >= 1 else steps - max(1, int(steps * (1 - strength)))


def _kind(pipeline: str, index: Mapping[str, object], config: Mapping[str, object]) -> Kind:
    match pipeline:
        case "ZImagePipeline":
            return "zimage"
        case "FluxPipeline":
            return "flux_dev" if config.get("guidance_embeds") else "flux_schnell"
        case "Flux2KleinPipeline":
            return "klein" if index.get("is_distilled") else "klein_base"
        case _:
            return "sd3"


def _weights_bytes(folder: Path, pipeline: str, title: str) -> int:
    n_bytes = 0
    for name in _COMPONENTS[pipeline]:
        files = list((folder / name).glob("*.safetensors"))
        if not files:
            raise UnsupportedByModel(
                f"{title} reads folders in the diffusers layout, and {folder.name}/{name} holds no safetensors file",
                hint=_ELSEWHERE,
            )
        n_bytes += sum(file.stat().st_size for file in files)
    return n_bytes


def _read(path: Path) -> Mapping[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise UnsupportedByModel(f"there is no {path.name} at {path.parent}", hint=_ELSEWHERE) from exc
    except (OSError, ValueError) as exc:
        raise BrokenCheckpoint(f"{path} cannot be read: {exc}", hint="get the model again") from exc
    return cast("Mapping[str, object]", found) if isinstance(found, dict) else {}
