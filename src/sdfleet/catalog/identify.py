"""What a folder of weights is: told from its configs and file headers, before anything heavy is loaded.

All faults of a folder are found in one pass and reported together, each with its cure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdfleet.catalog.cards import Card, Family, Ignored
from sdfleet.catalog.component import Component, read_component
from sdfleet.catalog.headers import PICKLES, read_json
from sdfleet.domain import MAX_SIDE_PX, SIDE_MULTIPLE_PX
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, PickleRefused, UnsupportedByModel

FAMILY_OF: Mapping[str, Family] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusion3Img2ImgPipeline": "sd3",
    "StableDiffusion3InpaintPipeline": "sd3",
    "FluxPipeline": "flux",
    "FluxImg2ImgPipeline": "flux",
    "FluxInpaintPipeline": "flux",
    "FluxFillPipeline": "flux",
    "FluxKontextPipeline": "flux",
    "FluxKontextInpaintPipeline": "flux",
    "Flux2KleinPipeline": "flux2",
    "Flux2KleinInpaintPipeline": "flux2",
    "ZImagePipeline": "zimage",
    "ZImageImg2ImgPipeline": "zimage",
    "ZImageInpaintPipeline": "zimage",
}
NEEDED: Mapping[Family, tuple[str, ...]] = {
    "sd": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
    "sd3": ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
    "flux": ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
    "flux2": ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
    "zimage": ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
}
# What to do about files that are missing or damaged, where nobody knows where they came from.
GET_AGAIN = "get these files from where the checkpoint came from"
# What an SDXL refiner does without.
NOT_OF_A_REFINER = ("text_encoder", "tokenizer")
# Read when they are here, never missed: T5 may be left out of SD3.
OPTIONAL: Mapping[Family, tuple[str, ...]] = {
    "sd": (), "sdxl": (), "sd3": ("text_encoder_3", "tokenizer_3"), "flux": (), "flux2": (), "zimage": ()
}  # fmt: skip
# What looks at the finished pictures, and how they are prepared for it. Never missed: many a folder is without.
CHECKED_BY: Mapping[Family, tuple[str, ...]] = {"sd": ("safety_checker", "feature_extractor")}
CHECKER_CLASS = "StableDiffusionSafetyChecker"
# Where a checkpoint's own sampler is one we would not choose (PNDM needs a warm-up and 50 steps).
DEFAULT_SAMPLER: Mapping[Family, str] = {
    "sd": "dpm++_2m", "sdxl": "euler", "sd3": "euler", "flux": "euler",
    "flux2": "euler", "zimage": "euler",
}  # fmt: skip
# Where the denoiser's config does not say a size: transformers without a table of positions take any.
DEFAULT_SIDE_PX: Mapping[Family, int] = {"flux": 1024, "flux2": 1024, "zimage": 1024}
SAMPLER_OF = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """How its authors draw with a kind of checkpoint, and what has no effect on it.

    strength: 1 for models that edit a picture rather than redraw it; None leaves it to the request.
    """

    steps: int
    guidance: float
    ignores: tuple[Ignored, ...] = ()
    strength: float | None = None


# As the authors' model pages show them for the undistilled checkpoints.
ADVICE: Mapping[Family, Advice] = {
    "sd": Advice(steps=30, guidance=7.5),
    "sdxl": Advice(steps=30, guidance=5.0),
    "sd3": Advice(steps=28, guidance=7.0),
    "flux": Advice(steps=28, guidance=3.5, ignores=("negative_prompt",)),
    # klein base.
    "flux2": Advice(steps=50, guidance=4.0, strength=1.0),
    # Turbo's eight network calls. Its model page says 9 steps, of an older diffusers whose last step went nowhere.
    "zimage": Advice(steps=8, guidance=0.0),
}
# For pipelines whose checkpoints are drawn with otherwise than the rest of their family.
ADVICE_OF_CLASS: Mapping[str, Advice] = {
    "FluxFillPipeline": Advice(steps=50, guidance=30.0, ignores=("negative_prompt",), strength=1.0),
    "FluxKontextPipeline": Advice(steps=28, guidance=2.5, ignores=("negative_prompt",), strength=1.0),
    "FluxKontextInpaintPipeline": Advice(steps=28, guidance=2.5, ignores=("negative_prompt",), strength=1.0),
}
# A FLUX.1 network that takes no guidance: schnell, distilled to a few steps. Its class, and its guidance_embeds.
SCHNELL = ("FluxTransformer2DModel", False)
ADVICE_FOR_SCHNELL = Advice(steps=4, guidance=0.0, ignores=("negative_prompt", "guidance"))
# Where model_index.json says is_distilled, as FLUX.2 klein's does.
ADVICE_OF_DISTILLED: Mapping[Family, Advice] = {
    "flux2": Advice(steps=4, guidance=1.0, ignores=("negative_prompt", "guidance"), strength=1.0)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """What a folder holds, complete and readable, and the settings its configs suggest."""

    folder: Path
    family: Family
    pipeline_class: str
    components: tuple[Component, ...]
    width_px: int
    height_px: int
    steps: int
    guidance: float
    sampler: str
    t5: Literal["here", "left_out", "never_had"]
    safety_checker: Literal["here", "left_out", "never_had"] = "never_had"
    ignores: tuple[Ignored, ...] = ()
    strength: float | None = None
    asked_multiple_px: int | None = None

    @property
    def side_multiple_px(self) -> int:
        """Sides of a picture must be a multiple of this: transformers take latents in patches of two by two."""
        return self.asked_multiple_px or (8 if self.family in ("sd", "sdxl") else 16)

    @property
    def n_bytes(self) -> int:
        """Size of all weights as stored."""
        return sum(component.n_bytes for component in self.components)


def drawn_elsewhere(card: Card, folder: Path) -> Identified:
    """What stands in the place of a folder's contents for a model that only another backend has."""
    return Identified(
        folder=folder,
        family=card.family,
        pipeline_class="",
        components=(),
        width_px=card.width_px,
        height_px=card.height_px,
        steps=card.steps,
        guidance=card.guidance,
        sampler=card.sampler,
        t5="never_had",
        ignores=card.ignores,
        strength=card.strength,
        asked_multiple_px=card.side_multiple_px,
    )


