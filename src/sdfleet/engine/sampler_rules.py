"""One-step rules: what a sampler does with the network's answer, as weights over six tensors.

Latents are x = alpha * x0 + sigma * noise in the network's own space, where every rule below is a weighted sum of
`BASIS`. Each rule mirrors the `step` of one diffusers class; `path` says where x is and where the step leads. Free of
torch; float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from sdfleet.engine.noise_path import NoisePath
from sdfleet.engine.noise_schedule import Floats, NoiseSchedule, ends_noisy, flag, number, text

BASIS = ("x", "denoised", "previous_denoised", "before_previous_denoised", "saved", "noise")

Coefficients = tuple[float, float, float, float, float, float]
KEEP_SAVED: Coefficients = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One call of the network, and what follows from it.

    timestep: what the network is told; may be fractional; for flow models 1000 * sigma.
    alpha, sigma: where x is when the network is called.
    next: coefficients over BASIS that give the next x; save: those that give the next `saved`.
    next_alpha, next_sigma: where x is then, (1, 0) at the end; inpainting blends in the known part there.
    draws_noise: whether noise is drawn here, even if its weight is 0; diffusers' pixels need the same draws.
    step: the user's step this belongs to, from 1; Heun calls the network twice in a step.
    """

    timestep: float
    alpha: float
    sigma: float
    next: Coefficients
    save: Coefficients = KEEP_SAVED
    next_alpha: float = 1.0
    next_sigma: float = 0.0
    draws_noise: bool = False
    step: int = 1


def _weights(
    *,
    x: float = 0.0,
    denoised: float = 0.0,
    previous: float = 0.0,
    before_previous: float = 0.0,
    saved: float = 0.0,
    noise: float = 0.0,
) -> Coefficients:
    return (float(x), float(denoised), float(previous), float(before_previous), float(saved), float(noise))


def _straight(path: NoisePath, begin: int, _schedule: NoiseSchedule) -> Iterator[Evaluation]:
    """Euler (arXiv:2206.00364), DDIM (arXiv:2010.02502) and flow Euler (arXiv:2403.03206): the same rule.

    The noise in x is taken as what the network says it is, and the point moves along it.
    """
    for i in range(begin, len(path)):
        yield _evaluation(path, i, begin, _straight_step(path, i))


def _straight_step(path: NoisePath, i: int) -> Coefficients:
    kept = path.landing_sigmas[i] / path.sigmas[i]
    return _weights(x=kept, denoised=path.landing_alphas[i] - path.alphas[i] * kept)


def _ancestral(path: NoisePath, begin: int, _schedule: NoiseSchedule) -> Iterator[Evaluation]:
    """Euler that goes further down than asked and adds new noise to come back up; draws at the last step too."""
    for i in range(begin, len(path)):
        here = path.sigmas[i] / path.alphas[i]
        there = here * path.decay(i)
        up = math.sqrt(there**2 * (here**2 - there**2)) / here
        down = math.sqrt(there**2 - up**2)
        scale = path.landing_alphas[i]
        step = _weights(x=scale / path.alphas[i] * down / here, denoised=scale * (1 - down / here), noise=scale * up)
        yield replace(_evaluation(path, i, begin, step), draws_noise=True)


def _heun(path: NoisePath, begin: int, schedule: NoiseSchedule) -> Iterator[Evaluation]:
    """Heun's method (arXiv:2206.00364, algorithm 1): an Euler step, then again with the mean of both slopes."""
    for i in range(begin, len(path)):
        trial = replace(_evaluation(path, i, begin, _straight_step(path, i)), save=_weights(x=1.0))
        yield trial
        if i + 1 == len(path):
            return
        # Slopes are taken where the method is defined: of x / alpha over sigma / alpha, or of x over sigma for flow.
        is_flow = schedule.kind == "flow"
        scale, scale2 = (1.0, 1.0) if is_flow else (1 / trial.alpha, 1 / trial.next_alpha)
        time, time2 = scale * trial.sigma, scale2 * trial.next_sigma
        half = 0.5 * (time2 - time)
        again = _weights(
            saved=scale / scale2 * (1 + half / time),
            previous=-half / time / scale2,
            x=half / time2,
            denoised=-half / time2 / scale2,
        )
        yield replace(
            _evaluation(path, i + 1, begin, again),
            next_alpha=trial.next_alpha,
            next_sigma=trial.next_sigma,
            step=trial.step,
        )


