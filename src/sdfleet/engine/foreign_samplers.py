"""Samplers that only diffusers knows: its scheduler class, one instance for each picture.

A scheduler class keeps its history inside itself, so it is never shared between rows. The engine still sees latents in
the network's own space (x = alpha * x0 + sigma * noise) and denoised predictions; this file translates both ways.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdfleet.engine.noise_schedule import NoiseSchedule
from sdfleet.engine.sampler_names import SamplerName, parse_sampler
from sdfleet.engine.sampler_rules import Evaluation
from sdfleet.engine.samplers import check_sampler_fits, n_skipped_steps, reference_class
from sdfleet.errors import InvalidValue

if TYPE_CHECKING:
    from torch import Generator, Tensor

# These keep x / alpha = x0 + ratio * noise between steps and divide before they show it to the network.
_KEEP_RATIO_SPACE = frozenset(
    (
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSDEScheduler",
    )
)
# These have no list of noise levels and look alpha^2 up by timestep.
_LOOK_UP_BY_TIMESTEP = frozenset(("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler"))
_NO_RULE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class ForeignSampler:
    """One picture's own diffusers scheduler, from pure noise or an input picture to the end.

    evaluations: every network call, as in a Plan, but without coefficients: `advance` takes the step.
    start_scale: the first x of txt2img is start_scale * noise.
    Raises InvalidValue when the class refuses these settings, UnsupportedByModel for a flow matching network.
    """

    def __init__(
        self, sampler: str | SamplerName, schedule: NoiseSchedule, *, n_steps: int, strength: float = 1.0
    ) -> None:
        name = parse_sampler(sampler)
        check_sampler_fits(name, schedule)
        if not 1 <= n_steps <= schedule.n_train_timesteps:
            raise InvalidValue("steps", f"{n_steps} is not between 1 and {schedule.n_train_timesteps}")
        self.name = str(name)
        self._prediction = schedule.prediction
        self._scheduler = _scheduler(name, schedule, n_steps)
        n_skipped = n_skipped_steps(n_steps, strength, schedule.kind)
        self.n_steps = n_steps - n_skipped
        self._begin = n_skipped * int(self._scheduler.order)
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(self._begin)
        self._keeps_ratio_space = type(self._scheduler).__name__ in _KEEP_RATIO_SPACE
        self._takes_generator = "generator" in inspect.signature(self._scheduler.step).parameters
        self._position = 0
        self.evaluations = self._evaluations()
        scale = float(self._scheduler.init_noise_sigma)
        self.start_scale = scale * self.evaluations[0].alpha if self._keeps_ratio_space else scale

    @property
    def draws_noise(self) -> bool:
        """Whether the class may add noise on the way."""
        return self._takes_generator or hasattr(self._scheduler, "noise_sampler_seed")

    def advance(self, latents: Tensor, denoised: Tensor, generator: Generator) -> Tensor:
        """The latents after the next evaluation; noise, where the class wants some, comes from `generator`."""
        here = self.evaluations[self._position]
        timestep = self._scheduler.timesteps[self._begin + self._position]
        sample = latents / here.alpha if self._keeps_ratio_space else latents
        if self._position == 0 and hasattr(self._scheduler, "noise_sampler_seed"):
            self._scheduler.noise_sampler_seed = generator.initial_seed()
        # Some classes find their place in this call, and some complain without it.
        self._scheduler.scale_model_input(sample, timestep)
        noise = {"generator": generator} if self._takes_generator else {}
        answer = self._network_answer(latents, denoised, here)
        sample = self._scheduler.step(answer, timestep, sample, **noise).prev_sample
        self._position += 1
        return sample * here.next_alpha if self._keeps_ratio_space else sample

    def _network_answer(self, latents: Tensor, denoised: Tensor, here: Evaluation) -> Tensor:
        """What the network must have said for `denoised` to follow."""
        match self._prediction:
            case "epsilon":
                return (latents - here.alpha * denoised) / here.sigma
            case "v_prediction":
                return (here.alpha * latents - denoised) / here.sigma
            case _:
                return denoised

    def _evaluations(self) -> tuple[Evaluation, ...]:
        timesteps = self._scheduler.timesteps[self._begin :]
        n = len(timesteps)
        places = [self._alpha_sigma(self._begin + i) for i in range(n)]
        evaluations = [
            Evaluation(
                timestep=float(timesteps[i]),
                alpha=alpha,
                sigma=sigma,
                next=_NO_RULE,
                # PNDM calls the network once more than there are steps, second-order classes once less than twice.
                step=i * self.n_steps // n + 1,
            )
            for i, (alpha, sigma) in enumerate(places)
        ]
        following = [*places[1:], (1.0, 0.0)]
        return tuple(
            replace(evaluation, next_alpha=alpha, next_sigma=sigma)
            for evaluation, (alpha, sigma) in zip(evaluations, following, strict=True)
        )

    def _alpha_sigma(self, index: int) -> tuple[float, float]:
        scheduler = self._scheduler
        if type(scheduler).__name__ in _LOOK_UP_BY_TIMESTEP:
            timestep, table = int(scheduler.timesteps[index]), scheduler.alphas_cumprod
            if not 0 <= timestep < len(table):
                raise InvalidValue("steps", f"{self.name} would start past the last timestep", hint="use fewer steps")
            product = float(table[timestep])
            return math.sqrt(product), math.sqrt(1 - product)
        ratio = _ratio(scheduler, index)
        alpha = 1 / math.hypot(ratio, 1.0)
        return alpha, ratio * alpha


def _ratio(scheduler: Any, index: int) -> float:
    """sigma / alpha at an evaluation; at every second one, a second-order class is between two of its steps."""
    is_second_half = index % 2 == 1
    match type(scheduler).__name__:
        case "KDPM2DiscreteScheduler" if is_second_half:
            return float(scheduler.sigmas_interpol[index])
        case "KDPM2AncestralDiscreteScheduler" if is_second_half:
            return float(scheduler.sigmas_interpol[index - 1])
        case "DPMSolverSDEScheduler" if is_second_half:
            return math.sqrt(float(scheduler.sigmas[index - 1]) * float(scheduler.sigmas[index]))
        case _:
            return float(scheduler.sigmas[index])


def _scheduler(name: SamplerName, schedule: NoiseSchedule, n_steps: int) -> Any:
    class_name, extra = reference_class(name, schedule)
    if class_name == "DPMSolverSDEScheduler" and importlib.util.find_spec("torchsde") is None:
        raise InvalidValue(
            "sampler",
            f"{str(name)!r} needs the torchsde package, which is not installed",
            hint="pip install torchsde, or use 'dpm++_2m_sde'",
        )
    import diffusers

    try:
        scheduler = getattr(diffusers, class_name).from_config({**schedule.config, **extra})
        scheduler.set_timesteps(n_steps)
    except (ValueError, NotImplementedError, IndexError) as exc:
        raise InvalidValue("sampler", f"{str(name)!r} does not go with this model and {n_steps} steps: {exc}") from exc
    return scheduler
