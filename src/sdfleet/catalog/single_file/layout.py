"""What a checkpoint in one file is, from its tensors' names and shapes alone; a file's name says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sdfleet.catalog.headers import PICKLES, Header, read_header
from sdfleet.catalog.single_file.flux import read_flux
from sdfleet.catalog.single_file.gguf_header import is_gguf, read_gguf_header
from sdfleet.catalog.single_file.pieces import Part, Shapes, beneath, n_bytes_of
from sdfleet.catalog.single_file.sd3 import read_sd3
from sdfleet.catalog.single_file.text import read_clip, read_open_clip, read_t5
from sdfleet.catalog.single_file.unet import is_refiner, read_unet
from sdfleet.catalog.single_file.vae import read_vae
from sdfleet.errors import BrokenCheckpoint, PickleRefused, UnsupportedByModel

if TYPE_CHECKING:
    from sdfleet.catalog.architectures import Architecture
    from sdfleet.catalog.architectures import Part as Described
    from sdfleet.catalog.cards import Family

Prediction = Literal["epsilon", "v"]

# How a pickle begins (protocol 2 and later), and a zip, which is how torch wraps one.
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
# A denoiser alone has its names bare, or as the programs that cut it out left them.
_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_VAE_PREFIXES = ("first_stage_model.", "vae.")
_PROBES: Mapping[str, Literal["unet", "sd3", "flux"]] = {
    "input_blocks.0.0.weight": "unet",
    "joint_blocks.0.x_block.attn.qkv.weight": "sd3",
    "double_blocks.0.img_attn.qkv.weight": "flux",
}
# Tensors of what is no checkpoint, or of none that is served, with what to do. The first that is found is told.
_NOT_SERVED = (
    ("lora_", "a LoRA: it changes a checkpoint and is none", "import the checkpoint that it was made for"),
    (".lora_", "a LoRA: it changes a checkpoint and is none", "import the checkpoint that it was made for"),
    ("input_hint_block.", "a ControlNet", "ControlNets are not served"),
    ("control_model.", "a ControlNet", "ControlNets are not served"),
    ("distilled_guidance_layer.", "a Chroma model", "served are FLUX.1 dev, schnell, Fill and Kontext"),
    ("double_stream_modulation_img.", "a FLUX.2 model", "import FLUX.2 klein as a folder in the diffusers layout"),
    ("edm_mean", "an EDM model", "it scales its noise in a way that is not served"),
    (".quant_state.", "quantised by bitsandbytes", "get it in float16, bfloat16 or float8, or as GGUF"),
    (".qweight", "quantised for one kind of kernel", "get it in float16, bfloat16 or float8, or as GGUF"),
    (".scale_weight", "float8 with scales beside", "get it in float16, bfloat16 or plain float8, or as GGUF"),
    (".weight_scale", "float8 with scales beside", "get it in float16, bfloat16 or plain float8, or as GGUF"),
)
_TOLD_OF_A_VAE = ("scaling_factor", "shift_factor", "sample_size", "force_upcast")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A file, understood: the components it holds, and what it takes beside to draw.

    like: the published model whose scheduler and codec settings it shares. notes: what was assumed, for a person.
    """

    family: Family
    pipeline_class: str
    like: str
    parts: Mapping[str, Part]
    scheduler: Described
    flags: Mapping[str, bool]
    notes: tuple[str, ...] = ()


def read_any_header(path: Path) -> Header:
    """The header of a safetensors or GGUF file. Raises PickleRefused, UnsupportedByModel and BrokenCheckpoint."""
    refuse_pickle(path)
    return read_gguf_header(path) if is_gguf(path) else read_header(path)


