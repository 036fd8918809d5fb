"""What a checkpoint was trained on: how much noise belongs to which timestep.

Read from the `scheduler_config.json` of a diffusers folder. Free of torch. The tables are computed in float32 step by
step as diffusers computes them (equal but for the last bit of a square root), because it rounds timesteps it got from
float32 logarithms; whatever is derived from a table afterwards is float64.

Two kinds of latents x = alpha * x0 + sigma * noise:
- "vp" (Stable Diffusion 1, 2, XL): alpha^2 + sigma^2 = 1. Papers often write sigma / alpha; here that is the `ratio`.
- "flow" (SD3, FLUX, Z-Image): alpha = 1 - sigma (rectified flow, arXiv:2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from sdfleet.engine.sampler_names import Spacing, rule_of_class
from sdfleet.errors import InvalidValue, UnsupportedByModel

Kind = Literal["vp", "flow"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]

# diffusers puts this in place of alpha^2 = 0, so that the first ratio is 4096 instead of infinite.
ALMOST_ONLY_NOISE = np.float32(2**-24)
_VP_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
_FLOW_KEYS = ("shift", "base_shift", "max_shift", "base_image_seq_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassDefaults:
    """What one diffusers scheduler class assumes where the folder's config is silent.

    zero_snr: what the class makes of `rescale_betas_zero_snr`: alpha^2 of the last timestep is "almost" 0, "exact"ly 0,
        or the key is "ignored".
    """

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    timestep_spacing: str = "linspace"
    zero_snr: Literal["almost", "exact", "ignored"] = "almost"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """The folder's scheduler config, understood.

    prediction: what the network's output means. epsilon: the noise; v_prediction: alpha * noise - sigma * x0;
        sample: x0; flow: noise - x0.
    default_sampler: the sampler that the folder's own scheduler class stands for, as `parse_sampler` reads it.
    even_sigmas: the family's pipeline hands its scheduler sigma = 1, (n-1)/n, ..., 1/n before any shift (FLUX and
        Z-Image do), instead of leaving the grid to the scheduler (SD3 does).
    empirical_shift: the family's pipeline finds mu from FLUX.2's fit over picture size and steps, not from the config.

    >>> schedule = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    >>> schedule.kind, schedule.prediction, schedule.default_sampler
    ('flow', 'flow', 'euler')
    >>> [round(float(sigma), 3) for sigma in schedule.flow_sigmas(4, spacing="default", n_latent_tokens=None)]
    [1.0, 0.858, 0.602, 0.009]
    """

    kind: Kind
    prediction: Prediction
    default_sampler: str
    n_train_timesteps: int
    config: Mapping[str, object]
    even_sigmas: bool = False
    empirical_shift: bool = False

    @classmethod
    def from_config(
        cls, config: Mapping[str, object], *, even_sigmas: bool = False, empirical_shift: bool = False
    ) -> NoiseSchedule:
        """The schedule of a `scheduler_config.json`. Raises UnsupportedByModel for one we cannot sample."""
        config = _without_nones(config)
        class_name = text(config, "_class_name", "")
        if "EDM" in class_name or "sigma_data" in config:
            raise UnsupportedByModel(
                f"{class_name or 'this scheduler config'} follows the EDM formulation, which no sampler here speaks",
                hint="use a checkpoint whose scheduler is of the DDIM, Euler, DPM-Solver or flow matching kind",
            )
        if flag(config, "invert_sigmas") or "scale_factors" in config:
            raise UnsupportedByModel(f"{class_name} with inverted or scale-wise sigmas is not supported")
        if flag(config, "use_flow_sigmas"):
            # Sana and friends: a VP solver class that was given a flow network; it calls the shift `flow_shift`.
            config = {**config, "shift": number(config, "flow_shift", 1.0)}
            return cls._flow(config, class_name, even_sigmas=even_sigmas, empirical_shift=empirical_shift)
        if "Flow" in class_name or (not _has_any(config, _VP_KEYS) and _has_any(config, _FLOW_KEYS)):
            return cls._flow(config, class_name, even_sigmas=even_sigmas, empirical_shift=empirical_shift)
        if not _has_any(config, _VP_KEYS) and rule_of_class(class_name) is None:
            raise UnsupportedByModel(
                f"the scheduler config ({class_name or 'no class named'}) says neither betas nor a flow shift",
                hint="check scheduler/scheduler_config.json of the checkpoint",
            )
        return cls(
            kind="vp",
            prediction=_vp_prediction(config),
            default_sampler=_vp_default_sampler(config, class_name),
            n_train_timesteps=integer(config, "num_train_timesteps", 1000),
            config=MappingProxyType(config),
        )

    @classmethod
    def _flow(
        cls, config: dict[str, object], class_name: str, *, even_sigmas: bool, empirical_shift: bool
    ) -> NoiseSchedule:
        rule = rule_of_class(class_name)
        return cls(
            kind="flow",
            prediction="flow",
            default_sampler=rule if rule in ("heun", "lcm", "dpm++_2m", "unipc") else "euler",
            n_train_timesteps=integer(config, "num_train_timesteps", 1000),
            config=MappingProxyType(config),
            even_sigmas=even_sigmas,
            empirical_shift=empirical_shift,
        )

    def alphas_cumprod(self, defaults: ClassDefaults) -> Floats32:
        """alpha^2 for every training timestep, [n_train_timesteps], as the class with these defaults sees it."""
        betas = self._betas(defaults)
        rescale = defaults.zero_snr != "ignored" and flag(self.config, "rescale_betas_zero_snr")
        if rescale:
            betas = _rescaled_to_zero_snr(betas)
        products = _cumulative_product(np.float32(1) - betas)
        if rescale and defaults.zero_snr == "almost":
            products[-1] = ALMOST_ONLY_NOISE
        return products

    def ratios(self, defaults: ClassDefaults) -> Floats32:
        """sigma / alpha for every training timestep, [n_train_timesteps]."""
        products = self.alphas_cumprod(defaults)
        ratios: Floats32 = np.sqrt((np.float32(1) - products) / products)
        return ratios

    def _betas(self, defaults: ClassDefaults) -> Floats32:
        trained = self.config.get("trained_betas")
        if trained is not None:
            return np.asarray(trained, dtype=np.float32)
        first = number(self.config, "beta_start", defaults.beta_start)
        last = number(self.config, "beta_end", defaults.beta_end)
        n = self.n_train_timesteps
        match text(self.config, "beta_schedule", defaults.beta_schedule):
            case "linear":
                return _linspace32(first, last, n)
            case "scaled_linear":
                roots = _linspace32(first**0.5, last**0.5, n)
                return roots * roots
            case "squaredcos_cap_v2":
                return _cosine_betas(n)
            case other:
                raise UnsupportedByModel(
                    f"the checkpoint's beta schedule {other!r} is not known",
                    hint="linear, scaled_linear and squaredcos_cap_v2 are",
                )

    def flow_sigmas(self, n_steps: int, *, spacing: Spacing, n_latent_tokens: int | None) -> Floats:
        """The sigma of each step as FlowMatchEulerDiscreteScheduler sets them, [n_steps], without the final 0."""
        sigmas = self._even_sigmas(n_steps) if self.even_sigmas else self._linear_sigmas(n_steps)
        if flag(self.config, "use_dynamic_shifting"):
            mu = self.shift_exponent(n_latent_tokens, n_steps=n_steps)
            sigmas = time_shifted(sigmas, mu, linear=self._shifts_linearly)
        else:
            sigmas = shifted(sigmas, number(self.config, "shift", 1.0))
        sigmas = self.stretched_to_terminal(sigmas)
        respaced = spacing if spacing != "default" else configured_spacing(self.config)
        return as_float32(respace(sigmas, respaced, n_steps=n_steps, config=self.config))

    def shift_exponent(self, n_latent_tokens: int | None, *, n_steps: int) -> float:
        """mu of the resolution-dependent shift: larger pictures spend more steps at high noise (arXiv:2403.03206).

        Only FLUX.2's depends on the number of steps too.
        """
        if n_latent_tokens is None:
            raise InvalidValue("n_latent_tokens", "the noise of this checkpoint depends on the picture size")
        if self.empirical_shift:
            return empirical_mu(n_latent_tokens, n_steps=n_steps)
        few = number(self.config, "base_image_seq_len", 256)
        many = number(self.config, "max_image_seq_len", 4096)
        base = number(self.config, "base_shift", 0.5)
        slope = (number(self.config, "max_shift", 1.15) - base) / (many - few)
        return n_latent_tokens * slope + base - slope * few

    def stretched_to_terminal(self, sigmas: Floats) -> Floats:
        """The same sigmas, stretched so that the last one is the config's `shift_terminal`; unchanged without one."""
        terminal = number(self.config, "shift_terminal", 0.0)
        if not terminal:
            return sigmas
        clean = 1 - sigmas
        if clean[-1] == 0:
            raise InvalidValue("steps", "this checkpoint's noise schedule needs at least 2 steps")
        return 1 - clean / (clean[-1] / (1 - terminal))

    @property
    def _shifts_linearly(self) -> bool:
        return text(self.config, "time_shift_type", "exponential") == "linear"

    def _even_sigmas(self, n_steps: int) -> Floats:
        return as_float32(np.linspace(1.0, 1 / n_steps, n_steps))

    def _linear_sigmas(self, n_steps: int) -> Floats:
        # The ends of the grid are already shifted when the scheduler is built, and shifted again afterwards.
        n = self.n_train_timesteps
        shift = 1.0 if flag(self.config, "use_dynamic_shifting") else number(self.config, "shift", 1.0)
        first, last = (float(np.float32(shifted(np.array([t / n]), shift)[0])) for t in (n, 1))
        return np.linspace(first * n, last * n, n_steps) / n


