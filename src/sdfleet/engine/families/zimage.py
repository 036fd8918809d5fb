"""Z-Image and Z-Image turbo: one stream of image and text tokens, flow matching, Qwen3 (arXiv:2511.22699).

The transformer takes lists, one picture and one prompt of its own length each; it pads and masks them itself. So rows
whose prompts differ in length share a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdfleet.domain import Drawing
from sdfleet.engine.families.base import NetworkRows
from sdfleet.engine.families.qwen import QwenFamily

# The transformer fills prompts up to a multiple of this.
_TEXT_MULTIPLE = 32


class ZImage(QwenFamily):
    """Adapter for ZImagePipeline checkpoints."""

    name = "zimage"
    denoiser = "transformer"
    layers = (-2,)
    thinks = True
    pads = False
    mixes_lengths = True

    @property
    def side_multiple_px(self) -> int:
        """The transformer takes latents in patches."""
        return self.px_per_latent * self._patch

    def guidance_weight(self, drawing: Drawing) -> float:
        """ZImagePipeline adds guidance * (positive - negative) to the positive answer: its 4 is 5 elsewhere.

        It guides above 0 where we guide above 1: clients send 1 to say none, as every other model means it.
        """
        return 1 + drawing.guidance

    def predict(self, rows: NetworkRows) -> Tensor:
        """One transformer call; it counts time from noise to picture, and answers with the flow's negative."""
        transformer = self.components.use("transformer")
        latents = rows.latents.to(transformer.dtype)[:, :, None]
        answer: list[Tensor] = transformer(
            list(latents.unbind()),
            (1000 - rows.timestep) / 1000,
            [states[:n] for states, n in zip(rows.states, rows.n_tokens, strict=True)],
            patch_size=self._patch,
            f_patch_size=int(self._denoiser_config["all_f_patch_size"][0]),
            return_dict=False,
        )[0]
        return -torch.stack([one.float() for one in answer]).squeeze(2)

    def n_latent_tokens(self, drawing: Drawing) -> int:
        """Image tokens: patches of latent cells."""
        return self._tokens(super().n_latent_tokens(drawing))

    def conditioning_shape(self) -> tuple[int, int, int | None]:
        """Prompts are filled up by the network."""
        return _TEXT_MULTIPLE, int(self._denoiser_config["cap_feat_dim"]), None

    @property
    def _patch(self) -> int:
        return int(self._denoiser_config["all_patch_size"][0])

    def _tokens(self, cells: int) -> int:
        return cells // self._patch**2

    def _width(self) -> int:
        return int(self._denoiser_config["dim"])

    def _max_length(self) -> int:
        # The picture's position is the one after the filled-up prompt, and the table of positions ends somewhere.
        last = int(self._denoiser_config["axes_lens"][0]) - 1
        return min(super()._max_length(), (last - 1) // _TEXT_MULTIPLE * _TEXT_MULTIPLE)
