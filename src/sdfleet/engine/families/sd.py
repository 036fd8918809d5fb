"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, epsilon or v-prediction. Also the built-in model."""

from __future__ import annotations

import torch
from torch import Tensor

from sdfleet.domain import Drawing
from sdfleet.engine.conditioning import Conditioning, Room, sd_conditioning
from sdfleet.engine.families.base import LatentFamily, NetworkRows, PromptPair
from sdfleet.engine.prompt import Prompt


class StableDiffusion(LatentFamily):
    """Adapter for StableDiffusionPipeline checkpoints (4-channel, and 9-channel inpainting, UNets)."""

    name = "sd"
    denoiser = "unet"

    def encode(self, drawing: Drawing) -> PromptPair:
        """Token states of CLIP's last layer."""
        clip = self.clip("clip", layer="last", drawing=drawing)

        def join(prompt: Prompt, room: Room, *, is_negative: bool) -> Conditioning:  # noqa: ARG001 - both prompts are read alike
            return sd_conditioning(prompt, clip=clip, room=room)

        return self.paired(drawing, join, encoder=self.name, clips=(clip,))

    def predict(self, rows: NetworkRows) -> Tensor:
        """One UNet call, see `LatentFamily.predict`."""
        unet = self.components.use("unet")
        answer: Tensor = unet(
            self.unet_input(rows).to(unet.dtype), rows.timestep, encoder_hidden_states=rows.states, return_dict=False
        )[0]
        return answer.float()

    @staticmethod
    def unet_input(rows: NetworkRows) -> Tensor:
        """[m, c + k, h, w]: the latents, and behind them what an inpainting UNet takes beside."""
        return rows.latents if rows.extra is None else torch.cat([rows.latents, rows.extra], dim=1)