def shifted(sigmas: Floats, shift: float) -> Floats:
    """Flow sigmas pushed towards noise (shift > 1)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def time_shifted(sigmas: Floats, mu: float, *, linear: bool = False) -> Floats:
    """Flow sigmas pushed towards noise by exp(mu), or by mu itself."""
    shift = mu if linear else math.exp(mu)
    return shift / (shift + (1 / sigmas - 1))


def empirical_mu(n_latent_tokens: int, *, n_steps: int) -> float:
    """FLUX.2's mu: a line between what its authors fitted for 10 and for 200 steps (diffusers: compute_empirical_mu).

    >>> round(empirical_mu(4096, n_steps=4), 3), round(empirical_mu(4096, n_steps=50), 3)
    (2.291, 2.023)
    """
    at_200 = 0.00016927 * n_latent_tokens + 0.45666666
    if n_latent_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * n_latent_tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190.0 * (n_steps - 200)


def configured_spacing(config: Mapping[str, object]) -> Spacing:
    """The sigma spacing that the config itself asks for."""
    if flag(config, "use_karras_sigmas"):
        return "karras"
    if flag(config, "use_exponential_sigmas"):
        return "exponential"
    if flag(config, "use_beta_sigmas"):
        return "beta"
    return "default"


def ends_noisy(config: Mapping[str, object]) -> bool:
    """Whether the config ends at the least noise of training instead of none."""
    return text(config, "final_sigmas_type", "zero") == "sigma_min"


def respace(sigmas: Floats, spacing: Spacing, *, n_steps: int, config: Mapping[str, object]) -> Floats:
    """n_steps sigmas between the first and the last of those given, or the config's `sigma_max` and `sigma_min`.

    default: those given, unchanged. karras: arXiv:2206.00364, equation 5, rho = 7. exponential: evenly in log sigma.
    beta: arXiv:2407.12173.
    """
    low = number(config, "sigma_min", float(sigmas[-1]))
    high = number(config, "sigma_max", float(sigmas[0]))
    match spacing:
        case "default":
            return sigmas
        case "karras":
            ramp = np.linspace(0, 1, n_steps)
            result: Floats = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
            return result
        case "exponential":
            return np.exp(np.linspace(math.log(high), math.log(low), n_steps))
        case "beta":
            quantile = _beta_quantile()
            return np.array([low + quantile(p) * (high - low) for p in 1 - np.linspace(0, 1, n_steps)])


def timestep_of_ratio(ratio: float, log_ratios: Floats32) -> float:
    """The fractional training timestep whose noise ratio this is; `log_ratios` is the logarithm of the table."""
    log_ratio = np.log(max(ratio, 1e-10))
    # float64 minus float32, as diffusers has it: its results are cut to whole numbers, so the last bit decides.
    distances = log_ratio - log_ratios
    low = min(int(np.cumsum(distances >= 0).argmax()), len(log_ratios) - 2)
    weight = (log_ratios[low] - log_ratio) / (log_ratios[low] - log_ratios[low + 1])
    weight = min(max(weight, 0.0), 1.0)
    return float((1 - weight) * low + weight * (low + 1))


def as_float32(values: Floats) -> Floats:
    """The values as float32 would hold them, still float64."""
    return values.astype(np.float32).astype(np.float64)


def flag(config: Mapping[str, object], key: str) -> bool:
    """A yes-or-no of the config; no when absent."""
    return bool(config.get(key, False))


def text(config: Mapping[str, object], key: str, default: str) -> str:
    """A word of the config."""
    return str(config.get(key, default))


def integer(config: Mapping[str, object], key: str, default: int) -> int:
    """A whole number of the config."""
    return int(number(config, key, default))


def number(config: Mapping[str, object], key: str, default: float) -> float:
    """A number of the config. Raises UnsupportedByModel where something else stands there."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnsupportedByModel(f"{key} of the scheduler config is {value!r}, not a number")
    try:
        return float(value)
    except ValueError as exc:
        raise UnsupportedByModel(f"{key} of the scheduler config is {value!r}, not a number") from exc