def identify(path: Path, *, known: Sequence[str] = (), cure: str = GET_AGAIN) -> Identified:
    """What the diffusers folder at `path` is.

    known: faults that somebody has found already, told with the others. cure: of missing and damaged files.
    Raises CheckpointNotFound, PickleRefused, UnsupportedByModel (a class or layout not served),
    BrokenCheckpoint (every fault of the folder in one message).
    """
    _check_is_folder(path)
    index = read_json(path / "model_index.json", label="model_index.json")
    family = _family(index)
    faults: list[str] = []
    components: dict[str, Component] = {}
    pickles: list[PickleRefused] = []
    needed = tuple(name for name in NEEDED[family] if not (_is_refiner(index) and name in NOT_OF_A_REFINER))
    for name in needed + OPTIONAL[family]:
        is_needed = name in needed
        class_name = _class_name(index.get(name))
        if class_name is None:
            if is_needed:
                faults.append(f"model_index.json names no {name}: it is not a whole {family} checkpoint")
        elif is_needed or (path / name).is_dir():
            try:
                component = read_component(path, name=name, class_name=class_name, faults=faults)
            except PickleRefused as exc:
                pickles.append(exc)
                continue
            if component is not None:
                components[name] = component
    checker = _checker(path, index, family=family, faults=faults)
    if checker is not None:
        components["safety_checker"] = checker
    # What was known and is found here too is told once, as it was found here.
    faults += [fault for fault in known if not any(fault.split(" ", 1)[0] in found for found in faults)]
    if pickles and not faults:
        raise pickles[0]
    faults += [f"{exc.message} ({exc.hint})" for exc in pickles]
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise BrokenCheckpoint(f"the checkpoint at {path} has {count}: {'; '.join(faults)}", hint=cure)
    side_px = _native_side_px(components, family=family)
    advice = _advice(index, components, family=family)
    return Identified(
        folder=path,
        family=family,
        pipeline_class=str(index["_class_name"]),
        components=tuple(components.values()),
        width_px=side_px,
        height_px=side_px,
        steps=advice.steps,
        guidance=advice.guidance,
        sampler=_sampler(components["scheduler"], family=family),
        t5=_t5(family, components),
        safety_checker=_has_checker(family, index, components),
        ignores=advice.ignores,
        strength=advice.strength,
    )


def _check_is_folder(path: Path) -> None:
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            raise PickleRefused(str(path))
        raise UnsupportedByModel(f"{path} is a file", hint="import it: sdfleet models import FILE")
    if not path.is_dir():
        raise CheckpointNotFound(f"there is nothing at {path}", hint="give the folder that holds model_index.json")
    if (path / "model_index.json").is_file():
        return
    if (path / "config.json").is_file():
        kind = read_json(path / "config.json", label="config.json").get("_class_name", "one component")
        raise BrokenCheckpoint(
            f"{path} has no model_index.json: it is {kind}, a part of a checkpoint", hint="give the folder above it"
        )
    names = sorted(child.name for child in path.iterdir() if child.is_file())
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if any(name.endswith(".safetensors") for name in names):
        raise UnsupportedByModel(
            f"{path} holds files of weights and no model_index.json",
            hint="import one of the files: sdfleet models import FILE",
        )
    if pickles:
        raise PickleRefused(str(path / pickles[0]))
    raise CheckpointNotFound(f"{path} has no model_index.json", hint="give a folder in the diffusers layout")


