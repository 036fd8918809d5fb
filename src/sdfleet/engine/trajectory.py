"""One picture in the making, and how many of them take a step together.

Latents are float32 whatever the model computes in, and stay in the network's own space, x = alpha * x0 + sigma * noise.
There every sampler's step is a fixed combination of six tensors (see samplers.py), so a step of rows with different
samplers, positions and histories is one weighted sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdfleet.domain import Drawing, JobId
from sdfleet.engine.devices import sent
from sdfleet.engine.families.base import Blend, LatentFamily, PromptPair, Source, Start
from sdfleet.engine.foreign_samplers import ForeignSampler
from sdfleet.engine.noise_schedule import NoiseSchedule
from sdfleet.engine.samplers import Evaluation, Plan, make_sampler
from sdfleet.engine.step_cache import Forecast, left_out
from sdfleet.errors import EngineFailed

# Places of the tensors in an Evaluation's coefficients.
_X, _DENOISED, _PREVIOUS, _BEFORE_PREVIOUS, _SAVED, _NOISE = range(6)
_KEEP_SAVED = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_SEEDS = 2**64


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """The lasting truth about one picture; a step batch is only a view of several.

    sampler: a Plan computed beforehand, or a diffusers scheduler of this row's own.
    latents, previous, before_previous, saved: [1, c, h, w] float32 on the device; None before they exist.
    generator: this picture's own noise, on the CPU, so that neighbours and devices never matter.
    forecast: which network calls are left out; None where all are made.
    """

    id: int
    job_id: JobId
    image_index: int
    seed: int
    sampler: Plan | ForeignSampler
    generator: torch.Generator
    prompts: PromptPair
    guidance: float
    latents: Tensor
    blend: Blend | None = None
    extra: Tensor | None = None
    position: int = 0
    previous: Tensor | None = None
    before_previous: Tensor | None = None
    saved: Tensor | None = None
    denoised: Tensor | None = field(default=None, repr=False)
    forecast: Forecast | None = None

    @property
    def n_evaluations(self) -> int:
        """Evaluations on the way from noise to the picture."""
        return len(self.sampler.evaluations)

    @property
    def n_calls(self) -> int:
        """Network calls the whole picture takes: of its evaluations, those that are not left out."""
        return self.n_evaluations - (0 if self.forecast is None else len(self.forecast.left_out))

    @property
    def is_finished(self) -> bool:
        """No call left: `latents` are the picture."""
        return self.position >= self.n_evaluations

    @property
    def evaluation(self) -> Evaluation:
        """The next network call."""
        return self.sampler.evaluations[self.position]

    def guess(self) -> Tensor | None:
        """[1, c, h, w] in the place of the network's denoised latents, if the next call is left out; else None."""
        if self.forecast is None or self.position not in self.forecast.left_out:
            return None
        return self.forecast.denoised(self.evaluation, self.latents)

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt is evaluated too."""
        return self.prompts.negative is not None

    @property
    def n_rows(self) -> int:
        """Rows taken in a step batch."""
        return 2 if self.is_guided else 1


def begin_all(
    drawing: Drawing, family: LatentFamily, prompts: PromptPair, source: Source, *, first_id: int
) -> Iterator[Trajectory]:
    """The pictures of a drawing, one after the other, each at its beginning with a seed of its own.

    source: of the same drawing. first_id: the id of the first picture; the others have those that follow.
    """
    from_noise = drawing.task == "txt2img" or (drawing.task == "inpaint" and drawing.strength == 1)
    for index in range(drawing.n_images):
        seed = (drawing.seed + index) % _SEEDS
        generator = torch.Generator().manual_seed(seed)
        sampler = make_sampler(
            drawing.sampler,
            family.schedule,
            n_steps=drawing.steps,
            strength=family.strength(drawing),
            n_latent_tokens=family.n_latent_tokens(drawing),
        )
        start = family.start(drawing, source, generator)
        guessed = left_out(drawing.step_cache, len(sampler.evaluations))
        yield Trajectory(
            id=first_id + index,
            job_id=drawing.job_id,
            image_index=index,
            seed=seed,
            sampler=sampler,
            generator=generator,
            prompts=prompts,
            guidance=family.guidance_weight(drawing),
            latents=first_latents(sampler, start, from_noise=from_noise),
            blend=start.blend,
            extra=start.extra,
            forecast=Forecast(left_out=guessed, draws_noise=sampler.draws_noise) if guessed else None,
        )


def first_latents(sampler: Plan | ForeignSampler, start: Start, *, from_noise: bool) -> Tensor:
    """[1, c, h, w] float32 to begin with: noise alone, or the input picture with noise of the first step's level."""
    if from_noise or start.clean is None:
        return sampler.start_scale * start.noise
    first = sampler.evaluations[0]
    return first.alpha * start.clean + first.sigma * start.noise


