"""SD3 and SD3.5: a transformer over image and text tokens, flow matching, two CLIPs and T5 (arXiv:2403.03206).

T5 is the largest part of these checkpoints (9.5 GB in half precision) and may be left out: its place is then zeros,
as the model saw in training when T5 was dropped.
"""

from __future__ import annotations

from torch import Tensor

from sdfleet.domain import Drawing
from sdfleet.engine.components import ComponentName
from sdfleet.engine.conditioning import Conditioning, Room, sd3_conditioning
from sdfleet.engine.families.base import LatentFamily, NetworkRows, PromptPair
from sdfleet.engine.prompt import Prompt
from sdfleet.engine.text_encoders import CLIP_LENGTH, T5_MIN_LENGTH, T5Encoder


class StableDiffusion3(LatentFamily):
    """Adapter for StableDiffusion3Pipeline checkpoints, with or without T5."""

    name = "sd3"
    denoiser = "transformer"

    @property
    def side_multiple_px(self) -> int:
        """The transformer takes latents in patches."""
        return self.px_per_latent * self._patch

    def text_encoders(self, drawing: Drawing | None = None) -> tuple[ComponentName, ...]:
        """Without T5 where a drawing does without."""
        names = super().text_encoders()
        return tuple(name for name in names if name != "text_encoder_3") if drawing and drawing.t5 == "skip" else names

    def encode(self, drawing: Drawing) -> PromptPair:
        """CLIP states over T5 states, and both CLIPs' projected vectors."""
        clip_l = self.clip("clip_l", layer="penultimate")
        clip_g = self.clip("clip_g", layer="penultimate", is_second=True)
        t5 = None
        if "text_encoder_3" in self.text_encoders(drawing):
            t5 = T5Encoder(
                name="t5", tokenizer=self.components.use("tokenizer_3"), module=self.components.use("text_encoder_3")
            )
        width = int(self._denoiser_config["joint_attention_dim"])

        def join(prompt: Prompt, room: Room, *, is_negative: bool) -> Conditioning:  # noqa: ARG001 - both prompts are read alike
            return sd3_conditioning(prompt, clip_l=clip_l, clip_g=clip_g, t5=t5, width=width, room=room)

        encoder = self.name if t5 else f"{self.name} without t5"
        return self.paired(drawing, join, encoder=encoder, clips=(clip_l, clip_g), t5=t5)

    def predict(self, rows: NetworkRows) -> Tensor:
        """One transformer call: the flow from picture to noise."""
        transformer = self.components.use("transformer")
        answer: Tensor = transformer(
            hidden_states=rows.latents.to(transformer.dtype),
            timestep=rows.timestep,
            encoder_hidden_states=rows.states,
            pooled_projections=rows.pooled,
            return_dict=False,
        )[0]
        return answer.float()

    def n_latent_tokens(self, drawing: Drawing) -> int:
        """Image tokens: patches of latent cells."""
        return self._tokens(super().n_latent_tokens(drawing))

    def conditioning_shape(self) -> tuple[int, int, int | None]:
        """A CLIP window over T5's least length, and both CLIPs' vectors."""
        config = self._denoiser_config
        width, pooled = int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
        return CLIP_LENGTH + T5_MIN_LENGTH, width, pooled

    @property
    def _patch(self) -> int:
        return int(self._denoiser_config["patch_size"])

    def _tokens(self, cells: int) -> int:
        return cells // self._patch**2

    def _width(self) -> int:
        return int(self._denoiser_config["attention_head_dim"]) * int(self._denoiser_config["num_attention_heads"])
