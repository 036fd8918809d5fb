"""Teaches the text encoder what words look like, before the denoiser needs it.

A small reader, thrown away afterwards, looks at the token states and draws the mean picture of a caption as a
grid of latents and shape labels. That is a few hundred captions a second, many times what the denoiser learns from.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfleet.train.dataset import PictureSet
from sdfleet.train.latents import N_CHANNELS
from sdfleet.train.learner import Learner, Plan, row_generators
from sdfleet.train.peers import ALONE
from sdfleet.train.world import N_CELLS, N_LABELS

if TYPE_CHECKING:
    from transformers import CLIPTextModel

log = logging.getLogger(__name__)

BATCH = 128
LR = 2e-3
SAVE_EVERY_STEPS = 200
GRID = N_CELLS // 2


class Reader(nn.Module):
    """Draws 16x16 cells from token states: 64 queries, two looks at the text, four cells each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, GRID * GRID, width) * 0.5)
        self.to_query = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.to_pair = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(5)])
        self.mixers = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)]
        )
        self.heads = nn.Linear(width, 4 * (N_CHANNELS + N_LABELS))
        self.n_heads = max(1, width // 32)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [n, 8, 16, 16] and label scores [n, 10, 16, 16] for token states [n, 32, width]."""
        n, _, width = states.shape
        x = self.queries.expand(n, -1, -1)
        for k in range(2):
            query = self._split(self.to_query[k](self.norms[2 * k](x)))
            key, value = (self._split(part) for part in self.to_pair[k](states).chunk(2, dim=-1))
            weights = (query @ key.transpose(-1, -2) * (width // self.n_heads) ** -0.5).softmax(-1)
            x = x + (weights @ value).transpose(1, 2).reshape(n, -1, width)
            x = x + self.mixers[k](self.norms[2 * k + 1](x))
        cells = self.heads(self.norms[4](x)).transpose(1, 2).reshape(n, -1, GRID, GRID)
        drawn = F.pixel_shuffle(cells, 2)
        return drawn[:, :N_CHANNELS], drawn[:, N_CHANNELS:]

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), x.shape[1], self.n_heads, -1).transpose(1, 2)


class Lesson(nn.Module):
    """Text encoder and reader, learning together."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.reader = Reader(encoder.config.hidden_size)

    def forward(self, tokens: Tensor, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the latents and cross-entropy of the labels, each a mean."""
        drawn, scores = self.reader(self.encoder(tokens).last_hidden_state)
        return F.mse_loss(drawn.float(), latents), F.cross_entropy(scores.float(), labels)


def train_text(
    encoder: CLIPTextModel, pictures: PictureSet, folder: Path, *, seed: int, planned_samples: int, device: str = "cpu"
) -> CLIPTextModel:
    """The text encoder after its lesson, float32; resumes from `folder` and leaves its state there."""
    path = folder / "text.pt"
    lesson = Lesson(encoder)
    learner = Learner(lesson, lr=LR, device=device)
    if path.exists():
        learner.load(path)
    plan = Plan(planned_samples=planned_samples, cooldown_samples=planned_samples // 2)
    chances = row_generators(seed, "text", learner.n_steps, ALONE)
    while learner.samples_seen < planned_samples:
        chance = next(chances)
        rows = torch.randint(len(pictures), (BATCH,), generator=chance).numpy()
        wording = torch.randint(pictures.tokens.shape[1], (BATCH,), generator=chance).numpy()
        tokens = torch.from_numpy(pictures.tokens[rows, wording].astype(np.int64)).to(device)
        latents = torch.from_numpy(pictures.latents[rows]).float().to(device)
        labels = torch.from_numpy(pictures.labels[rows].astype(np.int64)).to(device)
        error, surprise = lesson(tokens, latents, labels)
        learner.update(error + surprise, n_samples=BATCH, rate=plan.rate(learner.samples_seen))
        if learner.n_steps % SAVE_EVERY_STEPS == 0:
            facts = {"samples": learner.samples_seen, "error": error.item(), "surprise": surprise.item()}
            log.info("text: %(samples)d samples, error %(error).4f, surprise %(surprise).4f", facts)
            learner.save(path)
    learner.save(path)
    prefix = "encoder."
    state = {k.removeprefix(prefix): v for k, v in learner.mean_state().items() if k.startswith(prefix)}
    encoder.float().load_state_dict(state)
    return encoder
