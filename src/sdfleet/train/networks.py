"""The built-in model's networks: the standard Stable Diffusion 1 classes at toy-like sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdfleet.train.latents import N_CHANNELS
from sdfleet.train.tokens import MAX_TOKENS
from sdfleet.train.world import N_CELLS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the networks are; the defaults are the shipped model's."""

    text_width: int = 192
    text_layers: int = 3
    widths: tuple[int, ...] = (64, 96, 160)
    attends: tuple[bool, ...] = (False, True, True)
    norm_groups: int = 16
    head_width: int = 32
    vae_widths: tuple[int, ...] = (32, 48, 64, 96)


def make_text_encoder(tokenizer: CLIPTokenizer, sizes: Sizes) -> CLIPTextModel:
    """An untrained text encoder for a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        intermediate_size=2 * sizes.text_width,
        projection_dim=sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=max(1, sizes.text_width // sizes.head_width),
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


def make_denoiser(sizes: Sizes) -> UNet2DConditionModel:
    """An untrained denoiser, predicting v for latents [n, 8, 16, 16]."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=N_CELLS,
        in_channels=N_CHANNELS,
        out_channels=N_CHANNELS,
        block_out_channels=sizes.widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in sizes.attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(sizes.attends)),
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=tuple(max(1, width // sizes.head_width) for width in sizes.widths),
        norm_num_groups=sizes.norm_groups,
        # Pools the token states into the time embedding: every block hears the whole prompt, not only those with
        # cross-attention. The standard pipeline needs no extra input for it.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def make_autoencoder(sizes: Sizes) -> AutoencoderKL:
    """An untrained autoencoder for the latents of `sdfleet.train.latents`."""
    from diffusers import AutoencoderKL

    n_blocks = len(sizes.vae_widths)
    return AutoencoderKL(
        block_out_channels=sizes.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * n_blocks,
        up_block_types=("UpDecoderBlock2D",) * n_blocks,
        layers_per_block=1,
        latent_channels=N_CHANNELS,
        norm_num_groups=min(8, sizes.vae_widths[0] // 4),
        mid_block_add_attention=False,
        sample_size=8 * N_CELLS,
        scaling_factor=1.0,
    )


def make_sampler() -> DDIMScheduler:
    """The noise schedule: scaled linear, v-prediction, the last step pure noise."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
