"""What a denoiser is told besides latents and words: the time, the picture's size, the prompt as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.engine.attention import attention
from sdfleet.engine.networks.layers import LayerNorm, Linear

_LONGEST_PERIOD = 10_000


class Timesteps(nn.Module):
    """Numbers as sines and cosines of `channels` / 2 frequencies (arXiv:2006.11239, arXiv:1706.03762); no weights."""

    def __init__(self, channels: int, *, flip_sin_to_cos: bool, downscale_freq_shift: float) -> None:
        super().__init__()
        self._channels = channels
        self._cosine_first = flip_sin_to_cos
        self._shift = downscale_freq_shift

    def forward(self, numbers: Tensor) -> Tensor:
        """[n, channels] float32 of [n]."""
        half = self._channels // 2
        place = torch.arange(half, dtype=torch.float32, device=numbers.device)
        angles = numbers.float()[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * place / (half - self._shift))
        sine, cosine = torch.sin(angles), torch.cos(angles)
        waves = torch.cat([cosine, sine] if self._cosine_first else [sine, cosine], dim=-1)
        return F.pad(waves, (0, self._channels % 2)) if self._channels % 2 else waves


class TimestepEmbedding(nn.Module):
    """Two linear layers: [n, in_channels] to [n, channels]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_channels, channels)
        self.linear_2 = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TextTimeEmbedding(nn.Module):
    """The prompt's states, pooled by attention into one vector: [n, tokens, width] to [n, channels]."""

    def __init__(self, width: int, channels: int, *, n_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.pool = _AttentionPooling(width, n_heads=n_heads)
        self.proj = Linear(width, channels)
        self.norm2 = LayerNorm(channels)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(states))))


class _AttentionPooling(nn.Module):
    """One query, the mean of all tokens, looks at itself and at every token."""

    def __init__(self, width: int, *, n_heads: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(1, width, device="meta"))
        self.k_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self._n_heads = n_heads

    def forward(self, states: Tensor) -> Tensor:
        mean = states.mean(dim=1, keepdim=True) + self.positional_embedding
        tokens = torch.cat([mean, states], dim=1)
        query, key, value = self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens)
        pooled = attention(*(x.unflatten(-1, (self._n_heads, -1)).transpose(1, 2) for x in (query, key, value)))
        return pooled.flatten(1)
