"""FLUX.1 dev, schnell, Fill and Kontext: a transformer over image and text tokens, flow matching, T5 and a little CLIP.

They differ in what the network is told beside the latents, and the folder says which one it is:

- dev: guidance is an input of the network (`guidance_embeds` in the transformer's config), so a row never doubles.
- schnell: distilled to few steps, without guidance of any kind.
- Fill: inpaints only; sees the masked picture and every pixel of the mask (`in_channels` 384 instead of 64).
- Kontext: dev's network, trained to see an input picture as more tokens. Told by the pipeline's name alone.

Reference: FluxPipeline and its siblings in diffusers 0.42.1; black-forest-labs/flux, Apache-2.0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from sdfleet.domain import Drawing
from sdfleet.engine.components import Components
from sdfleet.engine.conditioning import Conditioning, Room, flux_conditioning
from sdfleet.engine.devices import Device
from sdfleet.engine.families.base import Blend, LatentFamily, NetworkRows, PromptPair, Source, Start
from sdfleet.engine.pixels import to_mask, to_unit_range
from sdfleet.engine.prompt import Prompt, parse_prompt
from sdfleet.engine.prompt_cache import PromptCache
from sdfleet.engine.text_encoders import ClipEncoder, T5Encoder, n_clip_tokens
from sdfleet.errors import UnsupportedByModel

# The transformer takes latents in patches of 2x2, which its pipelines pack before it: its own patch_size says 1.
_PATCH = 2
# What T5's states are padded to, as in training: max_sequence_length of the pipelines, and of schnell's model page.
_T5_LENGTH = 512
_T5_LENGTH_SCHNELL = 256


class Flux(LatentFamily):
    """Adapter for FluxPipeline, FluxFillPipeline and FluxKontextPipeline checkpoints, and the other names of these."""

    name = "flux"
    denoiser = "transformer"
    even_sigmas = True

    def __init__(self, components: Components, device: Device, prompts: PromptCache) -> None:
        super().__init__(components, device, prompts)
        self._takes_guidance = bool(self._denoiser_config.get("guidance_embeds"))
        self._edits = components.pipeline_class.startswith("FluxKontext")
        self._t5_length = _T5_LENGTH if self._takes_guidance else _T5_LENGTH_SCHNELL

    @property
    def side_multiple_px(self) -> int:
        """The transformer takes latents in patches."""
        return self.px_per_latent * _PATCH

    @property
    def n_extra_channels(self) -> int:
        """Channels beside the latents: for Fill the masked picture's, and one for each pixel of the mask in a cell."""
        extra = int(self._denoiser_config["in_channels"]) // _PATCH**2 - self.latent_channels
        if extra not in {0, self.latent_channels + self._mask_channels}:
            raise UnsupportedByModel(
                f"the network takes {extra} channels beside the latents", hint="of FLUX.1, only Fill's are known to"
            )
        return extra

    def check(self, drawing: Drawing) -> None:
        """As the base; a prompt cannot do without T5 here."""
        super().check(drawing)
        if drawing.t5 == "skip":
            raise UnsupportedByModel("FLUX reads the prompt with T5, which cannot be left out", hint="leave t5 at auto")

    def is_guided(self, drawing: Drawing) -> bool:
        """Never: guidance is inside the network, or there is none."""
        return False

    def strength(self, drawing: Drawing) -> float:
        """As the base; Kontext edits a picture starting from noise, with the picture in view."""
        return 1.0 if self._edits and drawing.mask is None else super().strength(drawing)

    def encode(self, drawing: Drawing) -> PromptPair:
        """T5's states, and CLIP-L's vector of the first window."""
        clip = self.clip("clip_l", layer="last")
        t5 = T5Encoder(
            name="t5",
            tokenizer=self.components.use("tokenizer_2"),
            module=self.components.use("text_encoder_2"),
            min_length=self._t5_length,
        )

        def join(prompt: Prompt, room: Room, *, is_negative: bool) -> Conditioning:  # noqa: ARG001 - there is no negative
            return flux_conditioning(prompt, clip=clip, t5=t5, room=room)

        pair = self.paired(drawing, join, encoder=self.name, clips=(), t5=t5)
        return replace(pair, warnings=self._warnings(drawing, clip))

    def predict(self, rows: NetworkRows) -> Tensor:
        """One transformer call: the flow from picture to noise."""
        transformer = self.components.use("transformer")
        height, width = (side // _PATCH for side in rows.latents.shape[-2:])
        tokens = _packed(self._with_beside(rows))
        places = _places(height, width, like=rows.latents)
        if self._edits and rows.extra is not None:
            tokens = torch.cat([tokens, _packed(rows.extra)], dim=1)
            places = torch.cat([places, _places(height, width, like=rows.latents, picture=1)])
        answer: Tensor = transformer(
            hidden_states=tokens.to(transformer.dtype),
            timestep=rows.timestep / 1000,
            guidance=rows.guidance if self._takes_guidance else None,
            encoder_hidden_states=rows.states,
            pooled_projections=rows.pooled,
            txt_ids=places.new_zeros(rows.states.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        own = answer[:, : height * width].float()
        return functional.pixel_shuffle(own.transpose(1, 2).unflatten(2, (height, width)), _PATCH)

    @torch.inference_mode()
    def source(self, drawing: Drawing) -> Source:
        """As the base; for Fill the mask is [1, 64, h, w], and the whole picture is encoded at any strength."""
        if not self.n_extra_channels or drawing.image is None or drawing.mask is None:
            return super().source(drawing)
        image, mask = to_unit_range(drawing.image), to_mask(drawing.mask)
        return Source(
            # FluxFillPipeline encodes it even where it starts from noise alone; the draw of its sample comes first.
            image=self.vae.encode(image),
            masked_image=self.vae.encode(image * (mask < 0.5)),
            mask=functional.pixel_unshuffle(mask, self.px_per_latent).to(self.device.torch_device),
        )

    def start(self, drawing: Drawing, source: Source, generator: torch.Generator) -> Start:
        """As the base; what Kontext edits, it looks at all the way, as the encoder's mean and without a draw."""
        if not self._edits or source.image is None:
            return super().start(drawing, source, generator)
        noise = torch.randn(self.latent_shape(drawing), generator=generator).to(self.device.torch_device)
        seen = source.image.mean
        if source.mask is None:
            return Start(noise=noise, extra=seen)
        return Start(noise=noise, clean=seen, blend=Blend(image=seen, noise=noise, mask=source.mask), extra=seen)

    def n_latent_tokens(self, drawing: Drawing) -> int:
        """Image tokens: patches of latent cells. Those of a picture to edit do not count."""
        return super().n_latent_tokens(drawing) // _PATCH**2

    def conditioning_shape(self) -> tuple[int, int, int | None]:
        """T5's length, and CLIP's vector."""
        config = self._denoiser_config
        return self._t5_length, int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])

    @property
    def sees_references(self) -> bool:
        """Kontext does."""
        return self._edits

    @property
    def _mask_channels(self) -> int:
        return self.px_per_latent**2

    def _with_beside(self, rows: NetworkRows) -> Tensor:
        """[m, c + k, h, w]: the latents, and for Fill the masked picture and the mask behind them."""
        if not self.n_extra_channels or rows.extra is None:
            return rows.latents
        mask, masked_picture = rows.extra.split([self._mask_channels, self.latent_channels], dim=1)
        return torch.cat([rows.latents, masked_picture, mask], dim=1)

    def _warnings(self, drawing: Drawing, clip: ClipEncoder) -> tuple[str, ...]:
        """What this drawing asks for and FLUX.1 makes no use of."""
        found = []
        if drawing.negative_prompt:
            found.append("FLUX.1 takes no negative prompt: it has no effect")
        # 0 and 1 are how requests say "no guidance", and schnell's own card says 0.
        if drawing.guidance > 1 and not self._takes_guidance:
            found.append("this model was distilled without guidance: it has no effect")
        if self.strength(drawing) != drawing.strength:
            found.append("this model edits the whole picture, starting from noise: strength has no effect")
        window, n_tokens = clip.length - 2, n_clip_tokens(clip, parse_prompt(drawing.prompt))
        if n_tokens > window:
            found.append(
                f"CLIP's summary of the prompt is of its first {window} of {n_tokens} tokens; T5 reads all of them"
            )
        return tuple(found)

    def _tokens(self, cells: int) -> int:
        n_pictures = 2 if self._edits else 1
        return n_pictures * cells // _PATCH**2 + self._t5_length

    def _width(self) -> int:
        return int(self._denoiser_config["attention_head_dim"]) * int(self._denoiser_config["num_attention_heads"])


def _packed(cells: Tensor) -> Tensor:
    """[m, h/2 * w/2, 4c]: patches of 2x2 as tokens, channels outermost within each, as diffusers' `_pack_latents`."""
    return functional.pixel_unshuffle(cells, _PATCH).flatten(2).transpose(1, 2)


def _places(height: int, width: int, *, like: Tensor, picture: int = 0) -> Tensor:
    """[height * width, 3] float32: which picture, row and column each token belongs to."""
    axes = [torch.arange(n, device=like.device, dtype=torch.float32) for n in (height, width)]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(rows, picture), rows, columns], dim=-1).flatten(0, 1)
