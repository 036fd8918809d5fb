"""Weights that learn: bfloat16 for the arithmetic, float32 masters, a running mean, and all of it on disk.

The learning rate is a function of samples seen against a plan, never of wall time: a short warm-up, a constant
stretch, and a cool-down to zero over the last samples. A run can so be stopped anywhere, resumed to the same
weights, and made longer from the checkpoint written before its cool-down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfleet.train.muon import Muon
from sdfleet.train.peers import ALONE, Peers

MEAN_DECAY = 0.999  # per step, at the peak rate
MAX_GRADIENT_NORM = 1.0
# Layers that AdamW moves although their weights are matrices: they face the data, not another layer.
OUTER_LAYERS = ("token_embedding", "position_embedding", "conv_in", "conv_out", "heads", "queries")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to learn, in samples."""

    planned_samples: int
    cooldown_samples: int
    warmup_samples: int = 1500

    def cooldown_share(self, samples_seen: int) -> float:
        """How far into the cool-down, 0 before it and 1 at its end."""
        start = self.planned_samples - self.cooldown_samples
        return min(1.0, max(0.0, (samples_seen - start) / max(1, self.cooldown_samples)))

    def rate(self, samples_seen: int) -> float:
        """The learning rate as a share of its peak."""
        warm = min(1.0, (samples_seen + 1) / max(1, self.warmup_samples))
        return warm * max(0.01, 1.0 - self.cooldown_share(samples_seen))


class Learner:
    """One or more networks in one module, on their way to a plan's end."""

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        device: str = "cpu",
        peers: Peers = ALONE,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.device = torch.device(device)
        self.peers = peers
        self.lr = lr
        self.samples_seen = 0
        self.n_steps = 0
        named = list(module.to(self.device).named_parameters())
        self.masters = [p.detach().float().clone() for _, p in named]
        self.mean = [p.clone() for p in self.masters]
        self.module = module.to(dtype)
        self.params: list[Tensor] = [p for _, p in named]
        is_matrix = [p.ndim > 1 and not any(name in full for name in OUTER_LAYERS) for full, p in named]
        self.optimizer = Muon(
            [m for m, yes in zip(self.masters, is_matrix, strict=True) if yes],
            [m for m, yes in zip(self.masters, is_matrix, strict=True) if not yes],
            lr=lr,
            peers=peers,
        )

    def update(self, loss: Tensor, *, n_samples: int, rate: float) -> None:
        """One step down the gradient of a loss that is the mean over this worker's rows; n_samples of all workers."""
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        if self.peers.n > 1:
            self.peers.mean(grads)
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
            # The lower the rate, the less noise there is to average out: the memory shrinks with it.
            newest = max((1 - MEAN_DECAY) / max(rate, 0.02), 19 / (self.n_steps + 20))
            torch._foreach_lerp_(self.mean, self.masters, newest)
        for param in self.params:
            param.grad = None
        self.samples_seen += n_samples
        self.n_steps += 1

    def mean_state(self) -> dict[str, Tensor]:
        """The running mean of the weights as a float32 state dict of the module."""
        names = [name for name, _ in self.module.named_parameters()]
        stored = {name: value.clone() for name, value in self.module.state_dict().items()}
        return {**stored, **{name: m.clone() for name, m in zip(names, self.mean, strict=True)}}

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs; the file is whole or the old one."""
        fresh = path.with_suffix(".tmp")
        torch.save(
            {
                "samples_seen": self.samples_seen,
                "n_steps": self.n_steps,
                "masters": self.masters,
                "mean": self.mean,
                "optimizer": self.optimizer.state_dict(),
            },
            fresh,
        )
        fresh.rename(path)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote."""
        stored: dict[str, Any] = torch.load(path, map_location=self.device)
        self.samples_seen = stored["samples_seen"]
        self.n_steps = stored["n_steps"]
        with torch.no_grad():
            torch._foreach_copy_(self.masters, stored["masters"])
            torch._foreach_copy_(self.mean, stored["mean"])
            torch._foreach_copy_(self.params, self.masters)
        self.optimizer.load_state_dict(stored["optimizer"])


def mean_state_of(module: nn.Module, path: Path) -> dict[str, Tensor]:
    """The state dict of a module with the running means of a file that `Learner.save` wrote."""
    stored: dict[str, Any] = torch.load(path, map_location="cpu")
    means = dict(zip([name for name, _ in module.named_parameters()], stored["mean"], strict=True))
    return {**module.state_dict(), **means}


def row_generators(seed: int, name: str, n_steps: int, peers: Peers) -> Iterator[torch.Generator]:
    """Generators for this worker's steps from n_steps on: chance depends on the step's number, not on history."""
    base = sum(ord(letter) * 31**k for k, letter in enumerate(name)) % 65_521
    while True:
        yield torch.Generator().manual_seed(((seed * 65_521 + base) * 8 + peers.rank) * 10_000_019 + n_steps)
        n_steps += 1
