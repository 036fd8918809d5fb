"""Which timesteps and noise levels a sampler visits, as its diffusers class would set them.

Each builder mirrors the `set_timesteps` of one class, down to what it rounds, cuts off or counts twice. Free of torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sdfleet.engine.noise_schedule import (
    ClassDefaults,
    Floats,
    Floats32,
    NoiseSchedule,
    as_float32,
    configured_spacing,
    ends_noisy,
    flag,
    integer,
    number,
    respace,
    shifted,
    text,
    time_shifted,
    timestep_of_ratio,
)
from sdfleet.engine.sampler_names import SamplerName, Spacing
from sdfleet.errors import InvalidValue, UnsupportedByModel

_DEFAULTS = {
    "euler": ClassDefaults(),
    "euler_a": ClassDefaults(),
    "heun": ClassDefaults(beta_start=0.00085, beta_end=0.012, zero_snr="ignored"),
    "ddim": ClassDefaults(timestep_spacing="leading", zero_snr="exact"),
    "dpm++_2m": ClassDefaults(),
    "dpm++_2m_sde": ClassDefaults(),
    "unipc": ClassDefaults(),
    "lcm": ClassDefaults(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", zero_snr="exact"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePath:
    """Where x is at each step, and where the step's rule takes it.

    timesteps, alphas, sigmas: [n], what the network meets. landing_alphas, landing_sigmas: [n], what the step aims at;
    the next step's own place but for DDIM, whose arithmetic may miss it by a timestep, and for the end.
    """

    timesteps: Floats
    alphas: Floats
    sigmas: Floats
    landing_alphas: Floats
    landing_sigmas: Floats
    start_scale: float = 1.0
    is_consistency_flow: bool = False

    def __len__(self) -> int:
        return len(self.timesteps)

    def decay(self, i: int) -> float:
        """exp(-h) of step i: what is left of the ratio sigma / alpha after it; 0 at a noiseless end."""
        return float(self.landing_sigmas[i] / self.landing_alphas[i] / self._ratio(i))

    def previous_gap(self, i: int) -> float:
        """log(alpha / sigma) gained from step i-1 to step i."""
        return math.log(self._ratio(i - 1) / self._ratio(i))

    def _ratio(self, i: int) -> float:
        return float(self.sigmas[i] / self.alphas[i])


def noise_path(name: SamplerName, schedule: NoiseSchedule, *, n_steps: int, n_latent_tokens: int | None) -> NoisePath:
    """Where the named sampler goes in n_steps steps."""
    if schedule.kind == "flow":
        return _flow_path(name, schedule, n_steps=n_steps, n_latent_tokens=n_latent_tokens)
    match name.rule:
        case "ddim":
            return _ddim_path(schedule, n_steps)
        case "lcm":
            return _lcm_path(schedule, n_steps)
        case "dpm++_2m" | "dpm++_2m_sde":
            return _dpm_path(name, schedule, n_steps)
        case "unipc":
            return _unipc_path(name, schedule, n_steps)
        case _:
            return _euler_path(name, schedule, n_steps)


def _spaced_timesteps(
    schedule: NoiseSchedule, n_steps: int, defaults: ClassDefaults, *, n_left_out: int, n_used: int | None = None
) -> Floats:
    """The config's grid of training timesteps, highest first, [n_steps] (arXiv:2305.08891, table 2).

    n_left_out: how many points of an evenly spaced grid are left out at its low end: none, or 1 for the DPM solvers.
    n_used: how many training timesteps take part, from 0 up; all of them unless said.
    """
    n = schedule.n_train_timesteps if n_used is None else n_used
    n_points = n_steps + n_left_out
    match text(schedule.config, "timestep_spacing", defaults.timestep_spacing):
        case "linspace":
            return np.linspace(0, n - 1, n_points)[::-1][:n_steps]
        case "leading":
            rising: Floats = np.arange(n_points, dtype=np.float64) * (n // n_points)
            return rising[::-1][:n_steps] + number(schedule.config, "steps_offset", 0)
        case "trailing":
            # For some step counts (61, 103, ...) rounding adds a step below timestep 0 to diffusers' grid; not to ours.
            return np.arange(n, 0, -schedule.n_train_timesteps / n_steps)[:n_steps].round() - 1
        case other:
            raise UnsupportedByModel(f"the checkpoint's timestep spacing {other!r} is not known")


def _euler_path(name: SamplerName, schedule: NoiseSchedule, n_steps: int) -> NoisePath:
    """EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete."""
    defaults, config = _DEFAULTS[name.rule], schedule.config
    table = schedule.ratios(defaults)
    # float32 as diffusers has it: a linspace grid is fractional here, and the network is told so.
    timesteps = as_float32(_spaced_timesteps(schedule, n_steps, defaults, n_left_out=0))
    ratios = np.interp(timesteps, np.arange(len(table)), table)
    spacing = _spacing(name, schedule)
    if spacing != "default":
        ratios = respace(ratios, spacing, n_steps=n_steps, config=config)
        timesteps = as_float32(_timesteps_of(ratios, table))
    end = float(table[0]) if name.rule == "euler" and ends_noisy(schedule.config) else 0.0
    path = _ratio_path(timesteps, ratios, end)
    # The class keeps x / alpha, and starts it as noise times its largest ratio, or that in quadrature with 1.
    largest = float(as_float32(ratios).max())
    is_leading = text(config, "timestep_spacing", defaults.timestep_spacing) == "leading"
    start = math.hypot(largest, 1.0) if is_leading else largest
    # What such a class ends with is x / alpha too, and that is what gets decoded.
    return replace(
        path,
        start_scale=start * float(path.alphas[0]),
        landing_alphas=np.append(path.landing_alphas[:-1], 1.0),
        landing_sigmas=np.append(path.landing_sigmas[:-1], end),
    )


def _dpm_path(name: SamplerName, schedule: NoiseSchedule, n_steps: int) -> NoisePath:
    """DPMSolverMultistep."""
    defaults, config = _DEFAULTS[name.rule], schedule.config
    table = schedule.ratios(defaults)
    # Below `lambda_min_clipped` the network saw almost nothing but noise; a cosine schedule needs that part left out.
    floor = number(config, "lambda_min_clipped", -math.inf)
    n_used = schedule.n_train_timesteps - int(np.searchsorted(-np.log(table)[::-1], floor))
    timesteps = _spaced_timesteps(schedule, n_steps, defaults, n_left_out=1, n_used=n_used).round()
    spacing = _spacing(name, schedule)
    if spacing == "default":
        ratios = np.interp(timesteps, np.arange(len(table)), table)
    else:
        ratios = respace(table[::-1].astype(np.float64), spacing, n_steps=n_steps, config=config)
        timesteps = _timesteps_of(ratios, table)
        is_cosine = text(config, "beta_schedule", defaults.beta_schedule) == "squaredcos_cap_v2"
        if spacing == "karras" and not is_cosine:
            timesteps = timesteps.round()
    end = float(table[0]) if ends_noisy(schedule.config) else 0.0
    return _falling(_ratio_path(np.trunc(timesteps), ratios, end))


def _unipc_path(name: SamplerName, schedule: NoiseSchedule, n_steps: int) -> NoisePath:
    """UniPCMultistep."""
    defaults = _DEFAULTS[name.rule]
    table = schedule.ratios(defaults)
    timesteps = _spaced_timesteps(schedule, n_steps, defaults, n_left_out=1).round()
    ratios = np.interp(timesteps, np.arange(len(table)), table)
    last = float(table[0])
    spacing = _spacing(name, schedule)
    if spacing != "default":
        ratios = respace(table[::-1].astype(np.float64), spacing, n_steps=n_steps, config=schedule.config)
        timesteps = _timesteps_of(ratios, table)
        timesteps = timesteps.round() if spacing == "karras" else timesteps
        last = float(ratios[-1])
    return _falling(_ratio_path(np.trunc(timesteps), ratios, last if ends_noisy(schedule.config) else 0.0))


def _ddim_path(schedule: NoiseSchedule, n_steps: int) -> NoisePath:
    defaults, n = _DEFAULTS["ddim"], schedule.n_train_timesteps
    products = schedule.alphas_cumprod(defaults).astype(np.float64)
    timesteps = _spaced_timesteps(schedule, n_steps, defaults, n_left_out=0).round()
    if timesteps[0] >= n:
        raise InvalidValue("steps", f"{n_steps} steps start past the last timestep {n - 1}", hint="use fewer steps")
    end = 1.0 if schedule.config.get("set_alpha_to_one", True) else products[0]
    # DDIM subtracts the same whole number of timesteps each time, wherever the grid goes next.
    before = timesteps.astype(int) - n // n_steps
    landing = np.where(before >= 0, products[before.clip(0)], end)
    return _product_path(timesteps, products[timesteps.astype(int)], landing)


def _lcm_path(schedule: NoiseSchedule, n_steps: int) -> NoisePath:
    n = schedule.n_train_timesteps
    n_distilled = integer(schedule.config, "original_inference_steps", 50)
    if n_steps > n_distilled:
        raise InvalidValue("steps", f"lcm takes at most {n_distilled} steps with this model", hint="4 to 8 are usual")
    distilled = (np.arange(1, n_distilled + 1) * (n // n_distilled) - 1)[::-1]
    timesteps = distilled[np.floor(np.linspace(0, n_distilled, n_steps, endpoint=False)).astype(int)]
    products = schedule.alphas_cumprod(_DEFAULTS["lcm"]).astype(np.float64)[timesteps]
    return _product_path(timesteps.astype(np.float64), products, np.append(products[1:], 1.0))


def _flow_path(name: SamplerName, schedule: NoiseSchedule, *, n_steps: int, n_latent_tokens: int | None) -> NoisePath:
    config, n = schedule.config, schedule.n_train_timesteps
    if name.rule in ("dpm++_2m", "unipc"):
        sigmas = _solver_flow_sigmas(name, schedule, n_steps=n_steps, n_latent_tokens=n_latent_tokens)
        timesteps = np.trunc(sigmas * n)
        sigmas = as_float32(sigmas)
    else:
        sigmas = schedule.flow_sigmas(n_steps, spacing=name.spacing, n_latent_tokens=n_latent_tokens)
        timesteps = as_float32(sigmas * n)
    ends = as_float32(
        np.append(sigmas[1:], sigmas[-1] if name.rule == "unipc" and ends_noisy(schedule.config) else 0.0)
    )
    return NoisePath(
        timesteps=timesteps,
        alphas=1 - sigmas,
        sigmas=sigmas,
        landing_alphas=1 - ends,
        landing_sigmas=ends,
        is_consistency_flow=name.rule == "lcm" or (name.rule == "euler" and flag(config, "stochastic_sampling")),
    )


def _solver_flow_sigmas(
    name: SamplerName, schedule: NoiseSchedule, *, n_steps: int, n_latent_tokens: int | None
) -> Floats:
    """The flow grids of DPMSolverMultistep and UniPCMultistep, which are not FlowMatchEulerDiscrete's."""
    even = np.linspace(1, 1 / schedule.n_train_timesteps, n_steps + 1)
    if name.rule == "dpm++_2m":
        sigmas = (1.0 - even)[::-1][:-1]
    else:
        sigmas = even[:-1]
    if flag(schedule.config, "use_dynamic_shifting"):
        sigmas = time_shifted(sigmas, schedule.shift_exponent(n_latent_tokens, n_steps=n_steps))
    else:
        sigmas = shifted(sigmas, number(schedule.config, "shift", 1.0))
    if name.rule == "unipc":
        sigmas = schedule.stretched_to_terminal(sigmas)
        # At sigma = 1 the logarithm of alpha / sigma would be infinite.
        if abs(sigmas[0] - 1) < 1e-6:
            sigmas[0] -= 1e-6
    return sigmas


