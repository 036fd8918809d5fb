"""SDXL: two CLIP text encoders, a pooled vector, and the picture's size told to a UNet (arXiv:2307.01952)."""

from __future__ import annotations

from torch import Tensor

from sdfleet.domain import Drawing
from sdfleet.engine.conditioning import Conditioning, Room, sdxl_conditioning
from sdfleet.engine.families.base import NetworkRows, PromptPair
from sdfleet.engine.families.sd import StableDiffusion
from sdfleet.engine.prompt import Prompt
from sdfleet.engine.text_encoders import ClipEncoder
from sdfleet.errors import UnsupportedByModel


class StableDiffusionXL(StableDiffusion):
    """Adapter for StableDiffusionXLPipeline checkpoints; the refiner needs what this does not give it."""

    name = "sdxl"

    def check(self, drawing: Drawing) -> None:
        """As the base; a refiner (aesthetic score, one text encoder) is refused."""
        super().check(drawing)
        if self.components.flag("requires_aesthetics_score", default=False) or not self.components.has("text_encoder"):
            raise UnsupportedByModel("this is an SDXL refiner, which is not served yet", hint="use the SDXL base model")

    def encode(self, drawing: Drawing) -> PromptPair:
        """Both encoders' last-but-one layers side by side, and CLIP-G's projected vector."""
        clip_l = ClipEncoder(
            name="clip_l",
            tokenizer=self.components.use("tokenizer"),
            module=self.components.use("text_encoder"),
            layer="penultimate",
        )
        clip_g = ClipEncoder(
            name="clip_g",
            tokenizer=self.components.use("tokenizer_2"),
            module=self.components.use("text_encoder_2"),
            layer="penultimate",
        )
        zero_when_empty = self.components.flag("force_zeros_for_empty_prompt", default=True)

        def join(prompt: Prompt, room: Room, *, is_negative: bool) -> Conditioning:
            is_zero = is_negative and zero_when_empty
            return sdxl_conditioning(prompt, clip_l=clip_l, clip_g=clip_g, room=room, is_zero_when_empty=is_zero)

        return self.paired(drawing, join, encoder=self.name, clips=(clip_l, clip_g), is_zero_when_empty=zero_when_empty)

    def predict(self, rows: NetworkRows) -> Tensor:
        """One UNet call, told that the picture is whole: original size = target size, nothing cropped."""
        unet = self.components.use("unet")
        height_px, width_px = rows.size_px
        time_ids = rows.latents.new_tensor([height_px, width_px, 0, 0, height_px, width_px])
        answer: Tensor = unet(
            self.unet_input(rows).to(unet.dtype),
            rows.timestep,
            encoder_hidden_states=rows.states,
            added_cond_kwargs={
                "text_embeds": rows.pooled,
                "time_ids": time_ids.to(unet.dtype).expand(len(rows.latents), -1),
            },
            return_dict=False,
        )[0]
        return answer.float()
