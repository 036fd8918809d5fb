"""Several trajectories seen as one network call. Rebuilt only when the membership changes; owns nothing that lasts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdfleet.domain import Lora
from sdfleet.engine.compiling import filled_up
from sdfleet.engine.devices import sent
from sdfleet.engine.families.base import LatentFamily, NetworkRows
from sdfleet.engine.trajectory import Trajectory, advance, coast, to_denoised


class StepBatch:
    """n trajectories of one key, m network rows: the negative halves of the guided ones first, then everybody.

    fills_up: the network is given a number of rows that is a power of two; copies of the last row fill it up.
    call: what the network was given last. loras: what the network has on; one set for all.
    """

    # Compiled blocks tell tensors made in this mode from others, and would be compiled for both.
    @torch.inference_mode()
    def __init__(
        self,
        family: LatentFamily,
        trajectories: Sequence[Trajectory],
        *,
        size_px: tuple[int, int],
        fills_up: bool = False,
        loras: Sequence[Lora] = (),
    ) -> None:
        self.trajectories = tuple(trajectories)
        self._loras = loras
        self.call: NetworkRows | None = None
        self._family = family
        self._size_px = size_px
        device = family.device.torch_device
        guided = [row for row, t in enumerate(trajectories) if t.is_guided]
        self._n_guided = len(guided)
        n_more = filled_up(self.n_rows) - self.n_rows if fills_up else 0
        last = len(trajectories) - 1
        self._guided = sent(torch.tensor(guided, dtype=torch.long), device)
        self._rows = sent(torch.tensor([*guided, *range(len(trajectories)), *[last] * n_more]), device)
        every = sent(torch.tensor([t.guidance for t in trajectories]), device)
        self._row_guidance = every[self._rows]
        self._guidance = every[self._rows[: self._n_guided]].view(-1, 1, 1, 1)
        told = [t.prompts.negative for t in trajectories if t.prompts.negative is not None]
        told += [t.prompts.positive for t in trajectories]
        told += told[-1:] * n_more
        self._states = pad_sequence([c.states for c in told], batch_first=True)
        self._n_tokens = tuple(len(c.states) for c in told)
        pooled = [c.pooled for c in told if c.pooled is not None]
        self._pooled = torch.stack(pooled) if pooled else None
        extra = [t.extra for t in trajectories if t.extra is not None]
        self._extra = torch.cat(extra)[self._rows] if extra else None

    @property
    def ids(self) -> tuple[int, ...]:
        """Who is in it."""
        return tuple(t.id for t in self.trajectories)

    @property
    def n_rows(self) -> int:
        """Rows of the network call that somebody needs."""
        return self._n_guided + len(self.trajectories)

    @torch.inference_mode()
    def step(self) -> None:
        """One network call for all, and every trajectory moves past it. Raises before any of them has done so."""
        coast(self.trajectories)
        latents = torch.cat([t.latents for t in self.trajectories])
        evaluations = [t.evaluation for t in self.trajectories]
        places = sent(torch.tensor([(e.timestep, e.alpha, e.sigma) for e in evaluations]), latents.device)
        self.call = NetworkRows(
            latents=latents[self._rows],
            timestep=places[:, 0][self._rows],
            guidance=self._row_guidance,
            states=self._states,
            n_tokens=self._n_tokens,
            pooled=self._pooled,
            extra=self._extra,
            size_px=self._size_px,
        )
        with self._family.loras.on_denoiser(self._loras, self._family.denoiser):
            answer = self._family.predict(self.call)[: self.n_rows]
        alpha, sigma = (places[:, column].view(-1, 1, 1, 1) for column in (1, 2))
        denoised = to_denoised(self._guide(answer), latents, alpha, sigma, self._family.schedule)
        for row, trajectory in enumerate(self.trajectories):
            if trajectory.forecast is not None:
                here = slice(row, row + 1)
                trajectory.forecast.learn(evaluations[row], latents[here], denoised[here])
        advance(self.trajectories, denoised)

    def _guide(self, answer: Tensor) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598), each row with its own weight; rows without it pass through."""
        negative, positive = answer[: self._n_guided], answer[self._n_guided :]
        if not self._n_guided:
            return positive
        guided = negative + self._guidance * (positive[self._guided] - negative)
        return positive.index_copy(0, self._guided, guided)


def shares_step(family: LatentFamily, trajectory: Trajectory, *, checkpoint: str) -> tuple[object, ...]:
    """Who MAY be in one network call: trajectories for which this is equal. Everything else is per row."""
    positive = trajectory.prompts.positive
    return (
        checkpoint,
        tuple(trajectory.latents.shape[1:]),
        positive.states.shape[-1] if family.mixes_lengths else tuple(positive.states.shape),
        None if positive.pooled is None else tuple(positive.pooled.shape),
        None if trajectory.extra is None else trajectory.extra.shape[1],
        family.name,
    )
