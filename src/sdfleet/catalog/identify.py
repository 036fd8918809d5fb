"""What a folder of weights is: told from its configs and file headers, before anything heavy is loaded.

All faults of a folder are found in one pass and reported together, each with its cure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdfleet.catalog.cards import Family
from sdfleet.catalog.headers import Header, read_header, read_json
from sdfleet.domain import MAX_SIDE_PX, SIDE_MULTIPLE_PX
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, PickleRefused, UnsupportedByModel

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
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
}
NEEDED: Mapping[Family, tuple[str, ...]] = {
    "sd": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
    "sd3": ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
}
# Read when they are here, never missed: T5 may be left out of SD3.
OPTIONAL: Mapping[Family, tuple[str, ...]] = {"sd": (), "sdxl": (), "sd3": ("text_encoder_3", "tokenizer_3")}
# steps and guidance as the authors' model pages show them for the undistilled checkpoints.
DEFAULT_STEPS: Mapping[Family, int] = {"sd": 30, "sdxl": 30, "sd3": 28}
DEFAULT_GUIDANCE: Mapping[Family, float] = {"sd": 7.5, "sdxl": 5.0, "sd3": 7.0}
# Where a checkpoint's own sampler is one we would not choose (PNDM needs a warm-up and 50 steps).
DEFAULT_SAMPLER: Mapping[Family, str] = {"sd": "dpm++_2m", "sdxl": "euler", "sd3": "euler"}
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
class Component:
    """One part of a checkpoint; `bytes_by_dtype` is empty for parts without weights (tokenizers, scheduler)."""

    name: str
    class_name: str
    config: Mapping[str, object] = field(repr=False)
    bytes_by_dtype: Mapping[str, int] = field(default_factory=dict)
    n_parameters: int = 0

    @property
    def n_bytes(self) -> int:
        """Size of its weights as stored."""
        return sum(self.bytes_by_dtype.values())


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

    @property
    def n_bytes(self) -> int:
        """Size of all weights as stored."""
        return sum(component.n_bytes for component in self.components)


def identify(path: Path) -> Identified:
    """What the diffusers folder at `path` is.

    Raises CheckpointNotFound, PickleRefused, UnsupportedByModel (a class or layout not served),
    BrokenCheckpoint (every fault of the folder in one message).
    """
    _check_is_folder(path)
    index = read_json(path / "model_index.json", label="model_index.json")
    family = _family(index)
    faults: list[str] = []
    components: dict[str, Component] = {}
    for name in NEEDED[family] + OPTIONAL[family]:
        is_needed = name in NEEDED[family]
        class_name = _class_name(index.get(name))
        if class_name is None:
            if is_needed:
                faults.append(f"model_index.json names no {name}: it is not a whole {family} checkpoint")
        elif is_needed or (path / name).is_dir():
            component = _component(path, name=name, class_name=class_name, faults=faults)
            if component is not None:
                components[name] = component
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise BrokenCheckpoint(
            f"the checkpoint at {path} has {count}: {'; '.join(faults)}",
            hint="get these files from where the checkpoint came from",
        )
    side_px = _native_side_px(components)
    return Identified(
        folder=path,
        family=family,
        pipeline_class=str(index["_class_name"]),
        components=tuple(components.values()),
        width_px=side_px,
        height_px=side_px,
        steps=DEFAULT_STEPS[family],
        guidance=DEFAULT_GUIDANCE[family],
        sampler=_sampler(components["scheduler"], family=family),
        t5=_t5(family, components),
    )


def _check_is_folder(path: Path) -> None:
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            raise PickleRefused(str(path))
        if path.suffix.lower() == ".safetensors":
            read_header(path)
            raise UnsupportedByModel(
                f"{path} is a single file, and only folders in the diffusers layout are read for now",
                hint="convert it with diffusers' from_single_file() and save_pretrained(), then import that folder",
            )
        raise UnsupportedByModel(f"{path} is not a checkpoint", hint="give a folder in the diffusers layout")
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
            f"{path} holds single-file weights and no model_index.json; only the diffusers layout is read for now",
            hint="convert it with diffusers' from_single_file() and save_pretrained(), then import that folder",
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
            f"{class_name} is not served yet", hint="served are Stable Diffusion 1.x and 2.x, SDXL and SD3"
        )
    if _class_name(index.get("text_encoder")) is None and _class_name(index.get("text_encoder_2")) is not None:
        raise UnsupportedByModel(
            "a refiner (a checkpoint without its first text encoder) is not served yet",
            hint="import the base checkpoint",
        )
    return family


def _class_name(entry: object) -> str | None:
    """`UNet2DConditionModel` out of `["diffusers", "UNet2DConditionModel"]`; None for `[null, null]` or no entry."""
    match entry:
        case [_, str(class_name)]:
            return class_name
    return None


def _component(path: Path, *, name: str, class_name: str, faults: list[str]) -> Component | None:
    folder = path / name
    if not folder.is_dir():
        faults.append(f"the folder {name}/ is missing")
        return None
    if name == "scheduler":
        config = _config(folder / "scheduler_config.json", faults)
        return None if config is None else Component(name=name, class_name=class_name, config=config)
    if name.startswith("tokenizer"):
        return _tokenizer(folder, class_name=class_name, faults=faults)
    config = _config(folder / "config.json", faults)
    headers = _weights(folder, faults)
    if config is None or not headers:
        return None
    _check_fits(name, config, headers, faults)
    totals: dict[str, int] = {}
    for header in headers:
        for dtype, n_bytes in header.bytes_by_dtype.items():
            totals[dtype] = totals.get(dtype, 0) + n_bytes
    return Component(
        name=name,
        class_name=class_name,
        config=config,
        bytes_by_dtype=totals,
        n_parameters=sum(header.n_parameters for header in headers),
    )


def _config(file: Path, faults: list[str]) -> Mapping[str, object] | None:
    label = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        faults.append(f"{label} is missing")
        return None
    try:
        return read_json(file, label=label)
    except BrokenCheckpoint as exc:
        faults.append(exc.message)
        return None


def _tokenizer(folder: Path, *, class_name: str, faults: list[str]) -> Component | None:
    has_whole = (folder / "tokenizer.json").is_file()
    parts = ("spiece.model",) if class_name.startswith("T5") else ("vocab.json", "merges.txt")
    missing = [] if has_whole else [name for name in parts if not (folder / name).is_file()]
    faults.extend(f"{folder.name}/{name} is missing" for name in missing)
    config = _config(folder / "tokenizer_config.json", faults)
    if missing or config is None:
        return None
    return Component(name=folder.name, class_name=class_name, config=config)


def _weights(folder: Path, faults: list[str]) -> list[Header]:
    names = sorted(child.name for child in folder.iterdir() if child.is_file())
    indexes = [name for name in names if re.search(r"\.safetensors\.index(\.\w+)?\.json$", name)]
    plain = [name for name in ("diffusion_pytorch_model.safetensors", "model.safetensors") if name in names]
    variants = [name for name in names if re.fullmatch(r"(diffusion_pytorch_model|model)\.\w+\.safetensors", name)]
    files: list[str]
    if plain:
        files = [plain[0]]
    elif indexes:
        files = _shards(folder, index=min(indexes, key=len), faults=faults)
    elif variants:
        files = variants[:1]
    else:
        pickles = [name for name in names if name.lower().endswith(PICKLES)]
        if pickles:
            raise PickleRefused(str(folder / pickles[0]))
        faults.append(f"{folder.name}/ has no weights (*.safetensors)")
        return []
    headers = []
    for name in files:
        try:
            headers.append(read_header(folder / name, label=f"{folder.name}/{name}"))
        except BrokenCheckpoint as exc:
            faults.append(exc.message)
    return headers if len(headers) == len(files) else []


def _shards(folder: Path, *, index: str, faults: list[str]) -> list[str]:
    label = f"{folder.name}/{index}"
    try:
        weight_map = read_json(folder / index, label=label).get("weight_map")
    except BrokenCheckpoint as exc:
        faults.append(exc.message)
        return []
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    # A shard is a neighbour of its index; a path in there would lead out of the folder.
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        faults.append(f"{label} lists no shards that can be read")
        return []
    missing = [name for name in names if not (folder / name).is_file()]
    faults.extend(f"{folder.name}/{name} is missing (one of {len(names)} shards)" for name in missing)
    return [] if missing else names


def _check_fits(name: str, config: Mapping[str, object], headers: list[Header], faults: list[str]) -> None:
    """The cheapest sign that weights belong to another config: the first layer's input channels."""
    tensor, key = {
        "unet": ("conv_in.weight", "in_channels"),
        "transformer": ("pos_embed.proj.weight", "in_channels"),
        "vae": ("encoder.conv_in.weight", "in_channels"),
    }.get(name, ("", ""))
    for header in headers:
        shape = header.shapes.get(tensor)
        if shape is not None and len(shape) == 4 and key in config and shape[1] != config[key]:
            faults.append(
                f"{name}/config.json says {key} {config[key]}, its weights have {shape[1]}: they do not belong together"
            )


def _native_side_px(components: Mapping[str, Component]) -> int:
    denoiser = components.get("unet") or components["transformer"]
    sample = denoiser.config.get("sample_size")
    if isinstance(sample, list) and sample:
        sample = sample[0]
    blocks = components["vae"].config.get("block_out_channels")
    scale = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else 8
    side_px = sample * scale if type(sample) is int and sample > 0 else 512
    side_px = min(max(side_px, 16), MAX_SIDE_PX)
    return side_px - side_px % SIDE_MULTIPLE_PX


def _sampler(scheduler: Component, *, family: Family) -> str:
    class_name = scheduler.config.get("_class_name")
    named = SAMPLER_OF.get(class_name) if isinstance(class_name, str) else None
    return named or DEFAULT_SAMPLER[family]


def _t5(family: Family, components: Mapping[str, Component]) -> Literal["here", "left_out", "never_had"]:
    if not OPTIONAL[family]:
        return "never_had"
    return "here" if set(OPTIONAL[family]) <= components.keys() else "left_out"