def _dpm(path: NoisePath, begin: int, schedule: NoiseSchedule) -> Iterator[Evaluation]:
    """DPM-Solver++ 2M (arXiv:2211.01095, algorithm 2)."""
    for i in range(begin, len(path)):
        alpha, sigma, decay = path.landing_alphas[i], path.landing_sigmas[i], path.decay(i)
        gain = alpha * (1 - decay)
        slope = _dpm_slope(path, i, begin, schedule, gain=gain, straight=alpha, decay=decay)
        step = _weights(x=sigma / path.sigmas[i], denoised=gain + slope, previous=-slope)
        yield _evaluation(path, i, begin, step)


def _dpm_sde(path: NoisePath, begin: int, schedule: NoiseSchedule) -> Iterator[Evaluation]:
    """DPM-Solver++ 2M for the stochastic equation; draws noise at every step."""
    for i in range(begin, len(path)):
        alpha, sigma, decay = path.landing_alphas[i], path.landing_sigmas[i], path.decay(i)
        gain = alpha * (1 - decay**2)
        slope = _dpm_slope(path, i, begin, schedule, gain=gain, straight=alpha, decay=decay**2)
        step = _weights(
            x=sigma / path.sigmas[i] * decay,
            denoised=gain + slope,
            previous=-slope,
            noise=sigma * math.sqrt(max(1 - decay**2, 0.0)),
        )
        yield replace(_evaluation(path, i, begin, step), draws_noise=True)


def _dpm_slope(
    path: NoisePath, i: int, begin: int, schedule: NoiseSchedule, *, gain: float, straight: float, decay: float
) -> float:
    """The weight of (denoised - previous) in a DPM-Solver step: 0 for its first-order steps."""
    config, n = schedule.config, len(path)
    is_last = i == n - 1
    ends_first_order = (
        flag(config, "euler_at_final")
        or (bool(config.get("lower_order_final", True)) and n < 15)
        or not ends_noisy(config)
    )
    if i == begin or (is_last and ends_first_order) or decay in (0.0, 1.0):
        return 0.0
    h = -math.log(path.decay(i))
    per_gap = h / path.previous_gap(i)
    if text(config, "solver_type", "midpoint") == "heun":
        return straight * (1 - gain / straight / -math.log(decay)) * per_gap
    return 0.5 * gain * per_gap


def _unipc(path: NoisePath, begin: int, schedule: NoiseSchedule) -> Iterator[Evaluation]:
    """UniPC of order 2 (arXiv:2302.04867): each prediction is corrected once the network has been there."""
    config, n = schedule.config, len(path)
    is_bh1 = text(config, "solver_type", "bh2") == "bh1"
    uncorrected = _uncorrected_steps(schedule)
    order = 1
    for i in range(begin, n):
        here = np.array(_weights(x=1.0))
        if i > begin and i - 1 not in uncorrected:
            here = _unipc_corrector(path, i - 1, order=order, is_bh1=is_bh1)
        wanted = min(2, n - i) if config.get("lower_order_final", True) else 2
        order = min(wanted, i - begin + 1)
        alpha, decay = float(path.landing_alphas[i]), path.decay(i)
        gain = alpha * (1 - decay)
        step = here * (path.landing_sigmas[i] / path.sigmas[i]) + np.array(_weights(denoised=gain))
        if order == 2 and 0 < decay < 1:
            h = -math.log(decay)
            ratio = -path.previous_gap(i) / h
            slope = 0.5 * alpha * _unipc_scale(h, is_bh1=is_bh1) / ratio
            step += np.array(_weights(denoised=-slope, previous=slope))
        yield replace(_evaluation(path, i, begin, _weights_of(step)), save=_weights_of(here))


