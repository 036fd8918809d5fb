"""Pictures of the world on disk: latents, cell labels and worded captions, ready for training.

Parts are drawn by separate processes, each from its own seed, so the same seed gives the same set whatever the
number of processes.
"""

from __future__ import annotations

import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sdfleet.train.captions import caption
from sdfleet.train.latents import N_CHANNELS, LatentMap, fit_latent_map
from sdfleet.train.pictures import render
from sdfleet.train.tokens import MAX_TOKENS, encode_captions, load_tokenizer
from sdfleet.train.world import N_CELLS, sample_spec

PART_PICTURES = 5000
N_CAPTIONS = 6
N_MAP_PICTURES = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSet:
    """latents [n, 8, 16, 16] float16, labels [n, 16, 16] uint8, tokens [n, 6, 32] int16, all memory-mapped."""

    latents: NDArray[np.float16]
    labels: NDArray[np.uint8]
    tokens: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.latents)


def draw_pictures(n: int, seed: int) -> NDArray[np.uint8]:
    """n random pictures of the training world, [n, 128, 128, 3] uint8."""
    rng = random.Random(seed)
    return np.stack([render(sample_spec(rng), rng)[0] for _ in range(n)])


def load_latent_map(folder: Path, seed: int) -> LatentMap:
    """The latent map of a work folder; fitted and written there the first time."""
    path = folder / "latent_map.pt"
    if not path.exists():
        fitted = fit_latent_map(draw_pictures(N_MAP_PICTURES, seed))
        torch.save({"weight": fitted.weight, "bias": fitted.bias}, path)
    stored = torch.load(path)
    return LatentMap(weight=stored["weight"], bias=stored["bias"])


def render_set(folder: Path, *, n: int, seed: int, n_processes: int) -> PictureSet:
    """Draw what is missing of a set of n pictures (rounded up to whole parts) and open it.

    The folder must hold the tokenizer and the latent map already. Finished parts are kept, so a stopped rendering
    goes on where it was.
    """
    n_parts = -(-n // PART_PICTURES)
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    missing = [(folder, seed, k) for k in range(n_parts) if not (parts / f"{k:04d}.npz").exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(n_processes) as pool:
            pool.starmap(_render_part, missing)
    opened = [np.load(parts / f"{k:04d}.npz") for k in range(n_parts)]
    return PictureSet(
        latents=np.concatenate([part["latents"] for part in opened]),
        labels=np.concatenate([part["labels"] for part in opened]),
        tokens=np.concatenate([part["tokens"] for part in opened]),
    )


def _render_part(folder: Path, seed: int, index: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(f"{seed} part {index}")
    latent_map = load_latent_map(folder, seed)
    tokenizer = load_tokenizer(folder)
    latents = np.empty((PART_PICTURES, N_CHANNELS, N_CELLS, N_CELLS), dtype=np.float16)
    labels = np.empty((PART_PICTURES, N_CELLS, N_CELLS), dtype=np.uint8)
    tokens = np.empty((PART_PICTURES, N_CAPTIONS, MAX_TOKENS), dtype=np.int16)
    for start in range(0, PART_PICTURES, 500):
        pictures = []
        texts: list[str] = []
        for k in range(start, start + 500):
            spec = sample_spec(rng)
            picture, labels[k] = render(spec, rng)
            pictures.append(picture)
            texts += [caption(spec, rng) for _ in range(N_CAPTIONS)]
        latents[start : start + 500] = latent_map.encode(np.stack(pictures)).numpy()
        tokens[start : start + 500] = encode_captions(tokenizer, texts).reshape(500, N_CAPTIONS, MAX_TOKENS)
    path = folder / "parts" / f"{index:04d}.npz"
    fresh = path.with_suffix(".tmp.npz")
    np.savez(fresh, latents=latents, labels=labels, tokens=tokens)
    fresh.rename(path)
