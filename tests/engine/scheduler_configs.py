"""What scheduler_config.json says in the checkpoints that people have, and in the built-in model."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

STABLE_DIFFUSION: Config = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD2: Config = {**STABLE_DIFFUSION, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
STARTER: Config = {
    **SD2,
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}
SDXL: Config = {**STABLE_DIFFUSION, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
SD3: Config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX: Config = {
    **SD3,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
}