def _unipc_corrector(path: NoisePath, i: int, *, order: int, is_bh1: bool) -> Floats:
    """Step i taken again from where it began, now that the network has seen where it led, over BASIS."""
    alpha, sigma, decay = float(path.alphas[i + 1]), float(path.sigmas[i + 1]), path.decay(i)
    h = -math.log(decay)
    scale = alpha * _unipc_scale(h, is_bh1=is_bh1)
    weights = np.array(_weights(saved=sigma / path.sigmas[i], previous=alpha * (1 - decay)))
    if order == 1:
        return weights + np.array(_weights(denoised=0.5 * scale, previous=-0.5 * scale))
    ratio = -path.previous_gap(i) / h
    phi_2 = math.expm1(-h) / -h - 1
    phi_3 = phi_2 / -h - 0.5
    unscaled = -_unipc_scale(h, is_bh1=is_bh1)
    old, new = np.linalg.solve(np.array([[1, 1], [ratio, 1]]), np.array([phi_2, 2 * phi_3]) / unscaled)
    correction = _weights(
        denoised=new * scale,
        previous=-(new + old / ratio) * scale,
        before_previous=old / ratio * scale,
    )
    return weights + np.array(correction)


def _unipc_scale(h: float, *, is_bh1: bool) -> float:
    """-B(h) of the paper: h or 1 - exp(-h)."""
    return h if is_bh1 else -math.expm1(-h)


def _uncorrected_steps(schedule: NoiseSchedule) -> frozenset[int]:
    listed = schedule.config.get("disable_corrector", ())
    return frozenset(int(i) for i in listed) if isinstance(listed, list | tuple) else frozenset()


def _evaluation(path: NoisePath, i: int, begin: int, coefficients: Coefficients) -> Evaluation:
    """The evaluation at step i, which leads to the next step's place, or to the end."""
    is_last = i + 1 == len(path)
    return Evaluation(
        timestep=float(path.timesteps[i]),
        alpha=float(path.alphas[i]),
        sigma=float(path.sigmas[i]),
        next=coefficients,
        next_alpha=1.0 if is_last else float(path.alphas[i + 1]),
        next_sigma=0.0 if is_last else float(path.sigmas[i + 1]),
        step=i - begin + 1,
    )


def _weights_of(values: Floats) -> Coefficients:
    x, denoised, previous, before_previous, saved, noise = values
    return _weights(
        x=x, denoised=denoised, previous=previous, before_previous=before_previous, saved=saved, noise=noise
    )


def _consistency(path: NoisePath, begin: int, schedule: NoiseSchedule) -> Iterator[Evaluation]:
    """LCM (arXiv:2310.04378): jump to the picture, then put new noise on it."""
    is_flow = schedule.kind == "flow"
    for i in range(begin, len(path)):
        skip, out = (0.0, 1.0) if is_flow else _boundary_scalings(schedule, float(path.timesteps[i]))
        is_last = i + 1 == len(path)
        alpha = float(path.landing_alphas[i])
        step = _weights(x=alpha * skip, denoised=alpha * out, noise=0.0 if is_last else path.landing_sigmas[i])
        # The flow class draws at its last step too, where the noise counts for nothing.
        yield replace(_evaluation(path, i, begin, step), draws_noise=is_flow or not is_last)


def _boundary_scalings(schedule: NoiseSchedule, timestep: float) -> tuple[float, float]:
    scaled = timestep * number(schedule.config, "timestep_scaling", 10.0)
    return 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)


Rule = Callable[[NoisePath, int, NoiseSchedule], Iterator[Evaluation]]
RULES: dict[str, Rule] = {
    "euler": _straight,
    "ddim": _straight,
    "euler_a": _ancestral,
    "heun": _heun,
    "dpm++_2m": _dpm,
    "dpm++_2m_sde": _dpm_sde,
    "unipc": _unipc,
    "lcm": _consistency,
}
