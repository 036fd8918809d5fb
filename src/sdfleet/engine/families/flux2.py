"""FLUX.2 klein: a transformer over text, image and reference tokens, flow matching, prompts read by Qwen3.

The distilled checkpoint draws in four steps and has its guidance built in; the base is guided by a negative prompt.
An input picture is not where the drawing starts from: it is a reference, seen by the network beside the latents. With
a mask it is also what stays outside the mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdfleet.domain import Drawing, Picture
from sdfleet.engine.components import Components
from sdfleet.engine.devices import Device
from sdfleet.engine.families.base import Blend, NetworkRows, Source, Start
from sdfleet.engine.families.qwen import QwenFamily
from sdfleet.engine.pixels import to_mask, to_unit_range
from sdfleet.engine.prompt_cache import PromptCache
from sdfleet.engine.qwen_encoder import QWEN_MIN_LENGTH
from sdfleet.engine.resizing import resized
from sdfleet.engine.vae import PatchedVae
from sdfleet.errors import UnsupportedByModel

# Flux2KleinPipeline's place of the first reference on the time axis; the picture itself is at 0.
_REFERENCE_TIME = 10
# Larger references are shrunk to this area, as Flux2KleinPipeline does.
_REFERENCE_AREA_PX = 1024 * 1024


class Flux2Klein(QwenFamily):
    """Adapter for Flux2KleinPipeline checkpoints, distilled or not."""

    name = "flux2"
    denoiser = "transformer"
    codec = PatchedVae
    empirical_shift = True
    layers = (9, 18, 27)
    thinks = False
    pads = True

    def __init__(self, components: Components, device: Device, prompts: PromptCache) -> None:
        super().__init__(components, device, prompts)
        # Latents here are what the network sees: 2x2 cells of the VAE as one.
        self.latent_channels *= PatchedVae.patch**2
        self.px_per_latent *= PatchedVae.patch
        self.is_distilled = components.flag("is_distilled", default=False)

    def check(self, drawing: Drawing) -> None:
        """As the base; and a text encoder too shallow for the layers that are read is refused."""
        super().check(drawing)
        n_layers = int(self.components.config("text_encoder")["num_hidden_layers"])
        if n_layers < max(self.layers):
            raise UnsupportedByModel(
                f"the text encoder has {n_layers} layers, and FLUX.2 klein reads the {max(self.layers)}th"
            )

    def is_guided(self, drawing: Drawing) -> bool:
        """Only the base is; the distilled network was taught guided answers."""
        return drawing.guidance > 1 and not self.is_distilled

    def ignored(self, drawing: Drawing) -> tuple[str, ...]:
        """The distilled checkpoint has no use for guidance; an edit has none for strength."""
        said = () if self.is_distilled else super().ignored(drawing)
        if self.is_distilled and drawing.negative_prompt:
            said += ("the negative prompt has no effect: this checkpoint is distilled and has its guidance built in",)
        if self.is_distilled and drawing.guidance > 1:
            said += (f"guidance {drawing.guidance:g} has no effect: this checkpoint is distilled and has its own",)
        if drawing.task == "img2img" and drawing.strength != 1:
            said += ("strength has no effect: the input picture is a reference to edit, not a start",)
        return said

    def strength(self, drawing: Drawing) -> float:
        """An edit draws from noise alone, and looks at the input picture."""
        return drawing.strength if drawing.task == "inpaint" else 1.0

    @torch.inference_mode()
    def source(self, drawing: Drawing) -> Source:
        """The input picture's latents, and the mask in soft edges: a latent cell is 16 pixels wide."""
        if drawing.image is None:
            return Source()
        if drawing.mask is None:
            return Source(image=self.vae.encode(reference_pixels(drawing.image, multiple_px=self.px_per_latent)))
        cells = torch.nn.functional.interpolate(
            to_mask(drawing.mask), size=self.latent_shape(drawing)[-2:], mode="bilinear"
        )
        return Source(image=self.vae.encode(to_unit_range(drawing.image)), mask=cells.to(self.device.torch_device))

    def start(self, drawing: Drawing, source: Source, generator: torch.Generator) -> Start:
        """Noise, and the reference beside it. The encoder's mean is taken, so noise is the only draw."""
        noise = torch.randn(self.latent_shape(drawing), generator=generator).to(self.device.torch_device)
        if source.image is None:
            return Start(noise=noise)
        clean = source.image.mean
        if source.mask is None:
            return Start(noise=noise, extra=clean)
        return Start(noise=noise, clean=clean, extra=clean, blend=Blend(image=clean, noise=noise, mask=source.mask))

    def predict(self, rows: NetworkRows) -> Tensor:
        """One transformer call: the flow from picture to noise. `rows.extra` are references, which it only sees."""
        transformer = self.components.use("transformer")
        n, channels, height, width = rows.latents.shape
        tokens = _packed(rows.latents)
        places = [_places(height, width, time=0)]
        if rows.extra is not None:
            tokens = torch.cat([tokens, _packed(rows.extra)], dim=1)
            places.append(_places(*rows.extra.shape[-2:], time=_REFERENCE_TIME))
        words = torch.zeros(rows.states.shape[1], 4)
        words[:, 3] = torch.arange(rows.states.shape[1])
        answer: Tensor = transformer(
            hidden_states=tokens.to(transformer.dtype),
            timestep=rows.timestep.to(transformer.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=rows.states,
            txt_ids=words.to(tokens.device),
            img_ids=torch.cat(places).to(tokens.device),
            return_dict=False,
        )[0]
        return answer[:, : height * width].float().transpose(1, 2).reshape(n, channels, height, width)

    def conditioning_shape(self) -> tuple[int, int, int | None]:
        """The least length of prompts, in all the layers that are read."""
        return QWEN_MIN_LENGTH, int(self._denoiser_config["joint_attention_dim"]), None

    @property
    def sees_references(self) -> bool:
        """Every checkpoint does."""
        return True

    def preview(self, denoised: Tensor) -> Tensor:
        """As the base, by colours alone: a tiny VAE knows nothing of these latents."""
        if self._preview_map is None:
            self._preview_map = self.vae.fit_preview()
        return self._preview_map.apply(denoised)

    def _tokens(self, cells: int) -> int:
        # A reference is as large as the picture, and the prompt is never shorter.
        return 2 * cells + QWEN_MIN_LENGTH

    def _width(self) -> int:
        return int(self._denoiser_config["attention_head_dim"]) * int(self._denoiser_config["num_attention_heads"])


def reference_pixels(picture: Picture, *, multiple_px: int) -> Tensor:
    """The picture as [1, 3, H, W] in [-1, 1]: at most about a megapixel, cut to sides that are multiples."""
    area_px = picture.width_px * picture.height_px
    if area_px > _REFERENCE_AREA_PX:
        scale = math.sqrt(_REFERENCE_AREA_PX / area_px)
        picture = resized(picture, int(picture.width_px * scale), int(picture.height_px * scale))
    height, width = (side // multiple_px * multiple_px for side in (picture.height_px, picture.width_px))
    top, left = (picture.height_px - height) // 2, (picture.width_px - width) // 2
    return to_unit_range(picture)[..., top : top + height, left : left + width]


def _packed(latents: Tensor) -> Tensor:
    """Tokens [m, h * w, c] of latents [m, c, h, w]."""
    return latents.flatten(2).transpose(1, 2)


def _places(height: int, width: int, *, time: int) -> Tensor:
    """Where each token is: [h * w, 4] of (time, row, column, 0)."""
    return torch.cartesian_prod(
        torch.tensor([time]), torch.arange(height), torch.arange(width), torch.tensor([0])
    ).float()
