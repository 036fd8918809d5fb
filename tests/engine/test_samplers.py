"""Every sampler against the diffusers scheduler class it stands for, on a toy network.

diffusers computes its steps in float32, ours are float64 here, so the difference is diffusers' own rounding. Relative
to the largest latent it was at most 8e-6 over the cases below, 3e-5 for a foreign sampler (float32 on both sides), and
3e-4 where a class keeps x / alpha and alpha is almost 0 (a ratio of 4096 times float32's 6e-8). A coefficient that is
1e-3 off shows: the last test of part 1 proves it.
"""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sdfleet.engine.foreign_samplers import ForeignSampler
from sdfleet.engine.noise_schedule import NoiseSchedule
from sdfleet.engine.samplers import (
    Evaluation,
    Plan,
    has_own_rule,
    known_samplers,
    make_sampler,
    n_skipped_steps,
    parse_sampler,
    plan,
    reference_class,
)
from sdfleet.errors import InvalidValue, UnsupportedByModel
from tests.engine.scheduler_configs import FLUX, SD2, SD3, SDXL, STABLE_DIFFUSION, STARTER, Config

# diffusers 0.42.1 hands torch tensors to numpy 2 in DEIS and LMS.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

TOLERANCE = 1.5e-5
TOLERANCE_FOREIGN = 6e-5
TOLERANCE_ALMOST_ONLY_NOISE = 1e-3
N_TOKENS = 1024

# Steps and strengths; together the four UNet configs try each number of steps, whole and cut.
VP_CASES: dict[str, tuple[Config, tuple[tuple[int, float], ...]]] = {
    "sd15": (STABLE_DIFFUSION, ((1, 1.0), (4, 0.6), (7, 1.0), (25, 1.0))),
    "sd2": (SD2, ((2, 1.0), (3, 0.6), (20, 1.0))),
    "starter": (STARTER, ((1, 1.0), (3, 1.0), (7, 0.6), (20, 0.6))),
    "sdxl": (SDXL, ((2, 0.6), (4, 1.0), (25, 0.6))),
}
ALL_CASES = tuple((n, strength) for n in (1, 2, 3, 4, 7, 20, 25) for strength in (1.0, 0.6))
OWN = [name for name in known_samplers() if not parse_sampler(name).is_foreign]
FOREIGN = [
    *("pndm", "lms", "deis", "dpm2", "dpm2_a", "dpm++_2s", "dpm++_3m", "dpm++_3m_sde", "ddpm", "tcd", "sa_solver"),
    *("lms karras", "dpm2 exponential", "dpm2_a karras", "deis karras", "dpm++_2s karras"),
]
FLOW = ["euler", "euler karras", "euler exponential", "euler beta", "dpm++_2m", "unipc", "lcm"]

