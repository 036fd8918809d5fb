"""FLUX.1 in mflux with networks of ours: the real weights are 23 GB, and mflux builds no smaller ones.

What is mflux's own here: Flux1.generate_image with its config, schedules, packed latents, callbacks, tokenizers and
pictures. What is made up: the denoiser, both text encoders and the VAE, which keeps an average colour for each cell.
"""

from __future__ import annotations

from typing import Any

from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import mflux
from sdfleet.engine.guests.guest import GuestEngine


def open_engine(options: EngineOptions) -> GuestEngine:
    engine = mflux.open_engine(options)
    engine._turns.do(_put_in)
    return engine


def _put_in() -> None:
    import mlx.core as mx
    from mflux.callbacks.callback_registry import CallbackRegistry
    from mflux.models.common.tokenizer import TokenizerLoader
    from mflux.models.flux.flux_initializer import FluxInitializer
    from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition
    from mlx import nn

    class Words(nn.Module):  # type: ignore[misc]
        def __call__(self, ids: Any) -> Any:
            return mx.sin(ids[..., None] * mx.arange(1, 9))

    class Pooled(nn.Module):  # type: ignore[misc]
        def __call__(self, ids: Any) -> Any:
            return mx.sin(ids * 1.0)

    class Denoiser(nn.Module):  # type: ignore[misc]
        def __call__(self, *, hidden_states: Any, prompt_embeds: Any, config: Any, **_: Any) -> Any:
            guidance = config.guidance if config.model_config.supports_guidance else 0.0
            return hidden_states * 0.5 + 9 * prompt_embeds.mean() + guidance / 10

    class Vae(nn.Module):  # type: ignore[misc]
        def encode(self, image: Any) -> Any:
            n, c, height, width = image.shape
            cells = image.reshape(n, c, height // 8, 8, width // 8, 8).mean(axis=(3, 5))
            return mx.concatenate([cells, mx.zeros((n, 16 - c, height // 8, width // 8))], axis=1)

        def decode(self, latents: Any) -> Any:
            return mx.repeat(mx.repeat(latents[:, :3], 8, axis=2), 8, axis=3)

    def init(model: Any, *, model_config: Any, quantize: int | None, model_path: str, **_: Any) -> None:
        model.prompt_cache, model.model_config, model.callbacks = {}, model_config, CallbackRegistry()
        model.tiling_config, model.bits, model.lora_paths, model.lora_scales = None, quantize, [], []
        model.tokenizers = TokenizerLoader.load_all(
            definitions=FluxWeightDefinition.get_tokenizers(),
            model_path=model_path,
            max_length_overrides={"t5": model_config.max_sequence_length},
        )
        model.vae, model.transformer = Vae(), Denoiser()
        model.t5_text_encoder, model.clip_text_encoder = Words(), Pooled()

    FluxInitializer.init = staticmethod(init)
