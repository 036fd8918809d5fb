"""The shipped weights: small enough, whole, and loadable by plain diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sdfleet.starter import weights_path

WEIGHTS = weights_path()
needs_weights = pytest.mark.skipif(not (WEIGHTS / "model_index.json").exists(), reason="no weights in this checkout")


@needs_weights
def test_the_folder_stays_under_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 25_000_000


@needs_weights
def test_every_weight_file_is_the_one_provenance_names() -> None:
    from sdfleet.train.export import checksums

    provenance = (Path(str(WEIGHTS)).parent / "PROVENANCE.md").read_text()
    digests = {name: digest for name, digest in checksums(WEIGHTS).items() if name.endswith(".safetensors")}
    assert len(digests) == 3
    assert [name for name, digest in digests.items() if digest not in provenance] == []


@needs_weights
def test_plain_diffusers_loads_it_in_float32_and_draws_a_red_circle() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    out = pipeline(
        "a red circle on a white background",
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    )
    red, green, blue = (np.asarray(out.images[0])[56:72, 56:72].mean((0, 1)) * 255).tolist()
    assert red > 170
    assert max(green, blue) < 110