def refuse_pickle(path: Path) -> None:
    """Raises PickleRefused for a pickle, by its name or by how it begins."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return
    if path.suffix.lower() in PICKLES or start.startswith(_PICKLE_STARTS):
        raise PickleRefused(str(path))


def read_layout(header: Header, *, prediction: Prediction | None = None, label: str = "the file") -> Layout:
    """What a file with this header is. prediction: overrides what the header says of the UNet's answer.

    Raises UnsupportedByModel (no checkpoint that is served) and BrokenCheckpoint (tensors that decide are absent).
    """
    for mark, what, hint in _NOT_SERVED:
        if any(mark in name for name in header.shapes):
            raise UnsupportedByModel(f"{label} is {what}", hint=hint)
    for prefix in _DENOISER_PREFIXES:
        for probe, kind in _PROBES.items():
            if prefix + probe in header.shapes:
                return _layout(header, prefix=prefix, kind=kind, prediction=prediction)
    raise UnsupportedByModel(
        f"{label} holds no denoiser in a layout that is known; it begins with {min(header.shapes)!r}",
        hint="known are the authors' own layouts of Stable Diffusion 1.x and 2.x, SDXL, SD3, SD3.5 and FLUX.1",
    )


def _layout(
    header: Header, *, prefix: str, kind: Literal["unet", "sd3", "flux"], prediction: Prediction | None
) -> Layout:
    own = beneath(header.shapes, prefix)
    if kind != "unet" and prediction is not None:
        raise UnsupportedByModel(f"a {kind} model predicts the flow", hint="leave --prediction out")
    match kind:
        case "unet":
            return _unet_layout(header, read_unet(own).within(prefix), prediction)
        case "sd3":
            return _sd3_layout(header, read_sd3(own).within(prefix))
        case "flux":
            return _flux_layout(header, read_flux(own).within(prefix))


def _unet_layout(header: Header, unet: Part, prediction: Prediction | None) -> Layout:
    config = dict(unet.config)
    if config["in_channels"] not in {4, 9}:
        raise UnsupportedByModel(
            f"this UNet takes {config['in_channels']} channels",
            hint="served are those with 4, and with 9 for inpainting",
        )
    is_xl, is_second = "addition_embed_type" in config, bool(config["use_linear_projection"])
    like = "sdxl" if is_xl else "sd21" if is_second else "sd15"
    predicts, note = _prediction(header, default="v" if like == "sd21" else "epsilon", asked=prediction)
    notes = (note,) if note else ()
    config["sample_size"] = 128 if is_xl else 96 if is_second and predicts == "v" else 64
    parts = {"unet": replace(unet, config=config), **_vae(header.shapes, like)}
    flags: dict[str, bool] = {}
    is_inpainting = config["in_channels"] == 9
    if not is_xl:
        parts |= _texts(
            header.shapes,
            ("text_encoder", "cond_stage_model.transformer.", partial(read_clip, act="quick_gelu", is_projected=False)),
            ("text_encoder", "cond_stage_model.model.", partial(read_open_clip, is_projected=False, without_last=True)),
        )
        pipeline = "StableDiffusionInpaintPipeline" if is_inpainting else "StableDiffusionPipeline"
    elif is_refiner(config):
        parts |= _texts(
            header.shapes,
            ("text_encoder_2", "conditioner.embedders.0.model.", _clip_g),
        )
        flags = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
        pipeline = "StableDiffusionXLImg2ImgPipeline"
    else:
        parts |= _texts(
            header.shapes,
            (
                "text_encoder",
                "conditioner.embedders.0.transformer.",
                partial(read_clip, act="quick_gelu", is_projected=False),
            ),
            ("text_encoder_2", "conditioner.embedders.1.model.", _clip_g),
        )
        flags = {"force_zeros_for_empty_prompt": True}
        pipeline = "StableDiffusionXLInpaintPipeline" if is_inpainting else "StableDiffusionXLPipeline"
    return Layout(
        family="sdxl" if is_xl else "sd",
        pipeline_class=pipeline,
        like=like,
        parts=parts,
        scheduler=_noise(like, predicts, has_zero_snr="ztsnr" in header.shapes),
        flags=flags,
        notes=notes,
    )


def _sd3_layout(header: Header, transformer: Part) -> Layout:
    texts = _texts(
        header.shapes,
        ("text_encoder", "text_encoders.clip_l.transformer.", partial(read_clip, act="quick_gelu", is_projected=True)),
        ("text_encoder_2", "text_encoders.clip_g.transformer.", partial(read_clip, act="gelu", is_projected=True)),
        ("text_encoder_3", "text_encoders.t5xxl.transformer.", read_t5),
    )
    like = "sd3.5-large" if "qk_norm" in transformer.config else "sd3-medium"
    return Layout(
        family="sd3",
        pipeline_class="StableDiffusion3Pipeline",
        like=like,
        parts={"transformer": transformer, **_vae(header.shapes, like), **texts},
        scheduler=_published(like).parts["scheduler"],
        flags={},
    )


def _flux_layout(header: Header, transformer: Part) -> Layout:
    pipelines = {64: "FluxPipeline", 384: "FluxFillPipeline"}
    in_channels = transformer.config["in_channels"]
    if in_channels not in pipelines:
        raise UnsupportedByModel(
            f"this FLUX.1 network takes {in_channels} channels",
            hint="served are dev, schnell and Kontext with 64, and Fill with 384",
        )
    like = "flux-dev" if transformer.config["guidance_embeds"] else "flux-schnell"
    texts = _texts(
        header.shapes,
        ("text_encoder", "text_encoders.clip_l.transformer.", partial(read_clip, act="quick_gelu", is_projected=False)),
        ("text_encoder_2", "text_encoders.t5xxl.transformer.", read_t5),
    )
    return Layout(
        family="flux",
        pipeline_class=pipelines[in_channels],
        like=like,
        parts={"transformer": transformer, **_vae(header.shapes, like), **texts},
        scheduler=_published(like).parts["scheduler"],
        flags={},
    )


def _clip_g(shapes: Shapes) -> Part:
    return read_open_clip(shapes, is_projected=True, without_last=False)


def _texts(shapes: Shapes, *wanted: tuple[str, str, Any]) -> dict[str, Part]:
    """The text encoders that are in the file: (component, prefix of its names, what reads it)."""
    parts = {}
    for component, prefix, read in wanted:
        own = beneath(shapes, prefix)
        if own:
            parts[component] = read(own).within(prefix)
    return parts


def _vae(shapes: Shapes, like: str) -> dict[str, Part]:
    for prefix in _VAE_PREFIXES:
        own = beneath(shapes, prefix)
        if "decoder.conv_in.weight" in own:
            of_like = _published(like).parts["vae"].config
            told = {key: of_like[key] for key in _TOLD_OF_A_VAE if key in of_like}
            return {"vae": read_vae(own, told=told).within(prefix)}
    return {}


def _prediction(header: Header, *, default: Prediction, asked: Prediction | None) -> tuple[Prediction, str]:
    """What the UNet's answer means, and what to tell a person of how it is known."""
    if asked is not None:
        return asked, ""
    said = header.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in header.shapes or said in {"v", "v_prediction", "v-prediction"}:
        return "v", ""
    if said in {"epsilon", "eps"}:
        return "epsilon", ""
    if "768-v" in header.metadata.get("modelspec.architecture", ""):
        return "v", ""
    meant = "v (the velocity)" if default == "v" else "epsilon (the noise)"
    return default, f"the file does not say what it predicts; taken is {meant}, --prediction says otherwise"