def to_denoised(answer: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What the network believes the clean latents are, from its raw answer.

    All are [n, c, h, w]; alpha and sigma are [n, 1, 1, 1].

    The four parameterisations of x = alpha * x0 + sigma * noise: noise (DDPM, arXiv:2006.11239), velocity
    v = alpha * noise - sigma * x0 (arXiv:2202.00512), flow u = noise - x0 (arXiv:2403.03206), and x0 itself.
    """
    match schedule.prediction:
        case "epsilon":
            return (latents - sigma * answer) / alpha
        case "v_prediction":
            return alpha * latents - sigma * answer
        case "flow":
            return latents - sigma * answer
        case "sample":
            return answer
    raise EngineFailed(f"the checkpoint predicts {schedule.prediction!r}, which is not known")


def advance(trajectories: Sequence[Trajectory], denoised: Tensor) -> None:
    """Take every trajectory past the evaluation just made; `denoised` is [n, c, h, w] float32, row by row."""
    planned = [row for row, t in enumerate(trajectories) if not isinstance(t.sampler, ForeignSampler)]
    if planned:
        rows = denoised if len(planned) == len(trajectories) else denoised[planned]
        _advance_planned([trajectories[row] for row in planned], rows)
    for row, trajectory in enumerate(trajectories):
        if isinstance(trajectory.sampler, ForeignSampler):
            clean = denoised[row : row + 1]
            trajectory.latents = trajectory.sampler.advance(trajectory.latents, clean, trajectory.generator)
            trajectory.denoised = clean
        if trajectory.blend is not None:
            reached = trajectory.evaluation
            trajectory.latents = trajectory.blend.apply(
                trajectory.latents, alpha=reached.next_alpha, sigma=reached.next_sigma
            )
        trajectory.position += 1


def coast(trajectories: Sequence[Trajectory]) -> None:
    """Take every trajectory past the evaluations that it leaves out, to the next one that is computed."""
    while guesses := [(t, denoised) for t in trajectories if (denoised := t.guess()) is not None]:
        advance([t for t, _ in guesses], torch.cat([denoised for _, denoised in guesses]))


def _advance_planned(trajectories: Sequence[Trajectory], denoised: Tensor) -> None:
    evaluations = [t.evaluation for t in trajectories]
    basis: list[Tensor | None] = [
        torch.cat([t.latents for t in trajectories]),
        denoised,
        _stacked([t.previous for t in trajectories], denoised),
        _stacked([t.before_previous for t in trajectories], denoised),
        _stacked([t.saved for t in trajectories], denoised),
        _drawn(trajectories, evaluations, denoised),
    ]
    latents = _combined([e.next for e in evaluations], basis, denoised)
    saving = any(tuple(e.save) != _KEEP_SAVED for e in evaluations)
    saved = _combined([e.save for e in evaluations], basis, denoised) if saving else None
    for row, trajectory in enumerate(trajectories):
        trajectory.latents = latents[row : row + 1]
        trajectory.before_previous = trajectory.previous
        trajectory.previous = trajectory.denoised = denoised[row : row + 1]
        if saved is not None:
            trajectory.saved = saved[row : row + 1]


def _stacked(rows: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """[n, c, h, w]; a row that has nothing there yet is zeros, and no row of coefficients then uses it."""
    if all(row is None for row in rows):
        return None
    nothing = torch.zeros_like(like[:1])
    return torch.cat([nothing if row is None else row for row in rows])


def _drawn(trajectories: Sequence[Trajectory], evaluations: Sequence[Evaluation], like: Tensor) -> Tensor | None:
    if not any(e.draws_noise for e in evaluations):
        return None
    noise = torch.zeros(like.shape)
    for row, (trajectory, evaluation) in enumerate(zip(trajectories, evaluations, strict=True)):
        if evaluation.draws_noise:
            noise[row] = torch.randn(like.shape[1:], generator=trajectory.generator)
    return sent(noise, like.device)


def _combined(coefficients: Sequence[Sequence[float]], basis: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Row i is the sum over the basis of coefficients[i][k] * basis[k][i]; tensors that no row uses cost nothing."""
    total: Tensor | None = None
    for place, tensor in enumerate(basis):
        column = [row[place] for row in coefficients]
        if tensor is None or not any(column):
            continue
        weights = sent(torch.tensor(column, dtype=torch.float32), like.device).view(-1, 1, 1, 1)
        total = weights * tensor if total is None else torch.addcmul(total, weights, tensor)
    return torch.zeros_like(like) if total is None else total
