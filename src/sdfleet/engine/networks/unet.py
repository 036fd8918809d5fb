"""The denoiser of Stable Diffusion 1.x, 2.x, XL, its refiner, their inpainting versions, and the built-in model.

Down through blocks that halve the picture, a middle, and up again past what the way down has kept (arXiv:1505.04597);
with attention to the words in the deeper blocks (arXiv:2112.10752), and for XL the picture's size told beside the time
(arXiv:2307.01952). The forward takes and gives what diffusers' class of the same name does, so either can stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.engine.networks.blocks import Downsample, ResnetBlock, Upsample
from sdfleet.engine.networks.embeddings import TextTimeEmbedding, TimestepEmbedding, Timesteps
from sdfleet.engine.networks.layers import Conv2d, GroupNorm
from sdfleet.engine.networks.options import per_block, understood
from sdfleet.engine.networks.transformer import SpatialTransformer

# What diffusers' class assumes where a config is silent, 0.42.1.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 1280,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "use_linear_projection": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
# The sides of the training pictures; a dropout is for training; and the precision of attention is left to torch's own
# function here, as diffusers leaves it.
_IDLE = frozenset(("sample_size", "dropout", "upcast_attention"))
_FIXED: dict[str, list[Any]] = {
    "center_input_sample": [False],
    "mid_block_type": ["UNetMidBlock2DCrossAttn"],
    "only_cross_attention": [False],
    "mid_block_only_cross_attention": [None, False],
    "dual_cross_attention": [False],
    "downsample_padding": [1],
    "mid_block_scale_factor": [1],
    "act_fn": ["silu", "swish"],
    "reverse_transformer_layers_per_block": [None],
    "encoder_hid_dim": [None],
    "encoder_hid_dim_type": [None],
    "num_attention_heads": [None],
    "class_embed_type": [None],
    "num_class_embeds": [None],
    "class_embeddings_concat": [False],
    "resnet_time_scale_shift": ["default"],
    "resnet_skip_time_act": [False],
    "resnet_out_scale_factor": [1],
    "time_embedding_type": ["positional"],
    "time_embedding_dim": [None],
    "time_embedding_act_fn": [None],
    "timestep_post_act": [None],
    "time_cond_proj_dim": [None],
    "conv_in_kernel": [3],
    "conv_out_kernel": [3],
    "attention_type": ["default"],
    "cross_attention_norm": [None],
}
_ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One resolution, of both ways."""

    channels: int
    n_resnets: int
    n_heads: int
    n_layers: int
    context_width: int
    attends_down: bool
    attends_up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """A config.json that is understood. levels: from the picture's full size down.

    beside: what is told beside the time: nothing, the words as one vector, or CLIP's pooled vector and numbers of the
    picture (`n_beside` of them in all, each number as `size_channels` waves).
    """

    in_channels: int
    out_channels: int
    levels: tuple[_Level, ...]
    n_groups: int
    norm_eps: float
    linear: bool
    sinusoid: Mapping[str, Any]
    beside: Literal["text", "text_time"] | None
    n_pooling_heads: int
    size_channels: int
    n_beside: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self | None:
        """None where the config asks for something this network does not have."""
        options = understood(config, defaults=_DEFAULTS, fixed=_FIXED, idle=_IDLE)
        if options is None:
            return None
        n = len(options["block_out_channels"])
        names = ("block_out_channels", "layers_per_block", "attention_head_dim", "transformer_layers_per_block")
        numbers = [per_block(options[name], n) for name in (*names, "cross_attention_dim")]
        down, up = options["down_block_types"], options["up_block_types"][::-1]
        known = len(down) == len(up) == n and all("Down" in d and "Up" in u for d, u in zip(down, up, strict=True))
        beside = options["addition_embed_type"]
        sizes = (options["addition_time_embed_dim"], options["projection_class_embeddings_input_dim"])
        if (
            not known
            or any(name not in _ATTENDS for name in (*down, *up))
            or beside not in {None, "text", "text_time"}
            or (beside == "text_time" and None in sizes)
        ):
            return None
        levels = []
        for i in range(n):
            at = [values[i] for values in numbers if values is not None]
            if len(at) != len(numbers):
                return None
            levels.append(
                _Level(
                    channels=at[0],
                    n_resnets=at[1],
                    # A name that stuck to the wrong thing: the configs give the number of heads under it.
                    n_heads=at[2],
                    n_layers=at[3],
                    context_width=at[4],
                    attends_down=_ATTENDS[down[i]],
                    attends_up=_ATTENDS[up[i]],
                )
            )
        return cls(
            in_channels=options["in_channels"],
            out_channels=options["out_channels"],
            levels=tuple(levels),
            n_groups=options["norm_num_groups"],
            norm_eps=options["norm_eps"],
            linear=bool(options["use_linear_projection"]),
            sinusoid={
                "flip_sin_to_cos": options["flip_sin_to_cos"],
                "downscale_freq_shift": options["freq_shift"],
            },
            beside=beside,
            n_pooling_heads=options["addition_embed_type_num_heads"],
            size_channels=sizes[0] or 0,
            n_beside=sizes[1] or 0,
        )


