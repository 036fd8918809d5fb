"""The way from noise to a picture, computed beforehand: a `Plan` of network calls and of what follows each.

Latents stay in the network's own space, x = alpha * x0 + sigma * noise. There every sampler's step is a weighted sum of
at most six tensors (`BASIS`), so rows at different steps of different samplers advance together in one small matrix
product. Free of torch; float64. Each rule mirrors one diffusers scheduler class, which `reference_class` names and the
tests run beside it.

The engine, for each evaluation: denoised = network(x, timestep); noise is drawn if `draws_noise`; x and `saved` become
`next` and `save` over the basis; then before_previous <- previous <- denoised. What has not been set yet is zero.

>>> from sdfleet.engine.noise_schedule import NoiseSchedule
>>> schedule = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}, even_sigmas=True)
>>> for e in plan("euler", schedule, n_steps=2).evaluations:
...     print(e.step, e.timestep, e.next[:2], e.next_sigma)
1 1000.0 (0.5, 0.5) 0.5
2 500.0 (0.0, 1.0) 0.0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdfleet.engine.noise_path import noise_path
from sdfleet.engine.noise_schedule import Kind, NoiseSchedule, flag, number, text
from sdfleet.engine.sampler_names import SamplerName, a1111_label, known_samplers, parse_sampler
from sdfleet.engine.sampler_rules import BASIS, RULES, Evaluation
from sdfleet.errors import InvalidValue, UnsupportedByModel

if TYPE_CHECKING:
    from sdfleet.engine.foreign_samplers import ForeignSampler

__all__ = [
    "BASIS",
    "Evaluation",
    "NoiseSchedule",
    "Plan",
    "SamplerName",
    "a1111_label",
    "has_own_rule",
    "known_samplers",
    "make_sampler",
    "n_skipped_steps",
    "parse_sampler",
    "plan",
    "reference_class",
]

FLOW_RULES = ("euler", "heun", "dpm++_2m", "unipc", "lcm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every network call of one picture, in order.

    start_scale: the first x of txt2img is start_scale * noise; with an input picture it is alpha * x0 + sigma * noise
        at evaluations[0].
    n_steps: the user's steps that remain after `strength` has cut the beginning off.
    """

    name: str
    start_scale: float
    evaluations: tuple[Evaluation, ...]
    n_steps: int

    @property
    def draws_noise(self) -> bool:
        """Whether noise is added on the way."""
        return any(evaluation.draws_noise for evaluation in self.evaluations)


def make_sampler(
    sampler: str | SamplerName,
    schedule: NoiseSchedule,
    *,
    n_steps: int,
    strength: float = 1.0,
    n_latent_tokens: int | None = None,
) -> Plan | ForeignSampler:
    """A plan where we have the rule, else diffusers' scheduler class for this picture alone. Raises as `plan` does."""
    name = parse_sampler(sampler)
    check_sampler_fits(name, schedule)
    if has_own_rule(name, schedule):
        return plan(name, schedule, n_steps=n_steps, strength=strength, n_latent_tokens=n_latent_tokens)
    # The only way to torch from here, and only for a sampler that needs it.
    from sdfleet.engine.foreign_samplers import ForeignSampler

    return ForeignSampler(name, schedule, n_steps=n_steps, strength=strength)


def plan(
    sampler: str | SamplerName,
    schedule: NoiseSchedule,
    *,
    n_steps: int,
    strength: float = 1.0,
    n_latent_tokens: int | None = None,
) -> Plan:
    """The plan of a sampler with a rule of its own; ask `has_own_rule` first, or use `make_sampler`.

    strength: (0, 1], how much of the way is gone; below 1 the first steps are left out as diffusers' img2img does.
    n_latent_tokens: needed only by flow schedules that shift by picture size (FLUX).
    Raises UnsupportedByModel for a sampler this network cannot use, InvalidValue where steps and strength do not fit.
    """
    name = parse_sampler(sampler)
    check_sampler_fits(name, schedule)
    if not has_own_rule(name, schedule):
        raise ValueError(f"{name} is a foreign sampler for this schedule")
    if not 1 <= n_steps <= schedule.n_train_timesteps:
        raise InvalidValue("steps", f"{n_steps} is not between 1 and {schedule.n_train_timesteps}")
    begin = n_skipped_steps(n_steps, strength, schedule.kind)
    path = noise_path(name, schedule, n_steps=n_steps, n_latent_tokens=n_latent_tokens)
    rule = RULES["lcm" if path.is_consistency_flow else name.rule]
    evaluations = tuple(rule(path, begin, schedule))
    if not all(math.isfinite(c) for e in evaluations for c in (*e.next, *e.save)):
        raise InvalidValue("steps", f"{name} has no finite answer for {n_steps} steps", hint="use another number")
    return Plan(name=str(name), start_scale=path.start_scale, evaluations=evaluations, n_steps=evaluations[-1].step)


