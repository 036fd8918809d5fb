"""What a family is: the adapter that lets one architecture share the engine's loop with every other.

A family says which components a phase needs, turns prompts into conditioning, makes first latents, calls its network,
and decodes. The loop, the samplers, guidance and batching are the engine's and the same for all. To add a family,
subclass `LatentFamily` and fill in `encode` and `predict`; see docs/adding-a-family.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sdfleet.domain import Drawing, TokenCount
from sdfleet.engine.components import TEXT_ENCODERS, ComponentName, Components
from sdfleet.engine.conditioning import Conditioning, Room, room_for
from sdfleet.engine.devices import Device
from sdfleet.engine.footprint import Footprint
from sdfleet.engine.lora import Loras, text_set_of
from sdfleet.engine.noise_schedule import NoiseSchedule
from sdfleet.engine.pixels import to_mask, to_unit_range
from sdfleet.engine.prompt import Prompt, parse_prompt
from sdfleet.engine.prompt_cache import PromptCache, PromptKey
from sdfleet.engine.text_encoders import CLIP_LENGTH, ClipEncoder, ClipLayer, T5Encoder
from sdfleet.engine.textual_inversion import Embeddings
from sdfleet.engine.vae import Posterior, PreviewMap, Vae
from sdfleet.errors import InvalidValue, UnsupportedByModel

log = logging.getLogger(__name__)

Phase = Literal["encode", "denoise", "decode"]

# Live numbers per token and channel during one network call, and per pixel and channel of the decoder's last block; and
# the share of all weights that one layer's may be. Above what is found for every published architecture from 64 to 2048
# px (tests/engine/test_footprint.py), so that what fits by far is admitted without finding it out.
_DENOISER_LIVE = 80
_DECODER_LIVE = 14
_LARGEST_LAYER = 0.12
# On a CPU a bound for what stays when an operation is over, see `Work.left_bytes`: packed weights and oneDNN's part.
_LEFT_BOUND_BYTES = 300_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPair:
    """What the network is told: `negative` is None where guidance does not use it. Equal lengths otherwise."""

    positive: Conditioning
    negative: Conditioning | None
    tokens: tuple[TokenCount, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a picture starts from. Empty for txt2img.

    image, masked_image: latents of the input picture, and of it with the masked part greyed out.
    mask: [1, 1, h, w], 1 where the picture is drawn anew; [1, k, h, w] where a network takes it in more detail.
    """

    image: Posterior | None = None
    masked_image: Posterior | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """How inpainting keeps the unmasked part: it is put back, at the noise level reached, after every step.

    image: clean latents [1, c, h, w]; noise: the trajectory's own [1, c, h, w]; mask: [1, 1, h, w].
    """

    image: Tensor
    noise: Tensor
    mask: Tensor

    def apply(self, latents: Tensor, *, alpha: float, sigma: float) -> Tensor:
        """`latents` where the mask is 1, the input picture at noise level (alpha, sigma) elsewhere."""
        kept = alpha * self.image + sigma * self.noise
        return self.mask * latents + (1 - self.mask) * kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """First latents [1, c, h, w] of one picture, and what must be kept beside them.

    clean: the input picture's latents, None for txt2img; noise: what was drawn.
    extra: channels [1, k, h, w] that an inpainting network takes beside the latents.
    """

    noise: Tensor
    clean: Tensor | None = None
    blend: Blend | None = None
    extra: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRows:
    """One call of the network. m rows, from any number of trajectories, each at its own timestep.

    latents: [m, c, h, w] float32. timestep, guidance: [m]; guidance is for networks that were distilled to take it.
    states: [m, tokens, d]; of row i the first n_tokens[i] count, and all rows are of one length where the family does
    not say `mixes_lengths`. pooled: [m, p] or None. extra: [m, k, h, w] or None.
    size_px: (height, width) of the pictures, the same for all rows.
    """

    latents: Tensor
    timestep: Tensor
    guidance: Tensor
    states: Tensor
    n_tokens: tuple[int, ...]
    pooled: Tensor | None
    extra: Tensor | None
    size_px: tuple[int, int]


class Join(Protocol):
    """A family's conditioning of one prompt with its encoders bound, filled up to a common length."""

    def __call__(self, prompt: Prompt, room: Room, *, is_negative: bool) -> Conditioning:
        """Conditioning of `prompt` in the length that `room` says."""
        ...


def adapters_of(drawing: Drawing) -> tuple[object, ...]:
    """What decides the states of a drawing's prompts beside their text, for PromptKey."""
    return (*text_set_of(drawing.loras), *((embedding.name, embedding.content) for embedding in drawing.embeddings))