class UNet2DConditionModel(nn.Module):
    """Named as the checkpoints name it. Ready for a strict load of their weights."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        first, last = config.levels[0], config.levels[-1]
        time_channels = 4 * first.channels
        self.conv_in = Conv2d(config.in_channels, first.channels, 3, padding=1)
        self.time_proj = Timesteps(first.channels, **config.sinusoid)
        self.time_embedding = TimestepEmbedding(first.channels, time_channels)
        self.add_time_proj: nn.Module | None = None
        self.add_embedding: nn.Module | None = None
        if config.beside == "text":
            self.add_embedding = TextTimeEmbedding(first.context_width, time_channels, n_heads=config.n_pooling_heads)
        elif config.beside == "text_time":
            self.add_time_proj = Timesteps(config.size_channels, **config.sinusoid)
            self.add_embedding = TimestepEmbedding(config.n_beside, time_channels)
        self._tells_size = config.beside == "text_time"

        widths = [first.channels, *(level.channels for level in config.levels)]
        self.down_blocks = nn.ModuleList(
            _DownBlock(config, i, in_channels=widths[i], time_channels=time_channels) for i in range(len(config.levels))
        )
        self.mid_block = _MidBlock(config, last, time_channels=time_channels)
        self.up_blocks = nn.ModuleList(
            _UpBlock(config, i, time_channels=time_channels) for i in reversed(range(len(config.levels)))
        )
        self.conv_norm_out = GroupNorm(config.n_groups, first.channels, eps=config.norm_eps)
        self.conv_out = Conv2d(first.channels, config.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """What `sample` is wanted in."""
        return self.conv_in.weight.dtype

    def get_time_embed(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """[m, c] in sample's dtype of timestep [m]. A function of its own, so that OpenVINO can be fed its answer."""
        return self.time_proj(timestep).to(sample.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """([m, out_channels, h, w],) of sample [m, in_channels, h, w], timestep [m] and states [m, tokens, d].

        added_cond_kwargs: `text_embeds` [m, p] and `time_ids` [m, 5 or 6] where the config is SDXL's or the refiner's.
        """
        assert not return_dict
        time = self.time_embedding(self.get_time_embed(sample, timestep))
        if self.add_embedding is not None:
            time = time + self.add_embedding(self._told_beside(encoder_hidden_states, added_cond_kwargs, time))
        # Every block adds the activated embedding, so it is activated here, once.
        time = F.silu(time)

        hidden = self.conv_in(sample)
        kept = [hidden]
        for down in self.down_blocks:
            hidden = down(hidden, time, encoder_hidden_states, kept)
        hidden = self.mid_block(hidden, time, encoder_hidden_states)
        for up in self.up_blocks:
            hidden = up(hidden, time, encoder_hidden_states, kept)
        return (self.conv_out(F.silu(self.conv_norm_out(hidden))),)

    def _told_beside(self, states: Tensor, beside: Mapping[str, Tensor] | None, time: Tensor) -> Tensor:
        if self.add_time_proj is None:
            return states
        assert beside is not None
        text, numbers = beside["text_embeds"], beside["time_ids"]
        waves = self.add_time_proj(numbers.flatten()).reshape(text.shape[0], -1)
        return torch.cat([text, waves], dim=-1).to(time.dtype)


class _DownBlock(nn.Module):
    def __init__(self, config: UNetConfig, i: int, *, in_channels: int, time_channels: int) -> None:
        super().__init__()
        level = config.levels[i]
        self.resnets = nn.ModuleList(
            _resnet(config, level.channels if j else in_channels, level.channels, time_channels)
            for j in range(level.n_resnets)
        )
        self.attentions = _attentions(config, level, level.n_resnets) if level.attends_down else None
        is_last = i == len(config.levels) - 1
        self.downsamplers = None if is_last else nn.ModuleList([Downsample(level.channels, padding=1)])

    def forward(self, hidden: Tensor, time: Tensor, states: Tensor, kept: list[Tensor]) -> Tensor:
        """What is to be met again on the way up is put on `kept`."""
        for i, resnet in enumerate(self.resnets):
            hidden = resnet(hidden, time)
            if self.attentions is not None:
                hidden = self.attentions[i](hidden, states)
            kept.append(hidden)
        if self.downsamplers is not None:
            hidden = self.downsamplers[0](hidden)
            kept.append(hidden)
        return hidden


class _MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, level: _Level, *, time_channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(config, level.channels, level.channels, time_channels) for _ in range(2))
        self.attentions = _attentions(config, level, 1)

    def forward(self, hidden: Tensor, time: Tensor, states: Tensor) -> Tensor:
        first, second = self.resnets
        return second(self.attentions[0](first(hidden, time), states), time)