def _without_nones(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if value is not None}


def _has_any(config: Mapping[str, object], keys: tuple[str, ...]) -> bool:
    return any(key in config for key in keys)


def _vp_prediction(config: Mapping[str, object]) -> Prediction:
    match text(config, "prediction_type", "epsilon"):
        case "epsilon":
            return "epsilon"
        case "v_prediction":
            return "v_prediction"
        case "sample" | "original_sample":
            return "sample"
        case other:
            raise UnsupportedByModel(
                f"the checkpoint predicts {other!r}, which is not known",
                hint="epsilon, v_prediction and sample are",
            )


def _vp_default_sampler(config: Mapping[str, object], class_name: str) -> str:
    rule = rule_of_class(class_name) or "euler"
    if rule != "dpm++_2m":
        return rule
    order = "3m" if integer(config, "solver_order", 2) == 3 else "2m"
    is_stochastic = text(config, "algorithm_type", "dpmsolver++").startswith("sde")
    return f"dpm++_{order}{'_sde' if is_stochastic else ''}"


def _linspace32(first: float, last: float, n: int) -> Floats32:
    # torch.linspace in float32: the step is a float32, and each half counts from its own end.
    start, end = np.float32(first), np.float32(last)
    step = float(np.float32((end - start) / np.float32(max(n - 1, 1))))
    index = np.arange(n)
    rising = float(start) + step * index
    falling = float(end) - step * (n - 1 - index)
    return np.where(index < n // 2, rising, falling).astype(np.float32)


def _cumulative_product(values: Floats32) -> Floats32:
    # torch.cumprod on a CPU multiplies in float64 and stores float32.
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def _cosine_betas(n: int) -> Floats32:
    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)], dtype=np.float32)


def _rescaled_to_zero_snr(betas: Floats32) -> Floats32:
    """Betas whose last timestep is nothing but noise (arXiv:2305.08891, algorithm 1)."""
    roots = np.sqrt(_cumulative_product(np.float32(1) - betas))
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    products = roots * roots
    alphas = np.concatenate([products[:1], products[1:] / products[:-1]])
    result: Floats32 = np.float32(1) - alphas
    return result


def _beta_quantile() -> Callable[[float], float]:
    try:
        from scipy.stats import beta
    except ImportError as exc:
        raise InvalidValue("sampler", "the beta spacing needs scipy", hint="pip install scipy") from exc
    return lambda p: float(beta.ppf(p, 0.6, 0.6))