def _family(index: Mapping[str, object]) -> Family:
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise BrokenCheckpoint("model_index.json does not say its _class_name", hint="get this file again")
    family = FAMILY_OF.get(class_name)
    if family is None:
        raise UnsupportedByModel(
            f"{class_name} is not served yet",
            hint="served are Stable Diffusion 1.x and 2.x, SDXL, SD3, FLUX.1, FLUX.2 klein and Z-Image",
        )
    return family


def _is_refiner(index: Mapping[str, object]) -> bool:
    """An SDXL refiner says so itself; a checkpoint that merely lacks its first text encoder is broken."""
    return index.get("requires_aesthetics_score") is True and _class_name(index.get("text_encoder")) is None


def _advice(index: Mapping[str, object], components: Mapping[str, Component], *, family: Family) -> Advice:
    denoiser = components.get("transformer")
    if denoiser is not None and (denoiser.class_name, bool(denoiser.config.get("guidance_embeds"))) == SCHNELL:
        return ADVICE_FOR_SCHNELL
    if index.get("is_distilled") is True and family in ADVICE_OF_DISTILLED:
        return ADVICE_OF_DISTILLED[family]
    return ADVICE_OF_CLASS.get(str(index["_class_name"])) or ADVICE[family]


def _class_name(entry: object) -> str | None:
    """`UNet2DConditionModel` out of `["diffusers", "UNet2DConditionModel"]`; None for `[null, null]` or no entry."""
    match entry:
        case [_, str(class_name)]:
            return class_name
    return None


def _checker(path: Path, index: Mapping[str, object], *, family: Family, faults: list[str]) -> Component | None:
    """The safety checker; None where there is none, or a pickle alone, which does no harm unread."""
    class_name = _class_name(index.get("safety_checker"))
    folder = path / "safety_checker"
    if family not in CHECKED_BY or class_name is None or not any(folder.glob("*.safetensors")):
        return None
    if class_name != CHECKER_CLASS:
        faults.append(f"safety_checker/ is a {class_name}, which is not known here (known is {CHECKER_CLASS})")
        return None
    return read_component(path, name="safety_checker", class_name=class_name, faults=faults)


def _has_checker(
    family: Family, index: Mapping[str, object], components: Mapping[str, Component]
) -> Literal["here", "left_out", "never_had"]:
    if "safety_checker" in components:
        return "here"
    is_named = family in CHECKED_BY and _class_name(index.get("safety_checker")) is not None
    return "left_out" if is_named else "never_had"


def _native_side_px(components: Mapping[str, Component], *, family: Family) -> int:
    denoiser = components.get("unet") or components["transformer"]
    sample = denoiser.config.get("sample_size")
    if isinstance(sample, list) and sample:
        sample = sample[0]
    blocks = components["vae"].config.get("block_out_channels")
    scale = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else 8
    side_px = sample * scale if type(sample) is int and sample > 0 else DEFAULT_SIDE_PX.get(family, 512)
    side_px = min(max(side_px, 16), MAX_SIDE_PX, _most_side_px(denoiser, scale=scale))
    return side_px - side_px % SIDE_MULTIPLE_PX


def _most_side_px(denoiser: Component, *, scale: int) -> int:
    """The side that a table of positions ends at; the largest of all where there is none."""
    n_positions, patch = denoiser.config.get("pos_embed_max_size"), denoiser.config.get("patch_size", 1)
    if type(n_positions) is int and type(patch) is int and n_positions * patch > 0:
        return n_positions * patch * scale
    return MAX_SIDE_PX


def _sampler(scheduler: Component, *, family: Family) -> str:
    class_name = scheduler.config.get("_class_name")
    named = SAMPLER_OF.get(class_name) if isinstance(class_name, str) else None
    return named or DEFAULT_SAMPLER[family]


def _t5(family: Family, components: Mapping[str, Component]) -> Literal["here", "left_out", "never_had"]:
    has_t5 = any(component.class_name == "T5EncoderModel" for component in components.values())
    if has_t5 and set(OPTIONAL[family]) <= components.keys():
        return "here"
    return "left_out" if OPTIONAL[family] else "never_had"