class _UpBlock(nn.Module):
    def __init__(self, config: UNetConfig, i: int, *, time_channels: int) -> None:
        super().__init__()
        level = config.levels[i]
        below = config.levels[min(i + 1, len(config.levels) - 1)].channels
        above = config.levels[max(i - 1, 0)].channels
        n = level.n_resnets + 1
        # Each resnet takes what came up and one of the tensors kept: the last of these is what the level above gave.
        self.resnets = nn.ModuleList(
            _resnet(
                config,
                (below if j == 0 else level.channels) + (above if j == n - 1 else level.channels),
                level.channels,
                time_channels,
            )
            for j in range(n)
        )
        self.attentions = _attentions(config, level, n) if level.attends_up else None
        self.upsamplers = nn.ModuleList([Upsample(level.channels)]) if i else None

    def forward(self, hidden: Tensor, time: Tensor, states: Tensor, kept: list[Tensor]) -> Tensor:
        """What was kept is taken off `kept`."""
        for i, resnet in enumerate(self.resnets):
            hidden = resnet(torch.cat([hidden, kept.pop()], dim=1), time)
            if self.attentions is not None:
                hidden = self.attentions[i](hidden, states)
        if self.upsamplers is not None:
            # Sides that were odd on the way down must be met again, so the size is always that of the next kept tensor.
            hidden = self.upsamplers[0](hidden, kept[-1].shape[-2:])
        return hidden


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, time_channels: int) -> ResnetBlock:
    return ResnetBlock(
        in_channels, out_channels, n_groups=config.n_groups, eps=config.norm_eps, time_channels=time_channels
    )


def _attentions(config: UNetConfig, level: _Level, n: int) -> nn.ModuleList:
    return nn.ModuleList(
        SpatialTransformer(
            level.channels,
            n_heads=level.n_heads,
            n_layers=level.n_layers,
            context_width=level.context_width,
            n_groups=config.n_groups,
            linear=config.linear,
        )
        for _ in range(n)
    )
