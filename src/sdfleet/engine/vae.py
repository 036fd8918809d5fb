"""The picture codec of every family: pixels to latents and back, in tiles where memory is short, never black.

Latents here are as the denoiser sees them: (vae_latents - shift) * scale. Pictures are [n, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdfleet.engine.devices import Device
from sdfleet.errors import EngineFailed

log = logging.getLogger(__name__)

# The colour chart from which the preview map is fitted: 8x8 patches give 64 colours, and 32 px a middle to each. With
# 16 px the edges weighed so much that colours came out 15 % too strong on the built-in VAE.
_CHART_PATCHES = 8
_PATCH_PX = 32
# A tile of 64 cells is the 512 px that most decoders were trained on; below 8 cells the seams' overlap is all there is.
_MOST_TILE_CELLS = 64
_LEAST_TILE_CELLS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """What the encoder believes of one picture: latents are mean + std * noise. Both [1, c, h, w] float32."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """One draw; `noise` is standard normal, [1, c, h, w]."""
        return self.mean + self.std * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewMap:
    """A linear map from latents to colours. weights: [c, 3], bias: [3]."""

    weights: Tensor
    bias: Tensor

    def apply(self, latents: Tensor) -> Tensor:
        """A rough picture [n, 3, h, w] of latents [n, c, h, w], one pixel for each latent cell."""
        return torch.einsum("nchw,cr->nrhw", latents.float(), self.weights) + self.bias.view(1, 3, 1, 1)


class Vae:
    """One AutoencoderKL with its scaling. `upcast` tells that half precision failed and float32 took over."""

    def __init__(self, module: Any, device: Device) -> None:
        config = module.config
        self._module = module
        self._device = device
        self.latent_channels: int = config.latent_channels
        self.px_per_latent: int = 2 ** (len(config.block_out_channels) - 1)
        self._px_per_cell = self.px_per_latent
        self._scale = float(getattr(config, "scaling_factor", 1.0))
        self._shift = float(getattr(config, "shift_factor", None) or 0.0)
        self._mean = self._per_channel(getattr(config, "latents_mean", None), 0.0)
        self._std = self._per_channel(getattr(config, "latents_std", None), 1.0)
        self.upcast = False
        if getattr(config, "force_upcast", False) and module.dtype == torch.float16:
            self._to_float32()

    def _per_channel(self, values: Any, default: float) -> Tensor:
        numbers = [default] * self.latent_channels if values is None else list(values)
        return torch.tensor(numbers, dtype=torch.float32, device=self._device.torch_device).view(1, -1, 1, 1)

    @property
    def element_bytes(self) -> int:
        """Bytes of one number in the decoder."""
        return int(torch.empty((), dtype=self._module.dtype).element_size())

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Posterior:
        """What the latents of `image` [1, 3, H, W] are; H and W are multiples of `px_per_latent`."""
        image = image.to(self._device.torch_device, self._module.dtype)
        believed = self._module.encode(image).latent_dist
        scale = self._scale / self._std
        mean = (self._packed(believed.mean.float()) - self._shift - self._mean) * scale
        return Posterior(mean=mean, std=self._packed(believed.std.float()) * scale)

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Pictures [n, 3, H, W] float32 of latents [n, c, h, w]; values may leave [-1, 1] a little.

        Half-precision decoders overflow on some checkpoints, which shows as black pictures. A decode that is
        not finite is done once more in float32, and the decoder stays there. Raises EngineFailed when even
        that is not finite, for then the latents themselves are broken.
        """
        latents = self._unpacked(latents * self._std / self._scale + self._shift + self._mean)
        self._module.use_tiling = self._module.use_slicing = tiled
        if tiled:
            self._set_tiles(max(latents.shape[-2:]))
        decoded = self._decode(latents)
        if not bool(torch.isfinite(decoded).all()):
            if self._module.dtype == torch.float32 or not bool(torch.isfinite(latents).all()):
                raise EngineFailed(
                    "the picture came out as not-a-number", hint="try float32 (--dtype float32) or less guidance"
                )
            log.warning("vae decodes in float32 from now on", extra={"was": str(self._module.dtype)})
            self._to_float32()
            decoded = self._decode(latents)
        return decoded

    def _packed(self, cells: Tensor) -> Tensor:
        """Latents of the VAE's own cells; the same thing here."""
        return cells

    def _unpacked(self, latents: Tensor) -> Tensor:
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self._module.decode(latents.to(self._module.dtype), return_dict=False)[0]
        return decoded.float()

    def _set_tiles(self, longest_side: int) -> None:
        """Tiles of half the longest side, at most 64 latent cells: a quarter of the memory or less.

        Whole fours: diffusers' tiles overlap by a quarter, and anything else makes pictures a few pixels too large.
        """
        cells = min(_MOST_TILE_CELLS, max(_LEAST_TILE_CELLS, longest_side // 8 * 4))
        self._module.tile_latent_min_size = cells
        self._module.tile_sample_min_size = cells * self._px_per_cell

    def _to_float32(self) -> None:
        self._module.to(torch.float32)
        self.upcast = True

    @torch.inference_mode()
    def fit_preview(self) -> PreviewMap:
        """The map from latents to rough colours that suits this VAE.

        A chart of plain colours is encoded, and the least-squares solution from latents to colours is kept: it fits
        any checkpoint and needs no table of numbers.
        """
        levels = torch.linspace(-1.0, 1.0, 4)
        colours = torch.cartesian_prod(levels, levels, levels)
        # Neighbours must differ, or the fit would learn from long smooth ramps only; 37 has no factor with 64.
        order = torch.arange(len(colours)) * 37 % len(colours)
        chart = colours[order].T.reshape(1, 3, _CHART_PATCHES, _CHART_PATCHES)
        patch_px = max(_PATCH_PX, 2 * self.px_per_latent)
        image = torch.nn.functional.interpolate(chart, scale_factor=patch_px, mode="nearest")
        latents = self.encode(image).mean
        cells = torch.nn.functional.interpolate(image.to(latents), size=latents.shape[-2:], mode="area")
        known = latents.flatten(2).permute(0, 2, 1).reshape(-1, self.latent_channels)
        known = torch.cat([known, torch.ones_like(known[:, :1])], dim=1).double().cpu()
        wanted = cells.flatten(2).permute(0, 2, 1).reshape(-1, 3).double().cpu()
        # Ridge term: two channels of a young VAE may carry the same thing.
        ridge = 1e-3 * torch.eye(known.shape[1], dtype=torch.float64)
        solved = torch.linalg.solve(known.T @ known + ridge, known.T @ wanted)
        solved = solved.float().to(self._device.torch_device)
        return PreviewMap(weights=solved[:-1], bias=solved[-1])


class PatchedVae(Vae):
    """An AutoencoderKLFlux2: four cells are one latent of four times the channels, scaled by a batch norm's statistics.

    latents[:, 4 * c + 2 * dy + dx, y, x] = cells[:, c, 2 * y + dy, 2 * x + dx].
    """

    patch = 2

    def __init__(self, module: Any, device: Device) -> None:
        super().__init__(module, device)
        self.latent_channels *= self.patch**2
        self.px_per_latent *= self.patch
        self._mean = self._per_channel(module.bn.running_mean.tolist(), 0.0)
        self._std = (self._per_channel(module.bn.running_var.tolist(), 1.0) + module.config.batch_norm_eps).sqrt()

    def _packed(self, cells: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(cells, self.patch)

    def _unpacked(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(latents, self.patch)