def _published(name: str) -> Architecture:
    # Here, because it brings pydantic, which a picture of the built-in model does without.
    from sdfleet.catalog import architectures

    return architectures.load(name)


def _noise(like: str, predicts: Prediction, *, has_zero_snr: bool) -> Described:
    part = _published(like).parts["scheduler"]
    # No published checkpoint of these families clips what is denoised; a scheduler that is not told would.
    changes: dict[str, Any] = {
        "prediction_type": "v_prediction" if predicts == "v" else "epsilon",
        "clip_sample": False,
    }
    if has_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return replace(part, config={**part.config, **changes})


def whole(parts: Mapping[str, Part], header: Header, component: str) -> Header:
    """One component of a file as if it lay in a file of its own, under its own names."""
    shapes, dtypes, bytes_by_dtype = {}, {}, dict[str, int]()
    for name, piece in parts[component].pieces.items():
        shape = piece.shape(header.shapes)
        shapes[name] = shape
        dtypes[name] = dtype = header.dtypes[piece.source]
        bytes_by_dtype[dtype] = bytes_by_dtype.get(dtype, 0) + n_bytes_of(shape, dtype)
    if not shapes:
        raise BrokenCheckpoint(f"the file has no weights of the {component}", hint="copy or download this file again")
    return Header(
        shapes=shapes,
        bytes_by_dtype=bytes_by_dtype,
        n_parameters=parts[component].n_parameters(header.shapes),
        dtypes=dtypes,
    )
