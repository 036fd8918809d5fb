"""The part of a UNet in which pixels look at each other and at the words (arXiv:2112.10752, section 3.3).

Attribute names are those of the weights in the checkpoints' files.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.engine.attention import attention
from sdfleet.engine.networks.layers import Conv2d, GroupNorm, LayerNorm, Linear

_NORM_EPS = 1e-6


class SpatialTransformer(nn.Module):
    """Latents [b, c, h, w], each cell a token; `n_layers` times self attention, attention to the words, and a mixer.

    linear: whether the ways in and out are linear layers (SD 2.x, SDXL) or 1x1 convolutions (SD 1.x).
    """

    def __init__(
        self, channels: int, *, n_heads: int, n_layers: int, context_width: int, n_groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(n_groups, channels, eps=_NORM_EPS)
        self.proj_in = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            _Block(channels, n_heads=n_heads, context_width=context_width) for _ in range(n_layers)
        )
        self.proj_out = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self._linear = linear

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """states: [b, tokens, context_width]."""
        height, width = x.shape[-2:]
        hidden = self.norm(x)
        if self._linear:
            tokens = self.proj_in(_as_tokens(hidden))
        else:
            tokens = _as_tokens(self.proj_in(hidden))
        for block in self.transformer_blocks:
            tokens = block(tokens, states)
        if self._linear:
            return x + _as_cells(self.proj_out(tokens), height, width)
        return x + self.proj_out(_as_cells(tokens, height, width))


class Attention(nn.Module):
    """Tokens look at `context`, or at each other. No bias on the way in, one on the way out."""

    def __init__(self, width: int, *, n_heads: int, context_width: int | None = None) -> None:
        super().__init__()
        of_context = width if context_width is None else context_width
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(of_context, width, bias=False)
        self.to_v = Linear(of_context, width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width)])
        self._n_heads = n_heads

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """[b, n, width] of tokens [b, n, width] and context [b, m, context_width]."""
        context = tokens if context is None else context
        query, key, value = (
            x.unflatten(-1, (self._n_heads, -1)).transpose(1, 2)
            for x in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attention(query, key, value).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, *, n_heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, n_heads=n_heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, n_heads=n_heads, context_width=context_width)
        self.norm3 = LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(self, tokens: Tensor, states: Tensor) -> Tensor:
        tokens = self.attn1(self.norm1(tokens)) + tokens
        tokens = self.attn2(self.norm2(tokens), states) + tokens
        return self.ff(self.norm3(tokens)) + tokens


class _FeedForward(nn.Module):
    """Four times as wide within, gated (arXiv:2002.05202). The Identity stands where training had a dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_GatedLinear(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net[2](self.net[0](tokens))


class _GatedLinear(nn.Module):
    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * out_width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, gate = self.proj(tokens).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


def _as_tokens(cells: Tensor) -> Tensor:
    """[b, h * w, c] of [b, c, h, w]; without a copy where the channels lie last in memory."""
    return cells.permute(0, 2, 3, 1).flatten(1, 2)


def _as_cells(tokens: Tensor, height: int, width: int) -> Tensor:
    """[b, c, h, w] of [b, h * w, c]."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