def _spacing(name: SamplerName, schedule: NoiseSchedule) -> Spacing:
    if name.rule == "euler_a":
        return "default"
    return name.spacing if name.spacing != "default" else configured_spacing(schedule.config)


def _falling(path: NoisePath) -> NoisePath:
    """The path, if each step really gets somewhere; solvers that look back divide by what the last step gained."""
    if len(path) > 1 and not (np.diff(path.sigmas) < 0).all():
        raise InvalidValue("steps", f"{len(path)} steps repeat a timestep with this sampler", hint="use fewer steps")
    return path


def _timesteps_of(ratios: Floats, table: Floats32) -> Floats:
    log_table = np.log(table)
    return np.array([timestep_of_ratio(float(ratio), log_table) for ratio in ratios])


def _ratio_path(timesteps: Floats, ratios: Floats, end: float) -> NoisePath:
    all_ratios = as_float32(np.append(ratios, end))
    alphas = 1 / np.sqrt(all_ratios**2 + 1)
    sigmas = all_ratios * alphas
    return NoisePath(
        timesteps=timesteps,
        alphas=alphas[:-1],
        sigmas=sigmas[:-1],
        landing_alphas=alphas[1:],
        landing_sigmas=sigmas[1:],
    )


def _product_path(timesteps: Floats, products: Floats, landing: Floats) -> NoisePath:
    return NoisePath(
        timesteps=timesteps,
        alphas=np.sqrt(products),
        sigmas=np.sqrt(1 - products),
        landing_alphas=np.sqrt(landing),
        landing_sigmas=np.sqrt(1 - landing),
    )
