"""Trains the denoiser together with the text encoder: captions and noise in, latents out.

v-prediction under a schedule whose last step is pure noise. Because the pictures are drawn here, the shape and the
colour in every latent cell are known: thrown-away heads inside the up path must name them, which ties words to
places long before the latents' own error would.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfleet.train.dataset import PictureSet
from sdfleet.train.latents import N_CHANNELS, LatentMap
from sdfleet.train.learner import Learner, Plan, row_generators
from sdfleet.train.networks import make_sampler
from sdfleet.train.peers import ALONE, Peers
from sdfleet.train.world import COLOURS, N_LABELS, PALETTE, SCENE_LABEL

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

log = logging.getLogger(__name__)

N_NOISE_LEVELS = 1000
EMPTY_SHARE = 0.1
SAVE_EVERY_S = 240.0
REPORT_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The choices that were weighed against each other; PROVENANCE.md has the numbers."""

    lr: float = 2.5e-3
    batch: int = 64
    # More steps at high noise, where layout, colour and shape are decided: t = 1000 (1 - (1-u)^(1+bias)). Like the
    # weights below it fades away in the cool-down, so that a run ends on the plain objective.
    level_bias: float = 0.35
    # How much an object's cells and their neighbours weigh against empty ones, until the cool-down evens it out.
    object_weight: float = 2.5
    detail_weight: float = 1.5
    label_weight: float = 0.15
    colour_weight: float = 0.15


