"""Run within DiffusionKit's environment: what its networks make of given arrays. Arguments: checkpoint, input, output.

The input is an .npz with latents [1, h, w, 16], context [1, n, 4096], pooled [1, d], timestep, ids [1, 77] and words
[1, m]; what comes out is another with velocity, picture, mean, hidden and pooled of both CLIPs, and t5.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import diffusionkit, mlx_device


def main(folder: str, given: str, made: str) -> None:
    import mlx.core as mx  # type: ignore[import-not-found, unused-ignore]

    mlx_device.open_device(EngineOptions())
    diffusionkit.stand_in()
    pipeline: Any = diffusionkit._loaded(Path(folder), is_half=False)
    arrays = {name: mx.array(array) for name, array in np.load(given).items()}
    pipeline.mmdit.cache_modulation_params(arrays["pooled"], arrays["timestep"])
    velocity = pipeline.mmdit(
        latent_image_embeddings=arrays["latents"],
        token_level_text_embeddings=mx.expand_dims(arrays["context"], 2),
        timestep=arrays["timestep"],
    )
    mean, _ = pipeline.encoder(arrays["image"]).split(2, axis=-1)
    out = {"velocity": velocity, "picture": pipeline.decoder(arrays["latents"]), "mean": mean}
    for name, clip in (("l", pipeline.clip_l), ("g", pipeline.clip_g)):
        read = clip(arrays[f"ids_{name}"])
        out |= {f"hidden_{name}": read.hidden_states[-2], f"pooled_{name}": read.pooled_output}
    out["t5"] = pipeline.t5_encoder(arrays["words"])
    arrays_out: dict[str, Any] = {name: np.array(array.astype(mx.float32)) for name, array in out.items()}
    np.savez(made, **arrays_out)


if __name__ == "__main__":
    main(*sys.argv[1:])