def has_own_rule(sampler: str | SamplerName, schedule: NoiseSchedule) -> bool:
    """Whether `plan` knows the sampler; False sends it to `ForeignSampler`, which runs diffusers' class.

    Clipped or thresholded predictions and a few rare settings are not weighted sums, so they go that way too.
    """
    name = parse_sampler(sampler)
    if name.is_foreign or schedule.kind == "flow":
        return not name.is_foreign
    config = schedule.config
    clips = flag(config, "clip_sample") or flag(config, "thresholding")
    match name.rule:
        case "euler":
            is_continuous = text(config, "timestep_type", "discrete") == "continuous"
            return not is_continuous and text(config, "interpolation_type", "linear") == "linear"
        case "heun":
            return not flag(config, "clip_sample")
        case "ddim":
            # DDIM is the one class that clips when the config does not say.
            return not clips and "clip_sample" in config
        case "lcm":
            return not clips
        case "dpm++_2m" | "dpm++_2m_sde":
            return not (flag(config, "thresholding") or flag(config, "use_lu_lambdas"))
        case "unipc":
            return not (flag(config, "thresholding") or "solver_p" in config or config.get("predict_x0") is False)
        case _:
            return True


def check_sampler_fits(name: SamplerName, schedule: NoiseSchedule) -> None:
    """Raises UnsupportedByModel when the sampler makes no sense for this kind of network."""
    if schedule.kind == "vp":
        return
    if name.rule not in FLOW_RULES:
        raise UnsupportedByModel(
            f"the sampler {str(name)!r} is not for flow matching models", hint=f"use one of {', '.join(FLOW_RULES)}"
        )
    if name.spacing != "default" and name.rule in ("dpm++_2m", "unipc"):
        raise UnsupportedByModel(
            f"{name.rule} has no {name.spacing} spacing on flow matching models",
            hint=f"use {name.rule!r} or 'euler {name.spacing}'",
        )


def n_skipped_steps(n_steps: int, strength: float, kind: Kind) -> int:
    """How many steps an input picture saves. Raises InvalidValue if none would be left.

    diffusers rounds the kept steps down for UNets and up for flow models (its SD and SD3 img2img pipelines differ).
    """
    if kind == "vp":
        skipped = max(n_steps - min(int(n_steps * strength), n_steps), 0)
    else:
        skipped = int(max(n_steps - min(n_steps * strength, n_steps), 0))
    if skipped >= n_steps:
        least = math.ceil(1 / strength) if strength > 0 else n_steps
        raise InvalidValue(
            "strength",
            f"{strength:g} of {n_steps} steps leaves no step to draw",
            hint=f"use at least {least} steps, or a strength of {1 / n_steps:.2f} or more",
        )
    return skipped


def reference_class(sampler: str | SamplerName, schedule: NoiseSchedule) -> tuple[str, dict[str, object]]:
    """The diffusers class a sampler stands for, and what to give `from_config` beside the folder's config."""
    name = parse_sampler(sampler)
    spacing: dict[str, object] = {}
    if name.spacing != "default":
        spacing = {f"use_{other}_sigmas": other == name.spacing for other in ("karras", "exponential", "beta")}
    extra = {**_SOLVER_SETTINGS.get(name.rule, {}), **spacing}
    if schedule.kind == "vp":
        return name.class_name, extra
    if name.rule in _FLOW_CLASSES:
        return _FLOW_CLASSES[name.rule], extra
    plain = {f"use_{other}_sigmas": False for other in ("karras", "exponential", "beta")}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return name.class_name, {**extra, **plain, **flow, "flow_shift": number(schedule.config, "shift", 1.0)}


_SOLVER_SETTINGS: dict[str, dict[str, object]] = {
    "dpm++_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpm++_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    "dpm++_3m": {"algorithm_type": "dpmsolver++", "solver_order": 3},
    "dpm++_3m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    "dpm++_2s": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "unipc": {"solver_order": 2},
    # Stable Diffusion has no Runge-Kutta warm-up: "PLMS" is PNDM without it.
    "pndm": {"skip_prk_steps": True},
}
_FLOW_CLASSES = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "lcm": "FlowMatchLCMScheduler",
}
