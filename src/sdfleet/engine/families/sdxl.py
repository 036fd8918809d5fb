"""SDXL: two CLIP text encoders, a pooled vector, and the picture's size told to a UNet (arXiv:2307.01952).

The refiner is a checkpoint of its own: only the second encoder, and in the place of the target size an aesthetic score.
It was trained on the last fifth of the noise alone, so it goes on from a picture and never starts from nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sdfleet.domain import Drawing
from sdfleet.engine.conditioning import Conditioning, Room, sdxl_conditioning, sdxl_refiner_conditioning
from sdfleet.engine.families.base import NetworkRows, PromptPair
from sdfleet.engine.families.sd import StableDiffusion
from sdfleet.engine.prompt import Prompt
from sdfleet.engine.text_encoders import ClipEncoder
from sdfleet.errors import UnsupportedByModel

# Defaults of StableDiffusionXLImg2ImgPipeline.
_AESTHETIC_SCORE = 6.0
_NEGATIVE_AESTHETIC_SCORE = 2.5


class StableDiffusionXL(StableDiffusion):
    """Adapter for StableDiffusionXLPipeline checkpoints and the refiner."""

    name = "sdxl"

    def check(self, drawing: Drawing) -> None:
        """As the base; the refiner needs a picture to go on from."""
        super().check(drawing)
        if self._is_refiner and drawing.task == "txt2img":
            raise UnsupportedByModel(
                "this is an SDXL refiner: it improves a picture and draws none from a prompt alone",
                hint="give --image with a --strength of about 0.3, or use the SDXL base model",
            )
        if self._is_refiner == self.components.has("text_encoder"):
            raise UnsupportedByModel(
                "an SDXL checkpoint has two text encoders, or the second one and an aesthetic score",
                hint="check model_index.json of the checkpoint",
            )

    def encode(self, drawing: Drawing) -> PromptPair:
        """Both encoders' last-but-one layers side by side, and CLIP-G's projected vector."""
        clip_g = self.clip("clip_g", layer="penultimate", is_second=True, drawing=drawing)
        zero_when_empty = self.components.flag("force_zeros_for_empty_prompt", default=True)
        if self._is_refiner:
            return self._encode_refiner(drawing, clip_g=clip_g, zero_when_empty=zero_when_empty)
        clip_l = self.clip("clip_l", layer="penultimate", drawing=drawing)

        def join(prompt: Prompt, room: Room, *, is_negative: bool) -> Conditioning:
            is_zero = is_negative and zero_when_empty
            return sdxl_conditioning(prompt, clip_l=clip_l, clip_g=clip_g, room=room, is_zero_when_empty=is_zero)

        return self.paired(drawing, join, encoder=self.name, clips=(clip_l, clip_g), is_zero_when_empty=zero_when_empty)

    def predict(self, rows: NetworkRows) -> Tensor:
        """One UNet call, told that the picture is whole: original size = target size, nothing cropped."""
        unet = self.components.use("unet")
        assert rows.pooled is not None
        height_px, width_px = rows.size_px
        whole = rows.latents.new_tensor([height_px, width_px, 0, 0]).expand(len(rows.latents), -1)
        pooled, said_of_it = rows.pooled, whole[:, :2]
        if self._is_refiner:
            pooled, said_of_it = rows.pooled[:, :-1], rows.pooled[:, -1:].to(whole)
        answer: Tensor = unet(
            self.unet_input(rows).to(unet.dtype),
            rows.timestep,
            encoder_hidden_states=rows.states,
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": torch.cat([whole, said_of_it], dim=1).to(unet.dtype),
            },
            return_dict=False,
        )[0]
        return answer.float()

    def conditioning_shape(self) -> tuple[int, int, int | None]:
        """As the base, and CLIP-G's vector: what the network takes beside numbers about the picture."""
        config = self._denoiser_config
        n_told = 5 if self._is_refiner else 6
        pooled = int(config["projection_class_embeddings_input_dim"]) - n_told * int(config["addition_time_embed_dim"])
        n_tokens, width, _ = super().conditioning_shape()
        return n_tokens, width, pooled + 1 if self._is_refiner else pooled

    @property
    def _is_refiner(self) -> bool:
        return self.components.flag("requires_aesthetics_score", default=False)

    def _encode_refiner(self, drawing: Drawing, *, clip_g: ClipEncoder, zero_when_empty: bool) -> PromptPair:
        """CLIP-G alone; each prompt's score is the last number of its pooled vector, for it is one row's matter."""

        def join(prompt: Prompt, room: Room, *, is_negative: bool) -> Conditioning:
            is_zero = is_negative and zero_when_empty
            return sdxl_refiner_conditioning(prompt, clip_g=clip_g, room=room, is_zero_when_empty=is_zero)

        pair = self.paired(
            drawing, join, encoder=f"{self.name} refiner", clips=(clip_g,), is_zero_when_empty=zero_when_empty
        )
        # Added behind the cache: the same words may be a prompt here and a negative prompt there.
        negative = None if pair.negative is None else _scored(pair.negative, _NEGATIVE_AESTHETIC_SCORE)
        return replace(pair, positive=_scored(pair.positive, _AESTHETIC_SCORE), negative=negative)


def _scored(conditioning: Conditioning, score: float) -> Conditioning:
    assert conditioning.pooled is not None
    return replace(conditioning, pooled=torch.cat([conditioning.pooled, conditioning.pooled.new_tensor([score])]))