class Drawing(nn.Module):
    """Text encoder, denoiser and the label heads that are thrown away after training."""

    def __init__(self, encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.unet = unet
        widths = unet.config.block_out_channels
        inner = list(reversed(widths))[: len(widths) - 1]
        self.heads = nn.ModuleList([nn.Conv2d(width, N_LABELS, 1) for width in inner])
        self.colour_heads = nn.ModuleList([nn.Conv2d(width, len(COLOURS), 1) for width in inner])

    def forward(self, noisy: Tensor, levels: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """v [n, 8, 16, 16] and, for every up block but the last, scores of labels and colours [n, k, side, side].

        The same arithmetic as UNet2DConditionModel.forward, written out to reach the features in between.
        """
        unet = self.unet
        states = self.encoder(tokens).last_hidden_state
        time_emb = unet.time_embedding(unet.time_proj(levels).to(noisy.dtype)) + unet.add_embedding(states)
        x = unet.conv_in(noisy)
        skips = [x]
        for block in unet.down_blocks:
            x, more = _call(block, x, time_emb, states)
            skips.extend(more)
        x = unet.mid_block(x, time_emb, encoder_hidden_states=states)
        label_scores: list[Tensor] = []
        colour_scores: list[Tensor] = []
        for k, block in enumerate(unet.up_blocks):
            n = len(block.resnets)
            own = tuple(skips[-n:])
            del skips[-n:]
            x = _call_up(block, x, own, time_emb, states)
            if k < len(self.heads):
                label_scores.append(self.heads[k](x))
                colour_scores.append(self.colour_heads[k](x))
        drawn: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return drawn, label_scores, colour_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Training rows: noisy [n, 8, 16, 16], target v, levels [n], tokens [n, 32], labels and colours [n, 16, 16]."""

    noisy: Tensor
    target: Tensor
    levels: Tensor
    tokens: Tensor
    labels: Tensor
    colours: Tensor


def draw_batch(
    pictures: PictureSet,
    chance: torch.Generator,
    *,
    n: int,
    level_bias: float,
    empty: Tensor,
    signal: Tensor,
    latent_map: LatentMap,
) -> Batch:
    """n rows at stratified noise levels.

    signal: cumulative alphas [1000]; empty: tokens of the empty caption [32]; latent_map: what made the latents.
    """
    rows = torch.randint(len(pictures), (n,), generator=chance).numpy()
    wording = torch.randint(pictures.tokens.shape[1], (n,), generator=chance).numpy()
    latents = torch.from_numpy(pictures.latents[rows]).float()
    tokens = torch.from_numpy(pictures.tokens[rows, wording].astype(np.int64))
    tokens = torch.where(torch.rand(n, 1, generator=chance) < EMPTY_SHARE, empty, tokens)
    noise = torch.randn(latents.shape, generator=chance)
    strata = (torch.randperm(n, generator=chance) + torch.rand(n, generator=chance)) / n
    levels = (N_NOISE_LEVELS * (1 - (1 - strata) ** (1 + level_bias))).long().clamp(0, N_NOISE_LEVELS - 1)
    alpha = signal[levels].sqrt()[:, None, None, None]
    sigma = (1 - signal[levels]).sqrt()[:, None, None, None]
    return Batch(
        noisy=alpha * latents + sigma * noise,
        target=alpha * noise - sigma * latents,
        levels=levels,
        tokens=tokens,
        labels=torch.from_numpy(pictures.labels[rows].astype(np.int64)),
        colours=_named(latent_map.mean_colours(latents)),
    )


def drawing_loss(
    drawing: Drawing, batch: Batch, recipe: Recipe, *, evenness: float, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch and its plain parts; evenness in [0, 1] takes the extra weights away.

    dtype: the type of the weights of `drawing`. Not to be compiled: with torch 2.13 the compiled backward pass lost
    the gradient from the label heads to the features (seen on 2026-11-20 by the surprise staying at 0.6).
    """
    drawn, label_scores, colour_scores = drawing(
        batch.noisy.to(dtype).to(memory_format=torch.channels_last), batch.levels, batch.tokens
    )
    square = (drawn.float() - batch.target).square()
    extra = 1.0 - evenness
    channel = torch.ones(N_CHANNELS, device=square.device)
    channel[3:] += extra * (recipe.detail_weight - 1)
    cell = 1.0 + extra * (recipe.object_weight - 1) * _near_objects(batch.labels)
    both = channel[None, :, None, None] * cell[:, None]
    error = (square * both).mean() / both.mean()
    label_surprise = _surprise(label_scores, batch.labels)
    colour_surprise = _surprise(colour_scores, batch.colours)
    loss = error + extra * (recipe.label_weight * label_surprise + recipe.colour_weight * colour_surprise)
    facts = {"error": square.mean(), "label surprise": label_surprise, "colour surprise": colour_surprise}
    return loss, {name: float(value.detach()) for name, value in facts.items()}


def train_denoiser(
    drawing: Drawing,
    pictures: PictureSet,
    folder: Path,
    *,
    empty: Tensor,
    latent_map: LatentMap,
    recipe: Recipe,
    seed: int,
    plan: Plan,
    peers: Peers = ALONE,
    device: str = "cpu",
) -> Learner:
    """Train until the plan's end; resumes from `folder`, saves there every few minutes.

    `folder/plan.json` ({"planned_samples": n, "cooldown_samples": n}) is looked at while training and replaces the
    plan: a run can be ended early with its cool-down, or made longer. The state just before the cool-down is kept
    as `denoiser-before-cooldown.pt`; a longer run starts from a copy of it.
    """
    path = folder / "denoiser.pt"
    before_path = folder / "denoiser-before-cooldown.pt"
    drawing.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = Learner(drawing, lr=recipe.lr, device=device, peers=peers)
    if path.exists():
        learner.load(path)
    signal = make_sampler().alphas_cumprod
    n_rows = recipe.batch // peers.n
    sums: dict[str, float] = {}
    saved_at = started_at = time.monotonic()
    first_samples = learner.samples_seen
    was_cooling = plan.cooldown_share(learner.samples_seen) > 0
    for chance in row_generators(seed, "denoiser", learner.n_steps, peers):
        if learner.n_steps % 10 == 0:
            plan = _current_plan(plan, folder, peers)
        parent = multiprocessing.parent_process()
        is_orphan = parent is not None and not parent.is_alive()  # whoever started the workers was stopped
        if is_orphan or learner.samples_seen >= plan.planned_samples:
            break
        share = plan.cooldown_share(learner.samples_seen)
        if share > 0 and not was_cooling and peers.rank == 0:
            learner.save(before_path)
        was_cooling = share > 0
        batch = draw_batch(
            pictures,
            chance,
            n=n_rows,
            level_bias=recipe.level_bias * (1 - share),
            empty=empty,
            signal=signal,
            latent_map=latent_map,
        )
        batch = Batch(**{name: getattr(batch, name).to(device) for name in Batch.__slots__})
        loss, facts = drawing_loss(drawing, batch, recipe, evenness=share)
        learner.update(loss, n_samples=n_rows * peers.n, rate=plan.rate(learner.samples_seen))
        for name, value in facts.items():
            sums[name] = sums.get(name, 0.0) + value / REPORT_EVERY_STEPS
        if peers.rank == 0 and learner.n_steps % REPORT_EVERY_STEPS == 0:
            pace = (learner.samples_seen - first_samples) / (time.monotonic() - started_at)
            words = ", ".join(f"{name} {value:.4f}" for name, value in sums.items())
            log.info("denoiser: %d samples, %s, %.1f samples/s", learner.samples_seen, words, pace)
            sums = {}
        if peers.rank == 0 and time.monotonic() - saved_at > SAVE_EVERY_S:
            learner.save(path)
            saved_at = time.monotonic()
    if peers.rank == 0:
        learner.save(path)
    return learner


def _current_plan(plan: Plan, folder: Path, peers: Peers) -> Plan:
    path = folder / "plan.json"
    planned, cooldown = plan.planned_samples, plan.cooldown_samples
    if peers.rank == 0 and path.exists():
        stored = json.loads(path.read_text())
        planned, cooldown = stored["planned_samples"], stored["cooldown_samples"]
    if peers.n > 1:
        planned, cooldown = (int(v) for v in peers.from_first([planned, cooldown]))
    return Plan(planned_samples=planned, cooldown_samples=cooldown, warmup_samples=plan.warmup_samples)


def _surprise(scores: list[Tensor], names: Tensor) -> Tensor:
    """Mean cross-entropy of scores [n, k, side, side] at any coarseness against names [n, 16, 16]."""
    total = torch.zeros((), device=names.device)
    for score in scores:
        share = F.one_hot(names, score.shape[1]).permute(0, 3, 1, 2).float()
        share = F.adaptive_avg_pool2d(share, score.shape[-1])
        total = total - (share * F.log_softmax(score.float(), 1)).sum(1).mean() / len(scores)
    return total


def _named(colours: Tensor) -> Tensor:
    """Index into COLOURS of the palette colour nearest to each of the colours [n, 3, h, w]."""
    palette = torch.tensor([PALETTE[name] for name in COLOURS])
    gap = colours[:, None] - palette[None, :, :, None, None]
    return gap.square().sum(2).argmin(1)


def _near_objects(labels: Tensor) -> Tensor:
    """1.0 for cells of an object or next to one, 0.5 in scenes, 0.0 elsewhere; [n, 16, 16]."""
    is_object = ((labels > 0) & (labels != SCENE_LABEL)).float()
    near = F.max_pool2d(is_object[:, None], 3, stride=1, padding=1)[:, 0]
    return torch.maximum(near, 0.5 * (labels == SCENE_LABEL).float())


def _call(block: nn.Module, x: Tensor, time_emb: Tensor, states: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    if getattr(block, "has_cross_attention", False):
        out = block(hidden_states=x, temb=time_emb, encoder_hidden_states=states)
    else:
        out = block(hidden_states=x, temb=time_emb)
    return out[0], out[1]


def _call_up(block: nn.Module, x: Tensor, skips: tuple[Tensor, ...], time_emb: Tensor, states: Tensor) -> Tensor:
    if getattr(block, "has_cross_attention", False):
        up: Tensor = block(hidden_states=x, temb=time_emb, res_hidden_states_tuple=skips, encoder_hidden_states=states)
    else:
        up = block(hidden_states=x, temb=time_emb, res_hidden_states_tuple=skips)
    return up
