"""CLIP's text encoder (arXiv:2103.00020): token ids to a state for each token, and to one vector for all of them.

Called as transformers' classes of the same names, as far as `engine/text_encoders.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.engine.networks.layers import Embedding, LayerNorm, Linear
from sdfleet.engine.networks.options import understood

# What transformers' CLIPTextConfig assumes where a config is silent, 5.23.0.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
# For training, for the tokenizer, or notes of whoever saved the file.
_IDLE = frozenset(
    (
        "architectures", "attention_dropout", "bos_token_id", "dropout", "dtype", "initializer_factor",
        "initializer_range", "pad_token_id", "torch_dtype", "transformers_version",
    )
)  # fmt: skip
_FIXED: dict[str, list[Any]] = {"model_type": ["clip_text_model"]}
# Before transformers 4.31 every config said 2, which is no token of CLIP's: the mark that ends a text has the highest
# id, and was looked for as such.
_NO_TOKEN = 2


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


def read_clip_config(config: Mapping[str, Any]) -> SimpleNamespace | None:
    """The options under transformers' names; None where the config asks for something this encoder does not have."""
    options = understood(config, defaults=_DEFAULTS, fixed=_FIXED, idle=_IDLE)
    if options is None or options["hidden_act"] not in _ACTIVATIONS or not isinstance(options["eos_token_id"], int):
        return None
    return SimpleNamespace(**options)


class TextStates(NamedTuple):
    """last_hidden_state: [b, n, d], normalised; pooler_output: [b, d], that of the mark which ends the text.

    hidden_states: what went into each layer and came out of the last one, not normalised; None unless asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None


class ProjectedTextStates(NamedTuple):
    """text_embeds: [b, d'], the projected vector; the others as in `TextStates`."""

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


class CLIPTextModel(nn.Module):
    """Named as the checkpoints name it. Ready for a strict load of their weights."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = Layers(config, is_causal=True)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        """What the states come in."""
        return self.final_layer_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where ids are wanted."""
        return self.final_layer_norm.weight.device

    def forward(self, input_ids: Tensor, *, output_hidden_states: bool = False) -> TextStates:
        """input_ids: [b, n] int64, n at most config.max_position_embeddings, with the end mark in each row."""
        hidden_states = self.encoder(self.embeddings(input_ids))
        last = self.final_layer_norm(hidden_states[-1])
        ends = input_ids if self.config.eos_token_id == _NO_TOKEN else input_ids == self.config.eos_token_id
        pooled = last[torch.arange(len(last), device=last.device), ends.int().argmax(dim=-1)]
        return TextStates(last, pooled, hidden_states if output_hidden_states else None)


class CLIPTextModelWithProjection(nn.Module):
    """The same, with one more layer on the pooled vector."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextModel(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the states come in."""
        return self.text_model.dtype

    @property
    def device(self) -> torch.device:
        """Where ids are wanted."""
        return self.text_model.device

    def forward(self, input_ids: Tensor, *, output_hidden_states: bool = False) -> ProjectedTextStates:
        """As `CLIPTextModel`."""
        states = self.text_model(input_ids, output_hidden_states=output_hidden_states)
        embeds = self.text_projection(states.pooler_output)
        return ProjectedTextStates(embeds, states.last_hidden_state, states.hidden_states)


class _Embeddings(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[-1]]


class Layers(nn.Module):
    """CLIP's transformer, of texts and of pictures. is_causal: each token sees itself and those before it alone."""

    def __init__(self, config: SimpleNamespace, *, is_causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config, is_causal=is_causal) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """What went into each layer and came out of the last one; hidden: [b, n, d]."""
        hidden_states = [hidden]
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1]))
        return tuple(hidden_states)


class _Layer(nn.Module):
    def __init__(self, config: SimpleNamespace, *, is_causal: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = _Attention(width, n_heads=config.num_attention_heads, is_causal=is_causal)
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.mlp = _Mlp(config)
        self.layer_norm2 = LayerNorm(width, eps=eps)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Attention(nn.Module):
    def __init__(self, width: int, *, n_heads: int, is_causal: bool) -> None:
        super().__init__()
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.out_proj = Linear(width, width)
        self._n_heads = n_heads
        self._is_causal = is_causal

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            layer(hidden).unflatten(-1, (self._n_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        # torch's own function and not engine/attention.py: 77 tokens, once for each prompt, and it knows the order.
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=self._is_causal)
        return self.out_proj(seen.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self._activation: Callable[[Tensor], Tensor] = _ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self._activation(self.fc1(hidden)))