class LatentFamily:
    """The part that every latent-diffusion family shares: VAE, first latents, inpainting, decode, sizes."""

    name: str
    denoiser: ComponentName
    # Whether the family's pipeline hands its scheduler evenly spaced sigmas, see NoiseSchedule.
    even_sigmas = False
    # Whether it finds the shift of the noise from picture size and steps, see NoiseSchedule.
    empirical_shift = False
    # Whether prompts of different lengths may be in one network call; `predict` then looks at `rows.n_tokens`.
    mixes_lengths = False
    codec: type[Vae] = Vae

    def __init__(self, components: Components, device: Device, prompts: PromptCache) -> None:
        self.components = components
        self.device = device
        self.prompts = prompts
        self.loras = Loras(components, device, family=self.name)
        self.embeddings = Embeddings(device)
        self.schedule = NoiseSchedule.from_config(
            components.config("scheduler", "scheduler_config.json"),
            even_sigmas=self.even_sigmas,
            empirical_shift=self.empirical_shift,
        )
        self._vae: tuple[Any, Vae] | None = None
        self._preview_map: PreviewMap | None = None
        vae = components.config("vae")
        self.latent_channels = int(vae["latent_channels"])
        self.px_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        self._decoder_channels = int(vae["block_out_channels"][0])
        self._denoiser_config = components.config(self.denoiser)
        self.footprint = Footprint(self)

    def components_for(self, phase: Phase) -> tuple[ComponentName, ...]:
        """The components that must be on the device during a phase; all others may be put away."""
        match phase:
            case "encode":
                return self.text_encoders()
            case "denoise":
                return (self.denoiser,)
            case "decode":
                return ("vae", "safety_checker") if self.components.has("safety_checker") else ("vae",)

    def is_checked(self, drawing: Drawing) -> bool:
        """Whether the checkpoint's own safety checker looks at the finished pictures."""
        return drawing.safety_checker != "off" and self.components.has("safety_checker")

    def text_encoders(self, drawing: Drawing | None = None) -> tuple[ComponentName, ...]:
        """The text encoders that a drawing needs; all there are, when none is given."""
        return tuple(name for name in TEXT_ENCODERS if self.components.has(name))

    @property
    def vae(self) -> Vae:
        """The picture codec, loaded when first used."""
        module = self.components.use("vae")
        if self._vae is None or self._vae[0] is not module:
            self._vae = (module, self.codec(module, self.device))
        return self._vae[1]

    def check(self, drawing: Drawing) -> None:
        """Raises what can be said against a drawing before any weights are loaded."""
        for name, side_px in (("width", drawing.width_px), ("height", drawing.height_px)):
            if side_px % self.side_multiple_px:
                raise InvalidValue(
                    name,
                    f"{side_px} px is not a multiple of {self.side_multiple_px}, as this model needs",
                    hint=f"use {side_px // self.side_multiple_px * self.side_multiple_px or self.side_multiple_px}",
                )
        for name, picture in (("image", drawing.image), ("mask", drawing.mask)):
            if picture is not None and (picture.width_px, picture.height_px) != (drawing.width_px, drawing.height_px):
                raise InvalidValue(
                    name,
                    f"it is {picture.width_px}x{picture.height_px}, the picture to draw "
                    f"{drawing.width_px}x{drawing.height_px}",
                )
        if drawing.t5 == "keep" and not self.has_t5:
            raise UnsupportedByModel("this model has no T5 text encoder to keep", hint="leave t5 at auto")
        if self.n_extra_channels and drawing.task != "inpaint":
            raise UnsupportedByModel(
                "this is an inpainting model: it draws only with an image and a mask",
                hint="give --image and --mask, or use the plain model",
            )

    @property
    def has_t5(self) -> bool:
        """Whether a T5 is among the text encoders."""
        return any(self.components.class_name(name) == "T5EncoderModel" for name in TEXT_ENCODERS)

    @property
    def side_multiple_px(self) -> int:
        """Sides must be a multiple of this, in pixels."""
        return self.px_per_latent

    @property
    def n_extra_channels(self) -> int:
        """Channels beside the latents that the network takes: 1 + latent_channels for an inpainting UNet, else 0."""
        extra = int(self._denoiser_config["in_channels"]) - self.latent_channels
        if extra not in {0, 1 + self.latent_channels}:
            raise UnsupportedByModel(
                f"the network takes {extra} channels beside the latents", hint="only inpainting networks are known to"
            )
        return extra

    def is_guided(self, drawing: Drawing) -> bool:
        """Whether the network is called for the negative prompt too. A family with guidance built in says no."""
        return drawing.guidance > 1

    def strength(self, drawing: Drawing) -> float:
        """(0, 1], how much of the way from noise is gone. A family that only looks at the input picture says 1."""
        return 1.0 if drawing.task == "txt2img" else drawing.strength

    def guidance_weight(self, drawing: Drawing) -> float:
        """w in negative + w * (positive - negative), or what a network distilled with guidance is told."""
        return drawing.guidance

    def encode(self, drawing: Drawing) -> PromptPair:
        """Conditioning for the prompt, and for the negative prompt where guidance is above 1."""
        raise UnsupportedByModel(f"{self.name} does not encode prompts")

    def clip(
        self, name: str, *, layer: ClipLayer, is_second: bool = False, drawing: Drawing | None = None
    ) -> ClipEncoder:
        """One of the checkpoint's CLIP text encoders, on the device. `name` is what token counts call it.

        drawing: whose embeddings it reads in the place of their names.
        """
        module = self.components.use("text_encoder_2" if is_second else "text_encoder")
        return ClipEncoder(
            name=name,
            tokenizer=self.components.use("tokenizer_2" if is_second else "tokenizer"),
            module=module,
            layer=layer,
            words=self.embeddings.words(() if drawing is None else drawing.embeddings, module, is_second=is_second),
        )

    def paired(
        self,
        drawing: Drawing,
        join: Join,
        *,
        encoder: str,
        clips: Sequence[ClipEncoder],
        t5: T5Encoder | None = None,
        is_zero_when_empty: bool = False,
    ) -> PromptPair:
        """Both prompts through the cache, with states of one length; no negative where guidance makes no use of it.

        join: the family's own conditioning. encoder: names it in the cache.
        """
        is_guided = self.is_guided(drawing)
        texts = [drawing.prompt, drawing.negative_prompt] if is_guided else [drawing.prompt]
        prompts = [parse_prompt(text) for text in texts]
        room = room_for(prompts, clips=clips, t5=t5)
        encoded = []
        for text, prompt, is_negative in zip(texts, prompts, (False, True), strict=False):
            key = PromptKey(
                checkpoint=str(self.components.folder),
                encoder=encoder,
                text=text,
                room=room,
                is_zero_when_empty=is_negative and is_zero_when_empty,
                adapters=adapters_of(drawing),
            )
            encoded.append(self.prompts.conditioning(key, partial(join, prompt, room, is_negative=is_negative)))
        ignored = bool(drawing.negative_prompt) and not is_guided
        return PromptPair(
            positive=encoded[0],
            negative=encoded[1] if is_guided else None,
            tokens=encoded[0].tokens,
            warnings=("the negative prompt has no effect at guidance 1 or less",) if ignored else (),
        )

    def predict(self, rows: NetworkRows) -> Tensor:
        """The network's raw answer [m, c, h, w], in the terms of `schedule.prediction`, float32."""
        raise UnsupportedByModel(f"{self.name} has no network")

    @torch.inference_mode()
    def source(self, drawing: Drawing) -> Source:
        """The input picture and mask as latents; once per job, whatever the number of pictures."""
        if drawing.image is None:
            return Source()
        image = to_unit_range(drawing.image)
        if drawing.mask is None:
            return Source(image=self.vae.encode(image))
        mask = to_mask(drawing.mask)
        cells = torch.nn.functional.interpolate(mask, size=self.latent_shape(drawing)[-2:])
        masked = self.vae.encode(image * (mask < 0.5)) if self.n_extra_channels else None
        # A network that takes the masked picture itself needs the clean one only to start part-way.
        clean = None if self.n_extra_channels and drawing.strength == 1 else self.vae.encode(image)
        return Source(image=clean, masked_image=masked, mask=cells.to(self.device.torch_device))

    def start(self, drawing: Drawing, source: Source, generator: torch.Generator) -> Start:
        """What one picture starts from; every random number comes from `generator`, on the CPU, in float32.

        The order of draws is that of diffusers' pipelines (encoder sample, noise, sample of the masked
        picture), so the same seed gives the same picture there and here.
        """
        shape = self.latent_shape(drawing)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device.torch_device)

        clean = source.image.sample(draw()) if source.image is not None else None
        noise = draw()
        if source.mask is None:
            return Start(noise=noise, clean=clean)
        masked_noise = draw()
        if source.masked_image is not None:
            extra = torch.cat([source.mask, source.masked_image.sample(masked_noise)], dim=1)
            return Start(noise=noise, clean=clean, extra=extra)
        if clean is None:
            raise UnsupportedByModel("inpainting needs the input picture's latents")
        return Start(noise=noise, clean=clean, blend=Blend(image=clean, noise=noise, mask=source.mask))

    def latent_shape(self, drawing: Drawing) -> tuple[int, int, int, int]:
        """(1, c, h, w) of one picture's latents."""
        return (
            1,
            self.latent_channels,
            drawing.height_px // self.px_per_latent,
            drawing.width_px // self.px_per_latent,
        )

    def n_latent_tokens(self, drawing: Drawing) -> int:
        """Image tokens of one picture in a transformer; latent cells in a UNet. Flow schedules may shift by it."""
        _, _, height, width = self.latent_shape(drawing)
        return height * width

    def decode(self, latents: Tensor, *, tiled: bool) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] of latents [n, c, h, w]."""
        return self.vae.decode(latents, tiled=tiled)

    def preview(self, denoised: Tensor) -> Tensor:
        """Small pictures [n, 3, h', w'] in [-1, 1] of what is denoised so far."""
        if self.components.has("tiny_vae"):
            with torch.inference_mode():
                tiny = self.components.use("tiny_vae")
                decoded: Tensor = tiny.decode(denoised.to(tiny.dtype), return_dict=False)[0]
                return decoded.float()
        if self._preview_map is None:
            self._preview_map = self.vae.fit_preview()
        return self._preview_map.apply(denoised)

    def peak_bytes(self, *, width_px: int, height_px: int, n_rows: int, edits: bool = False) -> int:
        """Most bytes beside the weights that one network call of `n_rows` rows takes, found out on the meta device.

        edits: an input picture is given. Takes up to a second for a shape that was not asked for before.
        """
        return self.footprint.denoise(width_px=width_px, height_px=height_px, n_rows=n_rows, edits=edits).most_bytes

    def decode_bytes(self, *, width_px: int, height_px: int, n_rows: int = 2) -> int:
        """Most bytes beside the weights that decoding one picture takes, untiled, after steps of `n_rows` rows.

        What the steps left is among it: it stays. As `peak_bytes`.
        """
        left = self.footprint.denoise(width_px=width_px, height_px=height_px, n_rows=n_rows).left_bytes
        return self.footprint.decode(width_px=width_px, height_px=height_px).most_bytes + left

    def left_by_prompts_bytes(self, drawing: Drawing) -> int:
        """Bytes that stay when this drawing's prompts were read; for short ones. Builds its text encoders on meta."""
        short = replace(drawing, prompt="", negative_prompt="", embeddings=())
        return self.footprint.encode(short).left_bytes

    def peak_bound_bytes(self, *, width_px: int, height_px: int, n_rows: int) -> int:
        """More than `peak_bytes` will be, at once and several times too much."""
        cells = (width_px // self.px_per_latent) * (height_px // self.px_per_latent)
        n_tokens = self._tokens(cells) + self.conditioning_shape()[0]
        live = n_rows * n_tokens * self._width() * self.device.dtype.itemsize * _DENOISER_LIVE
        largest_bytes = int(self.components.weights(text_encoders=()).denoiser * _LARGEST_LAYER)
        return live + largest_bytes + self._left_bound_bytes()

    def decode_bound_bytes(self, *, width_px: int, height_px: int, n_pictures: int = 1) -> int:
        """More than `decode_bytes` will be, at once; for so many pictures together."""
        n_numbers = n_pictures * width_px * height_px * self._decoder_channels * _DECODER_LIVE
        live = n_numbers * self.device.vae_dtype.itemsize
        return live + int(self.components.weights(text_encoders=()).vae * _LARGEST_LAYER) + self._left_bound_bytes()

    def conditioning_shape(self) -> tuple[int, int, int | None]:
        """(tokens, width, width of the pooled vector or None) of a short prompt's conditioning."""
        return CLIP_LENGTH, int(self._denoiser_config["cross_attention_dim"]), None

    @property
    def sees_references(self) -> bool:
        """Whether an input picture is seen by the network beside the latents, as large as they are."""
        return False

    def _left_bound_bytes(self) -> int:
        return _LEFT_BOUND_BYTES if self.device.kind == "cpu" else 0

    def _tokens(self, cells: int) -> int:
        return cells

    def _width(self) -> int:
        widths: Sequence[int] = self._denoiser_config["block_out_channels"]
        return int(widths[0])
