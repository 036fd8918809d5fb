"""How a diffusers denoiser is called, as plain float32 tensors in a fixed order: what OpenVINO converts and is fed.

The sinusoids of the timestep and of SDXL's sizes are computed here, outside of the converted model. Inside it, under
OpenVINO's bfloat16 hint, the timestep itself would be rounded to 8 bits before its sine is taken: the toy checkpoints'
answers were then off by 5 to 37 % (rms), against 1 to 2 % for torch in bfloat16 and for this arrangement
(2026-11-20, benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdfleet.engine.networks.embeddings import Timesteps

_N_TOKENS = 77


class NetworkCall(Protocol):
    """One class of denoisers."""

    def tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The inputs of the converted model, from the arguments that the diffusers module takes."""
        ...

    def wrapped(self, network: Any) -> nn.Module:
        """The diffusers module as one that takes `tensors`. The module is changed and of no other use then."""
        ...

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs to trace with."""
        ...


def call_of(class_name: str | None, config: Mapping[str, Any]) -> NetworkCall | None:
    """How to call a denoiser of this class and config; None where only torch knows it."""
    if class_name == "UNet2DConditionModel" and _is_plain_unet(config):
        return _UNetCall(config)
    if class_name == "SD3Transformer2DModel":
        return _SD3Call(config)
    return None


def _is_plain_unet(config: Mapping[str, Any]) -> bool:
    """Every published SD 1.x, 2.x, SDXL and inpainting UNet is; other embeddings would need other inputs."""
    special = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
    return (
        config.get("time_embedding_type", "positional") == "positional"
        and config.get("addition_embed_type") in {None, "text", "text_time"}
        and not any(config.get(name) is not None for name in special)
    )


class _UNetCall:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        sinusoid = {"flip_sin_to_cos": config.get("flip_sin_to_cos", True)}
        sinusoid["downscale_freq_shift"] = config.get("freq_shift", 0)
        self._time = Timesteps(config["block_out_channels"][0], **sinusoid)
        self._tells_size = config.get("addition_embed_type") == "text_time"
        self._size = Timesteps(config["addition_time_embed_dim"], **sinusoid) if self._tells_size else None

    def tensors(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        plain = (sample, self._time(timestep), encoder_hidden_states)
        if self._size is None:
            return plain
        assert added_cond_kwargs is not None
        sizes = added_cond_kwargs["time_ids"]
        return (*plain, added_cond_kwargs["text_embeds"], self._size(sizes.float().flatten()).reshape(len(sizes), -1))

    def wrapped(self, network: Any) -> nn.Module:
        return _PlainUNet(network, tells_size=self._tells_size)

    def examples(self) -> tuple[Tensor, ...]:
        # Odd sides, so that the trace takes the branch which fits every size: a UNet that sees only sides it can halve
        # doubles them blindly on the way up, and the trace would keep that.
        config, n_rows = self._config, 2
        sample = torch.randn(n_rows, config["in_channels"], 11, 13)
        states = torch.randn(n_rows, _N_TOKENS, _width(config["cross_attention_dim"]))
        plain = (sample, self._time(torch.tensor([900.0, 10.0])), states)
        if self._size is None:
            return plain
        # The base model is told six numbers of a picture and the refiner five; the trace fits any division of the two.
        n_in, n_of_sizes = config["projection_class_embeddings_input_dim"], 5 * config["addition_time_embed_dim"]
        return (*plain, torch.randn(n_rows, n_in - n_of_sizes), torch.randn(n_rows, n_of_sizes))


class _SD3Call:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        # As CombinedTimestepTextProjEmbeddings has them.
        self._time = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)

    def tensors(
        self, *, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> tuple[Tensor, ...]:
        return hidden_states, self._time(timestep), encoder_hidden_states, pooled_projections

    def wrapped(self, network: Any) -> nn.Module:
        return _PlainSD3(network)

    def examples(self) -> tuple[Tensor, ...]:
        config, n_rows = self._config, 2
        patch = config["patch_size"]
        return (
            torch.randn(n_rows, config["in_channels"], 6 * patch, 4 * patch),
            self._time(torch.tensor([900.0, 10.0])),
            torch.randn(n_rows, _N_TOKENS, config["joint_attention_dim"]),
            torch.randn(n_rows, config["pooled_projection_dim"]),
        )


class _PlainUNet(nn.Module):
    def __init__(self, network: Any, *, tells_size: bool) -> None:
        super().__init__()
        network.get_time_embed = lambda sample, timestep: timestep.to(sample.dtype)
        if tells_size:
            network.add_time_proj = nn.Identity()
        self._network = network

    def forward(
        self, sample: Tensor, time: Tensor, states: Tensor, text: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        more = {} if text is None else {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}
        answer: Tensor = self._network(sample, time, encoder_hidden_states=states, return_dict=False, **more)[0]
        return answer


class _PlainSD3(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        network.time_text_embed.time_proj = nn.Identity()
        self._network = network

    def forward(self, latents: Tensor, time: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        answer: Tensor = self._network(
            hidden_states=latents,
            timestep=time,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return answer


def _width(dim: int | list[int]) -> int:
    return dim if isinstance(dim, int) else dim[0]
