"""The picture codec of FLUX.2, whose latents are four cells of its VAE as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdfleet.domain import Progress
from sdfleet.engine.components import Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.engine import Engine
from sdfleet.engine.pixels import to_unit_range
from sdfleet.engine.vae import PatchedVae, Vae
from tests import tiny
from tests.engine.drawing import FLOAT32, drawing, photo, run

Checkpoints = Callable[[str], Path]


@pytest.fixture
def vae(checkpoints: Checkpoints) -> PatchedVae:
    device = choose_device("cpu", "float32")
    return PatchedVae(Components(checkpoints("klein"), device).use("vae"), device)


def test_latents_are_those_of_diffusers(vae: PatchedVae, checkpoints: Checkpoints) -> None:
    pipe = tiny.load(checkpoints("klein"))
    picture = to_unit_range(photo())
    with torch.inference_mode():
        theirs = pipe._encode_vae_image(picture, generator=None)

    assert (vae.latent_channels, vae.px_per_latent) == (theirs.shape[1], 16)
    torch.testing.assert_close(vae.encode(picture).mean, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", ["klein", "zimage"])
def test_a_picture_comes_back_at_its_size(name: str, checkpoints: Checkpoints, *, tiled: bool) -> None:
    device = choose_device("cpu", "float32")
    codec = PatchedVae if name == "klein" else Vae
    vae = codec(Components(checkpoints(name), device).use("vae"), device)
    height, width = 96 // vae.px_per_latent, 176 // vae.px_per_latent
    latents = torch.randn(2, vae.latent_channels, height, width, generator=torch.Generator().manual_seed(1))
    decoded = vae.decode(latents, tiled=tiled)

    assert tuple(decoded.shape) == (2, 3, 96, 176)
    assert bool(torch.isfinite(decoded).all())


@pytest.mark.parametrize("name", ["klein", "zimage"])
def test_previews_are_small_pictures(name: str, checkpoints: Checkpoints) -> None:
    engine = Engine(FLOAT32)
    engine.submit(replace(drawing(name, checkpoints(name), steps=3), wants_previews=True))
    previews = [event.preview for event in run(engine) if isinstance(event, Progress) and event.preview]

    side_px = {"klein": 4, "zimage": 8}[name]
    assert [(preview.width_px, preview.height_px) for preview in previews] == [(side_px, side_px)] * 2
