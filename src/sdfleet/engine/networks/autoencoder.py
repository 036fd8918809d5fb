"""The picture codec of the Stable Diffusion family and others: pixels to latents and back (arXiv:2112.10752).

Called as diffusers' class of the same name, as far as `engine/vae.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.engine.attention import attention
from sdfleet.engine.networks.blocks import Downsample, ResnetBlock, Upsample
from sdfleet.engine.networks.layers import Conv2d, GroupNorm, Linear
from sdfleet.engine.networks.options import understood

_EPS = 1e-6
# What diffusers' class assumes where a config is silent, 0.42.1.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_FIXED: dict[str, list[Any]] = {
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "act_fn": ["silu", "swish"],
}
# Names under which checkpoints of 2022 hold the attention's four layers.
_FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OVERLAP = 0.25


def read_autoencoder_config(config: Mapping[str, Any]) -> SimpleNamespace | None:
    """The options under diffusers' names; None where the config asks for something this codec does not have."""
    options = understood(config, defaults=_DEFAULTS, fixed=_FIXED)
    n_levels = len(config.get("block_out_channels", (64,)))
    blocks = (config.get(name, ["-"]) for name in ("down_block_types", "up_block_types"))
    if options is None or any(len(types) != n_levels for types in blocks):
        return None
    return SimpleNamespace(**options)


def with_present_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file under the names of today."""
    return {_present_name(name): tensor for name, tensor in weights.items()}


def _present_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    parent, _, layer = stem.rpartition(".")
    if ".attentions." in name and layer in _FORMER_NAMES:
        return f"{parent}.{_FORMER_NAMES[layer]}.{kind}"
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """What the encoder believes, [b, c, h, w] each."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """An answer of `AutoencoderKL.encode`."""

    latent_dist: Gaussian


class AutoencoderKL(nn.Module):
    """Named as the checkpoints name it. Ready for a strict load of their weights.

    use_tiling: pictures and latents longer than a tile go through in overlapping tiles, which takes less memory and
    is not quite the same picture. use_slicing: a batch is decoded one by one.
    tile_latent_min_size, tile_sample_min_size: a tile's side in latent cells and in pixels.
    """

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        n_moments = 2 * config.latent_channels
        self.quant_conv = Conv2d(n_moments, n_moments, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = (
            Conv2d(config.latent_channels, config.latent_channels, 1) if config.use_post_quant_conv else nn.Identity()
        )
        self.use_tiling = False
        self.use_slicing = False
        self._px_per_cell = 2 ** (len(config.block_out_channels) - 1)
        side = config.sample_size
        self.tile_sample_min_size: int = max(side) if isinstance(side, list | tuple) else side
        self.tile_latent_min_size: int = self.tile_sample_min_size // self._px_per_cell

    @property
    def dtype(self) -> torch.dtype:
        """What pictures and latents are wanted in."""
        return self.decoder.conv_in.weight.dtype

    def encode(self, x: Tensor) -> Encoded:
        """Latents, unscaled, of pictures [b, 3, H, W]."""
        moments = self._in_tiles(self._moments, x, tile=self.tile_sample_min_size, out_tile=self.tile_latent_min_size)
        mean, log_variance = moments.chunk(2, dim=1)
        return Encoded(latent_dist=Gaussian(mean=mean, std=torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))))

    def decode(self, z: Tensor, *, return_dict: bool = False) -> tuple[Tensor]:
        """(pictures [b, 3, H, W],) of unscaled latents [b, c, h, w]."""
        assert not return_dict
        parts = z.split(1) if self.use_slicing else (z,)
        decoded = [
            self._in_tiles(self._picture, part, tile=self.tile_latent_min_size, out_tile=self.tile_sample_min_size)
            for part in parts
        ]
        return (torch.cat(decoded) if len(decoded) > 1 else decoded[0],)

    def _moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def _picture(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _in_tiles(self, apply: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, out_tile: int) -> Tensor:
        """`apply` to x, or to tiles of it that overlap by a quarter and fade into each other."""
        if not self.use_tiling or max(x.shape[-2:]) <= tile:
            return apply(x)
        stride, faded = int(tile * (1 - _OVERLAP)), int(out_tile * _OVERLAP)
        kept = out_tile - faded
        rows: list[Tensor] = []
        above: list[Tensor] = []
        for top in range(0, x.shape[-2], stride):
            here = [apply(x[..., top : top + tile, left : left + tile]) for left in range(0, x.shape[-1], stride)]
            for i, piece in enumerate(here):
                if above:
                    _fade(above[i], piece, faded, dim=-2)
                if i:
                    _fade(here[i - 1], piece, faded, dim=-1)
            rows.append(torch.cat([piece[..., :kept, :kept] for piece in here], dim=-1))
            above = here
        return torch.cat(rows, dim=-2)


class _Encoder(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(
                config,
                widths[max(i - 1, 0)],
                width,
                n_resnets=config.layers_per_block,
                resize=None if i == len(widths) - 1 else "down",
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = _Middle(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=_EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv_in(x)
        for block in self.down_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(hidden))))


class _Decoder(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(config)
        self.up_blocks = nn.ModuleList(
            _Level(
                config,
                widths[max(i - 1, 0)],
                width,
                n_resnets=config.layers_per_block + 1,
                resize=None if i == len(widths) - 1 else "up",
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=_EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class _Level(nn.Module):
    """One resolution, and the way to the next where there is one."""

    def __init__(
        self, config: SimpleNamespace, in_channels: int, channels: int, *, n_resnets: int, resize: str | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels if j else in_channels, channels, n_groups=config.norm_num_groups, eps=_EPS)
            for j in range(n_resnets)
        )
        self.downsamplers = nn.ModuleList([Downsample(channels, padding=0)]) if resize == "down" else None
        self.upsamplers = nn.ModuleList([Upsample(channels)]) if resize == "up" else None

    def forward(self, hidden: Tensor) -> Tensor:
        for resnet in self.resnets:
            hidden = resnet(hidden)
        for resize in self.downsamplers or self.upsamplers or ():
            hidden = resize(hidden)
        return hidden


class _Middle(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width, n_groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(width, width, n_groups=n_groups, eps=_EPS) for _ in range(2))
        looks = [_CellAttention(width, n_groups=n_groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(looks)

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = self.resnets
        hidden = first(hidden)
        for look in self.attentions:
            hidden = look(hidden)
        return second(hidden)


class _CellAttention(nn.Module):
    """Every cell looks at every other, with one head as wide as the picture's channels."""

    def __init__(self, width: int, *, n_groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(n_groups, width, eps=_EPS)
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        seen = self.to_out[0](attention(query, key, value)[:, 0])
        return x + seen.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


def _fade(before: Tensor, after: Tensor, n: int, *, dim: int) -> None:
    """Let the first n lines of `after` begin as the last n of `before`, and end as themselves; in place."""
    n = min(n, before.shape[dim], after.shape[dim])
    if not n:
        return
    weight = (torch.arange(n, dtype=torch.float32, device=after.device) / n).to(after.dtype)
    weight = weight[:, None] if dim == -2 else weight
    begin = after.narrow(dim, 0, n)
    begin.copy_(before.narrow(dim, before.shape[dim] - n, n) * (1 - weight) + begin * weight)
