"""Checkpoint folders for tests that only look at them: right names, configs and headers, a few numbers as weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLIP = ["transformers", "CLIPTextModel"]
TOKENIZER = ["transformers", "CLIPTokenizer"]
VAE_CONFIG = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8]}


def safetensors(shapes: Mapping[str, tuple[int, ...]], *, dtype: str = "F16") -> bytes:
    """A safetensors file of zeros, two bytes a number."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        n_bytes = 2
        for side in shape:
            n_bytes *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(at)


def write_sd(folder: Path, *, pipeline: str = "StableDiffusionPipeline", sample_size: int = 64) -> Path:
    """A Stable Diffusion 1.x folder, complete."""
    _index(folder, pipeline, unet=["diffusers", "UNet2DConditionModel"], **_text(1))
    _model(folder / "unet", {"sample_size": sample_size, "in_channels": 4}, {"conv_in.weight": (8, 4, 3, 3)})
    return _common(folder, n_text=1, scheduler="DDIMScheduler")


def write_sdxl(folder: Path) -> Path:
    """An SDXL folder, complete."""
    _index(folder, "StableDiffusionXLPipeline", unet=["diffusers", "UNet2DConditionModel"], **_text(2))
    _model(folder / "unet", {"sample_size": 128, "in_channels": 4}, {"conv_in.weight": (8, 4, 3, 3)})
    return _common(folder, n_text=2, scheduler="EulerDiscreteScheduler")


def write_refiner(folder: Path) -> Path:
    """An SDXL refiner: without its first text encoder, and saying so."""
    write_sdxl(folder)
    absent = ("text_encoder", "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    _json(folder / "model_index.json", index | {name: [None, None] for name in absent})
    for name in absent:
        shutil.rmtree(folder / name)
    return folder


def write_sd3(folder: Path, *, has_t5: bool = True) -> Path:
    """An SD3 folder; without T5 its model_index.json still names it, as in a partial download."""
    t5 = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    denoiser = ["diffusers", "SD3Transformer2DModel"]
    _index(folder, "StableDiffusion3Pipeline", transformer=denoiser, **_text(2), **t5)
    _model(folder / "transformer", {"sample_size": 128, "in_channels": 16}, {"pos_embed.proj.weight": (8, 16, 2, 2)})
    if has_t5:
        _model(folder / "text_encoder_3", {}, {"shared.weight": (4, 4)}, name="model.safetensors")
        _json(folder / "tokenizer_3/tokenizer_config.json", {})
        (folder / "tokenizer_3/spiece.model").write_bytes(b"pieces")
    return _common(folder, n_text=2, scheduler="FlowMatchEulerDiscreteScheduler")


def write_klein(folder: Path, *, is_distilled: bool = True) -> Path:
    """A FLUX.2 klein folder, complete."""
    parts = {"text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2TokenizerFast"]}
    denoiser = ["diffusers", "Flux2Transformer2DModel"]
    _index(folder, "Flux2KleinPipeline", transformer=denoiser, is_distilled=is_distilled, **parts)
    _model(folder / "transformer", {"in_channels": 128}, {"x_embedder.weight": (8, 128)})
    return _common(folder, n_text=1, scheduler="FlowMatchEulerDiscreteScheduler")


def write_zimage(folder: Path) -> Path:
    """A Z-Image turbo folder, complete."""
    parts = {"text_encoder": ["transformers", "Qwen3Model"], "tokenizer": ["transformers", "Qwen2Tokenizer"]}
    _index(folder, "ZImagePipeline", transformer=["diffusers", "ZImageTransformer2DModel"], **parts)
    _model(folder / "transformer", {"in_channels": 16}, {"all_x_embedder.2-1.weight": (8, 64)})
    return _common(folder, n_text=1, scheduler="FlowMatchEulerDiscreteScheduler")


def write_flux(folder: Path, *, pipeline: str = "FluxPipeline", takes_guidance: bool = True) -> Path:
    """A FLUX.1 folder: dev, or schnell where the network takes no guidance."""
    t5 = {"text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}
    _index(folder, pipeline, transformer=["diffusers", "FluxTransformer2DModel"], **_text(2) | t5)
    config = {"in_channels": 64, "guidance_embeds": takes_guidance}
    _model(folder / "transformer", config, {"x_embedder.weight": (8, 64)})
    _common(folder, n_text=2, scheduler="FlowMatchEulerDiscreteScheduler")
    (folder / "tokenizer_2/spiece.model").write_bytes(b"pieces")
    return folder


def _index(folder: Path, pipeline: str, **components: object) -> None:
    _json(
        folder / "model_index.json",
        {
            "_class_name": pipeline,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "AnyScheduler"],
            "vae": ["diffusers", "AutoencoderKL"],
            **components,
        },
    )


def _text(n_encoders: int) -> dict[str, list[str]]:
    names = ("", "_2")[:n_encoders]
    return {f"text_encoder{n}": CLIP for n in names} | {f"tokenizer{n}": TOKENIZER for n in names}


def _common(folder: Path, *, n_text: int, scheduler: str) -> Path:
    for suffix in ("", "_2")[:n_text]:
        _model(folder / f"text_encoder{suffix}", {}, {"embeddings.weight": (4, 4)}, name="model.safetensors")
        for name in ("vocab.json", "tokenizer_config.json"):
            _json(folder / f"tokenizer{suffix}" / name, {})
        (folder / f"tokenizer{suffix}/merges.txt").write_text("#version: 0.2\n")
    _model(folder / "vae", VAE_CONFIG, {"encoder.conv_in.weight": (8, 3, 3, 3)})
    _json(folder / "scheduler/scheduler_config.json", {"_class_name": scheduler})
    return folder


def _model(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    name: str = "diffusion_pytorch_model.safetensors",
) -> None:
    _json(folder / "config.json", config)
    (folder / name).write_bytes(safetensors(shapes))


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
