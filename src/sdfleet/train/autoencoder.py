"""Trains the two halves of the autoencoder against the fixed latent map.

The decoder learns to turn mapped latents (a little noised, as a denoiser leaves them) back into pictures. The
encoder, which only img2img needs, learns to do what the map does. Every step draws fresh pictures.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sdfleet.train.dataset import draw_pictures
from sdfleet.train.latents import LatentMap, to_signed
from sdfleet.train.learner import Learner, Plan, row_generators
from sdfleet.train.peers import ALONE
from sdfleet.train.pictures import render
from sdfleet.train.world import N_CELLS, sample_spec

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

log = logging.getLogger(__name__)

CROP_CELLS = 8
CROPS_PER_PICTURE = 2
CROP_BATCH = 16
WHOLE_BATCH = 4
LR = 2e-3
# The last stretch sees whole pictures, so that the group norms meet the statistics they will be used with.
WHOLE_SHARE = 0.35
MAX_LATENT_NOISE = 0.12
LOG_VARIANCE = -8.0
N_JUDGED = 32
SAVE_EVERY_STEPS = 100


class Decoding(nn.Module):
    """The decoder half of an autoencoder."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, 8h, 8w] in about [-1, 1] for latents [n, 8, h, w]."""
        picture: Tensor = self.decoder(self.post_quant_conv(latents))
        return picture


class Encoding(nn.Module):
    """The encoder half of an autoencoder."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, pictures: Tensor) -> Tensor:
        """Means of the latents [n, 8, h/8, w/8] for pictures [n, 3, h, w] in [-1, 1]."""
        moments: Tensor = self.quant_conv(self.encoder(pictures))
        return moments.chunk(2, dim=1)[0]


def train_decoder(
    vae: AutoencoderKL, latent_map: LatentMap, folder: Path, *, seed: int, planned_samples: int, device: str = "cpu"
) -> None:
    """Train the decoder in place (float32 afterwards); resumes from `folder` and leaves its state there."""
    path = folder / "decoder.pt"
    half = Decoding(vae)
    half.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = Learner(half, lr=LR, device=device)
    if path.exists():
        learner.load(path)
    plan = Plan(planned_samples=planned_samples, cooldown_samples=planned_samples // 2, warmup_samples=800)
    judged = draw_pictures(N_JUDGED, seed + 1)
    for chance in row_generators(seed, "decoder", learner.n_steps, ALONE):
        if learner.samples_seen >= planned_samples:
            break
        is_whole = learner.samples_seen >= planned_samples * (1 - WHOLE_SHARE)
        pictures, latents = _draw_batch(latent_map, chance, is_whole=is_whole)
        noise = torch.randn(latents.shape, generator=chance)
        latents = latents + torch.rand(len(latents), 1, 1, 1, generator=chance) * MAX_LATENT_NOISE * noise
        drawn = half(latents.to(device, torch.bfloat16).to(memory_format=torch.channels_last)).float()
        loss = _picture_loss(drawn - pictures.to(device))
        # Whole pictures count as the crops they hold, so that the plan measures pixels.
        n_samples = len(pictures) * (4 if is_whole else 1)
        learner.update(loss, n_samples=n_samples, rate=plan.rate(learner.samples_seen))
        if learner.n_steps % SAVE_EVERY_STEPS == 0:
            learner.save(path)
            half.load_state_dict(learner.mean_state())
            psnr = judge_decoder(half, latent_map, judged)
            facts = {"samples": learner.samples_seen, "loss": loss.item(), "psnr": psnr}
            log.info("decoder: %(samples)d crops, loss %(loss).4f, %(psnr).2f dB", facts)
            with torch.no_grad():
                torch._foreach_copy_(learner.params, learner.masters)
    learner.save(path)
    vae.float()
    half.load_state_dict(learner.mean_state())


def train_encoder(
    vae: AutoencoderKL, latent_map: LatentMap, folder: Path, *, seed: int, planned_samples: int, device: str = "cpu"
) -> None:
    """Train the encoder in place (float32 afterwards); the decoder is not touched."""
    path = folder / "encoder.pt"
    half = Encoding(vae)
    half.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = Learner(half, lr=LR, device=device)
    if path.exists():
        learner.load(path)
    plan = Plan(planned_samples=planned_samples, cooldown_samples=planned_samples * 2 // 3, warmup_samples=800)
    for chance in row_generators(seed, "encoder", learner.n_steps, ALONE):
        if learner.samples_seen >= planned_samples:
            break
        is_whole = learner.samples_seen >= planned_samples * (1 - WHOLE_SHARE)
        pictures, latents = _draw_batch(latent_map, chance, is_whole=is_whole)
        mapped = half(pictures.to(device, torch.bfloat16).to(memory_format=torch.channels_last)).float()
        loss = F.smooth_l1_loss(mapped, latents.to(device), beta=0.3)
        n_samples = len(pictures) * (4 if is_whole else 1)
        learner.update(loss, n_samples=n_samples, rate=plan.rate(learner.samples_seen))
        if learner.n_steps % SAVE_EVERY_STEPS == 0:
            learner.save(path)
            facts = {"samples": learner.samples_seen, "loss": loss.item()}
            log.info("encoder: %(samples)d crops, loss %(loss).5f", facts)
    learner.save(path)
    vae.float()
    half.load_state_dict(learner.mean_state())
    fix_spread(half)


@torch.no_grad()
def fix_spread(half: Encoding) -> None:
    """Give every latent the same tiny spread: the map has none, but the encoder's class predicts one."""
    n = half.quant_conv.out_channels // 2
    half.quant_conv.weight[n:] = 0.0
    half.quant_conv.bias[n:] = LOG_VARIANCE


@torch.no_grad()
def judge_decoder(half: Decoding, latent_map: LatentMap, pictures: NDArray[np.uint8]) -> float:
    """Mean peak signal-to-noise ratio in decibels of pictures sent through map and decoder."""
    weight = next(half.parameters())
    parts = [z.to(weight.device, weight.dtype) for z in latent_map.encode(pictures).split(8)]
    drawn = torch.cat([half(part).float().cpu() for part in parts])
    error = ((drawn.clamp(-1, 1) - to_signed(pictures)) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def _draw_batch(latent_map: LatentMap, chance: torch.Generator, *, is_whole: bool) -> tuple[Tensor, Tensor]:
    """Fresh pictures in [-1, 1] and their latents: whole ones, or crops of 8x8 cells."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=chance)))
    n = WHOLE_BATCH if is_whole else CROP_BATCH // CROPS_PER_PICTURE
    pictures = np.stack([render(sample_spec(rng), rng)[0] for _ in range(n)])
    signed = to_signed(pictures)
    latents = latent_map.encode(pictures)
    if is_whole:
        return signed, latents
    corners = [
        (k, rng.randint(0, N_CELLS - CROP_CELLS), rng.randint(0, N_CELLS - CROP_CELLS))
        for k in range(n)
        for _ in range(CROPS_PER_PICTURE)
    ]
    size = CROP_CELLS * 8
    crops = [signed[k, :, y * 8 : y * 8 + size, x * 8 : x * 8 + size] for k, y, x in corners]
    cells = [latents[k, :, y : y + CROP_CELLS, x : x + CROP_CELLS] for k, y, x in corners]
    return torch.stack(crops), torch.stack(cells)


def _picture_loss(error: Tensor) -> Tensor:
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.5 * (across + down) + error.square().mean()
