"""How much noise there is at each step, read from a checkpoint's own config, against diffusers' tables."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from sdfleet.engine.noise_schedule import ClassDefaults, NoiseSchedule
from sdfleet.errors import UnsupportedByModel
from tests.engine.scheduler_configs import SD3, SDXL, STABLE_DIFFUSION, STARTER, Config


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, STARTER, {"beta_schedule": "squaredcos_cap_v2"}])
def test_noise_table_is_that_of_diffusers(config: Config) -> None:
    schedule = NoiseSchedule.from_config(config)
    euler, ddim = (getattr(diffusers, f"{name}Scheduler").from_config(config) for name in ("EulerDiscrete", "DDIM"))
    np.testing.assert_allclose(schedule.alphas_cumprod(ClassDefaults()), euler.alphas_cumprod, rtol=1e-5, atol=1e-12)
    exact = schedule.alphas_cumprod(ClassDefaults(zero_snr="exact"))
    np.testing.assert_allclose(exact, ddim.alphas_cumprod, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "kind", "prediction", "default_sampler"),
    [
        (STABLE_DIFFUSION, "vp", "epsilon", "pndm"),
        (STARTER, "vp", "v_prediction", "ddim"),
        (SDXL, "vp", "epsilon", "euler"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "vp", "epsilon", "euler_a"),
        ({"_class_name": "LCMScheduler"}, "vp", "epsilon", "lcm"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "vp",
            "epsilon",
            "dpm++_2m_sde",
        ),
        ({"_class_name": "SomebodysScheduler", "beta_start": 0.001}, "vp", "epsilon", "euler"),
        (SD3, "flow", "flow", "euler"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "flow", "flow", "heun"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "flow", "flow", "dpm++_2m"),
        ({"_class_name": "SomebodysScheduler", "shift": 3.0}, "flow", "flow", "euler"),
    ],
)
def test_config_is_understood(config: Config, kind: str, prediction: str, default_sampler: str) -> None:
    schedule = NoiseSchedule.from_config(config)
    assert (schedule.kind, schedule.prediction, schedule.default_sampler) == (kind, prediction, default_sampler)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5},
        {**SD3, "invert_sigmas": True},
        {**STABLE_DIFFUSION, "prediction_type": "tea leaves"},
        {**STABLE_DIFFUSION, "num_train_timesteps": "many"},
    ],
)
def test_config_that_cannot_be_sampled_is_refused(config: Config) -> None:
    with pytest.raises(UnsupportedByModel):
        NoiseSchedule.from_config(config)
