"""Puts trained networks together as a standard Stable Diffusion folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdfleet.train.autoencoder import Decoding, Encoding, fix_spread
from sdfleet.train.denoiser import Drawing
from sdfleet.train.learner import mean_state_of
from sdfleet.train.networks import Sizes, make_autoencoder, make_denoiser, make_sampler, make_text_encoder
from sdfleet.train.tokens import load_tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def assemble(folder: Path, sizes: Sizes) -> StableDiffusionPipeline:
    """A float32 pipeline of the running means in a work folder; an encoder not trained yet stays random."""
    from diffusers import StableDiffusionPipeline

    tokenizer = load_tokenizer(folder)
    drawing = Drawing(make_text_encoder(tokenizer, sizes), make_denoiser(sizes))
    drawing.load_state_dict(mean_state_of(drawing, folder / "denoiser.pt"))
    vae = make_autoencoder(sizes)
    decoding = Decoding(vae)
    decoding.load_state_dict(mean_state_of(decoding, folder / "decoder.pt"))
    if (folder / "encoder.pt").exists():
        encoding = Encoding(vae)
        encoding.load_state_dict(mean_state_of(encoding, folder / "encoder.pt"))
        fix_spread(encoding)
    for network in (drawing, vae):
        network.eval()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=drawing.encoder,
        tokenizer=tokenizer,
        unet=drawing.unet,
        scheduler=make_sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(folder: Path, weights: Path, sizes: Sizes) -> dict[str, str]:
    """Write the half-precision folder `weights`, replacing what is there; answers the sha256 of every file."""
    pipeline = assemble(folder, sizes)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.to(torch.float16)
    fresh = weights.with_name(weights.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    # transformers 5 loads a text encoder in the type its config names; float16 would be slow on a CPU and would not
    # match the other networks, which load as float32.
    config_path = fresh / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    old = weights.with_name(weights.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if weights.exists():
        weights.rename(old)
    fresh.rename(weights)
    shutil.rmtree(old, ignore_errors=True)
    return checksums(weights)


def checksums(weights: Path) -> dict[str, str]:
    """sha256 of every file of a folder by its path inside."""
    files = sorted(path for path in weights.rglob("*") if path.is_file())
    return {str(path.relative_to(weights)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