# Settings that real folders or careful users have, each with the samplers that heed it.
VARIANTS: dict[str, tuple[Config, tuple[str, ...]]] = {
    "ends at sigma_min": (
        {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min"},
        ("euler", "dpm++_2m", "dpm++_2m karras", "dpm++_2m_sde", "unipc", "unipc karras"),
    ),
    "last step of first order": (
        {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min", "euler_at_final": True},
        ("dpm++_2m", "dpm++_2m_sde"),
    ),
    "order kept to the end": (
        {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        ("dpm++_2m", "dpm++_2m karras", "unipc"),
    ),
    "heun solver": ({**STABLE_DIFFUSION, "solver_type": "heun"}, ("dpm++_2m", "dpm++_2m_sde", "unipc")),
    "bh1 solver": (
        {**STABLE_DIFFUSION, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        ("dpm++_2m", "unipc"),
    ),
    "distilled another way": (
        {**STABLE_DIFFUSION, "original_inference_steps": 25, "timestep_scaling": 0.002},
        ("lcm",),
    ),
    "some steps uncorrected": ({**STABLE_DIFFUSION, "disable_corrector": [0, 2]}, ("unipc",)),
    "cosine betas, clipped": (
        {
            "beta_schedule": "squaredcos_cap_v2",
            "clip_sample": False,
            "lambda_min_clipped": -5.1,
            "prediction_type": "v_prediction",
        },
        ("ddim", "dpm++_2m", "dpm++_2m karras", "lcm"),
    ),
    "linspace": (
        {**STABLE_DIFFUSION, "timestep_spacing": "linspace", "steps_offset": 0},
        ("euler", "euler_a", "heun", "ddim", "dpm++_2m", "unipc"),
    ),
    "trailing, with noise left at the top": (
        {**STABLE_DIFFUSION, "timestep_spacing": "trailing", "steps_offset": 0},
        ("euler", "ddim", "dpm++_2m", "unipc", "pndm"),
    ),
    "karras by config": (
        {**STABLE_DIFFUSION, "use_karras_sigmas": True},
        ("euler", "euler_a", "heun", "ddim", "dpm++_2m", "dpm++_2m exponential", "unipc", "lms"),
    ),
    "own bounds": (
        {**SDXL, "sigma_min": 0.05, "sigma_max": 10.0},
        ("euler karras", "heun karras", "dpm++_2m exponential", "unipc karras"),
    ),
    "only the class's defaults": ({"beta_schedule": "scaled_linear"}, ("euler", "heun", "ddim", "dpm++_2m", "lcm")),
    "trained betas": (
        {
            "trained_betas": [0.001 * (1 + i / 50) for i in range(500)],
            "num_train_timesteps": 500,
            "clip_sample": False,
        },
        ("euler", "ddim", "dpm++_2m", "unipc"),
    ),
    "network answers with the picture": ({**STABLE_DIFFUSION, "prediction_type": "sample"}, ("euler", "ddim", "lcm")),
    "clipped prediction": ({**STABLE_DIFFUSION, "clip_sample": True}, ("ddim", "heun", "lcm", "ddpm")),
    "thresholded prediction": ({**STABLE_DIFFUSION, "thresholding": True}, ("ddim", "dpm++_2m", "unipc")),
    "continuous timesteps": ({**SD2, "timestep_type": "continuous"}, ("euler",)),
    "flow, stretched": ({**SD3, "shift_terminal": 0.02}, ("euler", "unipc")),
    "flow, shifted linearly": ({**FLUX, "time_shift_type": "linear"}, ("euler",)),
    "flow, stochastic": ({**SD3, "stochastic_sampling": True}, ("euler",)),
}


# -- 1. the same picture as diffusers


@pytest.mark.parametrize(
    ("config_name", "sampler"),
    # Exponential and beta sigmas come from the same table whatever the grid; two configs tell enough about them.
    [
        (c, s)
        for c in VP_CASES
        for s in OWN
        if c in ("sd15", "starter") or parse_sampler(s).spacing in ("default", "karras")
    ],
)
def test_plan_draws_what_diffusers_draws(config_name: str, sampler: str) -> None:
    config, cases = VP_CASES[config_name]
    assert has_own_rule(sampler, NoiseSchedule.from_config(config))
    for n_steps, strength in cases:
        _assert_same_picture(config, sampler, n_steps=n_steps, strength=strength)


@pytest.mark.parametrize("sampler", FOREIGN)
def test_foreign_sampler_draws_what_diffusers_draws(sampler: str) -> None:
    _assert_same_picture(STABLE_DIFFUSION, sampler, n_steps=7, strength=0.6)


@pytest.mark.parametrize("sampler", [name for name in FOREIGN if not name.startswith("dpm2")])
def test_foreign_sampler_draws_what_diffusers_draws_for_the_built_in_model(sampler: str) -> None:
    for n_steps, strength in ((1, 1.0), (4, 1.0), (7, 0.6)):
        _assert_same_picture(STARTER, sampler, n_steps=n_steps, strength=strength)


def test_pndm_the_default_of_stable_diffusion_1_is_right_at_every_length() -> None:
    assert NoiseSchedule.from_config(STABLE_DIFFUSION).default_sampler == "pndm"
    for n_steps, strength in ALL_CASES:
        _assert_same_picture(STABLE_DIFFUSION, "pndm", n_steps=n_steps, strength=strength)


@pytest.mark.parametrize("config", [SD3, FLUX], ids=["sd3", "flux"])
@pytest.mark.parametrize("sampler", FLOW)
def test_flow_plan_draws_what_diffusers_draws(sampler: str, config: Config) -> None:
    for n_steps, strength in ALL_CASES:
        _assert_same_picture(config, sampler, n_steps=n_steps, strength=strength)


@pytest.mark.parametrize("config", [SD3, FLUX], ids=["schnell", "dev"])
@pytest.mark.parametrize("sampler", ["euler", "lcm", "unipc"])
def test_even_sigmas_are_those_of_the_flux_pipeline(sampler: str, config: Config) -> None:
    for n_steps, strength in ((1, 1.0), (4, 1.0), (7, 0.6)):
        _assert_same_picture(config, sampler, n_steps=n_steps, strength=strength, even_sigmas=True)


def test_flow_heun_draws_what_diffusers_draws() -> None:
    for n_steps, strength in ALL_CASES:
        _assert_same_picture(SD3, "heun", n_steps=n_steps, strength=strength)


def test_flow_heun_takes_the_shift_by_picture_size_that_its_class_does_not_know() -> None:
    flux, table = NoiseSchedule.from_config(FLUX), diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLUX)
    table.set_timesteps(5, mu=flux.shift_exponent(N_TOKENS, n_steps=5))
    told = [e.timestep for e in plan("heun", flux, n_steps=5, n_latent_tokens=N_TOKENS).evaluations]
    grid = table.timesteps.tolist()
    assert told == pytest.approx([grid[0], *(t for t in grid[1:] for _ in range(2))])


@pytest.mark.parametrize(("variant", "sampler"), [(name, s) for name, (_, all_) in VARIANTS.items() for s in all_])
def test_settings_of_the_folder_carry_over(variant: str, sampler: str) -> None:
    # DPM-Solver treats runs of fewer than 15 steps differently.
    for n_steps, strength in ((2, 1.0), (14, 0.6), (15, 1.0)):
        _assert_same_picture(VARIANTS[variant][0], sampler, n_steps=n_steps, strength=strength)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpm++_2m", "dpm++_2m_sde", "unipc", "euler_a", "lcm"])
def test_the_comparison_notices_a_coefficient_that_is_slightly_off(sampler: str) -> None:
    right = plan(sampler, NoiseSchedule.from_config(STABLE_DIFFUSION), n_steps=4)
    drawn = _draw(right, STABLE_DIFFUSION, strength=1.0)
    for place in (0, 1):
        third = right.evaluations[2]
        wrong = tuple(c + 1e-3 if i == place else c for i, c in enumerate(third.next))
        evaluations = (*right.evaluations[:2], replace(third, next=wrong), *right.evaluations[3:])  # type: ignore[arg-type]
        off = _draw(replace(right, evaluations=evaluations), STABLE_DIFFUSION, strength=1.0)
        assert _difference(off.latents, drawn.latents) > TOLERANCE


# -- 2. what a plan promises


@pytest.mark.parametrize(
    ("config", "sampler"),
    [(config, s) for config in (STABLE_DIFFUSION, STARTER) for s in ("euler", "heun", "ddim", "dpm++_2m beta", "unipc")]
    + [(SD3, sampler) for sampler in ("euler karras", "heun", "dpm++_2m", "unipc")],
)
def test_a_network_that_knows_the_picture_keeps_x_on_the_straight_way(config: Config, sampler: str) -> None:
    schedule = NoiseSchedule.from_config(config)
    clean, noise = 0.7, -1.3
    evaluations = plan(sampler, schedule, n_steps=8, strength=0.8).evaluations
    first = evaluations[0]
    x, saved = first.alpha * clean + first.sigma * noise, 0.0
    for e in evaluations:
        basis = (x, clean, clean, clean, saved, 0.0)
        x, saved = _weighed(e.next, basis), _weighed(e.save, basis)
        if e is not evaluations[-1]:
            assert x == pytest.approx(e.next_alpha * clean + e.next_sigma * noise, abs=1e-9)
    # DDIM ends at the least noise of training, alpha = 0.9996, when the folder says so.
    assert x == pytest.approx(clean, abs=0.05 if sampler == "ddim" else 1e-9)


@pytest.mark.parametrize("sampler", OWN)
def test_no_step_uses_a_tensor_that_does_not_exist_yet(sampler: str) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    for strength in (1.0, 0.5):
        first, second = plan(sampler, schedule, n_steps=10, strength=strength).evaluations[:2]
        assert first.next[2:5] == (0.0, 0.0, 0.0)
        assert first.save[2:4] == (0.0, 0.0)
        assert second.next[3] == second.save[3] == 0.0


@pytest.mark.parametrize("sampler", [*OWN, "pndm", "lms"])
def test_steps_are_numbered_from_one_to_the_users_count(sampler: str) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    for n_steps, strength, n_left in ((1, 1.0, 1), (5, 1.0, 5), (10, 0.55, 5)):
        made = make_sampler(sampler, schedule, n_steps=n_steps, strength=strength)
        steps = [e.step for e in made.evaluations]
        assert sorted(set(steps)) == list(range(1, n_left + 1)) == list(range(1, made.n_steps + 1))
        assert steps == sorted(steps)
        last = made.evaluations[-1]
        assert (last.next_alpha, last.next_sigma) == (1.0, 0.0)


def test_each_evaluation_begins_where_the_one_before_ended() -> None:
    for sampler in (*OWN, "pndm"):
        evaluations = make_sampler(sampler, NoiseSchedule.from_config(STARTER), n_steps=7).evaluations
        ends = [(e.next_alpha, e.next_sigma) for e in evaluations[:-1]]
        assert ends == [(e.alpha, e.sigma) for e in evaluations[1:]]


@pytest.mark.parametrize(
    ("kind", "n_steps", "strength", "n_skipped"),
    [("vp", 25, 0.6, 10), ("vp", 4, 0.6, 2), ("flow", 4, 0.6, 1), ("vp", 10, 1.0, 0), ("flow", 1, 0.01, 0)],
)
def test_strength_cuts_steps_as_the_pipelines_of_its_kind_do(
    kind: Any, n_steps: int, strength: float, n_skipped: int
) -> None:
    assert n_skipped_steps(n_steps, strength, kind) == n_skipped


@pytest.mark.parametrize("sampler", ["euler", "heun", "pndm"])
def test_strength_that_leaves_no_step_is_refused_with_a_way_out(sampler: str) -> None:
    with pytest.raises(InvalidValue, match=r"leaves no step.*at least 5 steps"):
        make_sampler(sampler, NoiseSchedule.from_config(STABLE_DIFFUSION), n_steps=3, strength=0.2)


def test_number_of_steps_is_kept_where_diffusers_rounds_one_more_in() -> None:
    assert len(plan("euler", NoiseSchedule.from_config(STARTER), n_steps=61).evaluations) == 61
    assert len(plan("dpm++_2m", NoiseSchedule.from_config(STARTER), n_steps=103).evaluations) == 103


@pytest.mark.parametrize(("sampler", "n_steps"), [("euler", 0), ("euler", 1001), ("lcm", 51), ("dpm++_2m", 1000)])
def test_impossible_numbers_of_steps_are_refused(sampler: str, n_steps: int) -> None:
    with pytest.raises(InvalidValue, match="steps"):
        make_sampler(sampler, NoiseSchedule.from_config(STABLE_DIFFUSION), n_steps=n_steps)


@pytest.mark.parametrize("sampler", ["euler_a", "ddim", "dpm++_2m_sde", "pndm", "lms"])
def test_samplers_for_unets_are_refused_for_flow_models_and_the_others_named(sampler: str) -> None:
    with pytest.raises(UnsupportedByModel, match="use one of euler, heun"):
        make_sampler(sampler, NoiseSchedule.from_config(SD3), n_steps=4)


def test_flux_needs_to_know_the_picture_size() -> None:
    with pytest.raises(InvalidValue, match="picture size"):
        plan("euler", NoiseSchedule.from_config(FLUX), n_steps=4)


def test_two_rows_of_one_foreign_sampler_do_not_disturb_each_other() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    alone = _draw(ForeignSampler("pndm", schedule, n_steps=4), STABLE_DIFFUSION, strength=1.0)
    ForeignSampler("pndm", schedule, n_steps=4).advance(
        torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.Generator()
    )
    again = _draw(ForeignSampler("pndm", schedule, n_steps=4), STABLE_DIFFUSION, strength=1.0)
    assert torch.equal(alone.latents, again.latents)


def test_sampler_without_its_package_says_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InvalidValue, match="pip install torchsde"):
        make_sampler("DPM++ SDE Karras", NoiseSchedule.from_config(STABLE_DIFFUSION), n_steps=4)


def test_samplers_are_planned_without_torch() -> None:
    code = "import sys, sdfleet.engine.samplers; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- the two ways to draw


@dataclass(frozen=True)
class Drawn:
    """Final latents, what the network was told, and where the generator stands."""

    latents: Tensor
    timesteps: list[float]
    generator_state: Tensor


def _network(x: Tensor, timestep: float) -> Tensor:
    """Cheap, bounded, not linear in x, and different at every timestep."""
    mixed = 0.6 * x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(1, 1)
    return torch.tanh(mixed + 0.3 * math.sin(0.004 * timestep))


def _noise_and_picture(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 4, 2, 4, generator=generator), 0.7 * torch.randn(1, 4, 2, 4, generator=generator)


def _reference(config: Config, sampler: str, *, n_steps: int, strength: float, even_sigmas: bool) -> Drawn:
    """The loop of diffusers' pipelines around the scheduler class."""
    schedule = NoiseSchedule.from_config(config)
    class_name, extra = reference_class(sampler, schedule)
    scheduler = getattr(diffusers, class_name).from_config(config, **extra)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    settings: dict[str, object] = {}
    if config.get("use_dynamic_shifting") and "mu" in accepted:
        settings["mu"] = schedule.shift_exponent(N_TOKENS, n_steps=n_steps)
    if even_sigmas and "sigmas" in accepted and "use_flow_sigmas" not in extra:
        settings["sigmas"] = np.linspace(1.0, 1 / n_steps, n_steps)
    scheduler.set_timesteps(n_steps, **settings)
    begin = n_skipped_steps(n_steps, strength, schedule.kind) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    generator = torch.Generator().manual_seed(7)
    noise, picture = _noise_and_picture(generator)
    if strength == 1.0:
        x = noise if schedule.kind == "flow" else noise * scheduler.init_noise_sigma
    else:
        x = _with_noise(scheduler, picture, noise, timesteps[:1])
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(_network(shown, float(t)), t, x, **draws).prev_sample
    return Drawn(x, timesteps.tolist(), generator.get_state())


def _with_noise(scheduler: Any, picture: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(picture, timestep, noise)
    return scheduler.add_noise(picture, noise, timestep)


def _draw(sampler: Plan | ForeignSampler, config: Mapping[str, Any], *, strength: float) -> Drawn:
    """The engine's loop."""
    prediction = NoiseSchedule.from_config(config).prediction
    generator = torch.Generator().manual_seed(7)
    noise, picture = _noise_and_picture(generator)
    first = sampler.evaluations[0]
    if not isinstance(sampler, ForeignSampler):
        noise, picture = noise.double(), picture.double()
    x = sampler.start_scale * noise if strength == 1.0 else first.alpha * picture + first.sigma * noise
    previous = before_previous = saved = torch.zeros_like(x)
    for e in sampler.evaluations:
        denoised = _denoised(_network(x, e.timestep), x, e, prediction)
        if isinstance(sampler, ForeignSampler):
            x = sampler.advance(x, denoised, generator)
            continue
        drawn = torch.randn(x.shape, generator=generator).double() if e.draws_noise else torch.zeros_like(x)
        basis = (x, denoised, previous, before_previous, saved, drawn)
        x, saved = _weighed(e.next, basis), _weighed(e.save, basis)
        previous, before_previous = denoised, previous
    return Drawn(x, [e.timestep for e in sampler.evaluations], generator.get_state())


def _denoised(answer: Tensor, x: Tensor, e: Evaluation, prediction: str) -> Tensor:
    return {
        "epsilon": (x - e.sigma * answer) / (e.alpha or math.nan),
        "v_prediction": e.alpha * x - e.sigma * answer,
        "flow": x - e.sigma * answer,
        "sample": answer,
    }[prediction]


def _weighed(weights: tuple[float, ...], basis: tuple[Any, ...]) -> Any:
    return sum(weight * tensor for weight, tensor in zip(weights, basis, strict=True))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _assert_same_picture(
    config: Config, sampler: str, *, n_steps: int, strength: float, even_sigmas: bool = False
) -> None:
    schedule = NoiseSchedule.from_config(config, even_sigmas=even_sigmas)
    if n_steps == 1 and strength < 1.0 and schedule.kind == "vp":
        return
    made = make_sampler(sampler, schedule, n_steps=n_steps, strength=strength, n_latent_tokens=N_TOKENS)
    ours = _draw(made, config, strength=strength)
    theirs = _reference(config, sampler, n_steps=n_steps, strength=strength, even_sigmas=even_sigmas)
    case = f"{sampler}, {n_steps} steps, strength {strength}"
    # Fractional timesteps come out of float32 logarithms.
    assert ours.timesteps == pytest.approx(theirs.timesteps, abs=1e-3), case
    tolerance = TOLERANCE_FOREIGN if isinstance(made, ForeignSampler) else TOLERANCE
    if config.get("rescale_betas_zero_snr") and sampler.startswith("euler"):
        tolerance = TOLERANCE_ALMOST_ONLY_NOISE
    assert _difference(ours.latents, theirs.latents) < tolerance, case
    assert torch.equal(ours.generator_state, theirs.generator_state), f"{case}: noise drawn at other places"
