"""Checkpoints for engines of other projects: the topology that their code insists on, in widths of a toy.

mflux builds four VAE levels with 32 groups whatever the config says, and quantises widths that 64 divides. DiffusionKit
pads text to a width of 4096. Written by diffusers' own classes, as downloads are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests import tiny, toys

_BLOCKS: dict[str, Any] = {
    # It has shortcuts where the published model changes width: between the first three levels, not into the last.
    "block_out_channels": (32, 96, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 64,
}
_QWEN_WIDTH = 64
_CONTEXT_WIDTH = 4096


def build_zimage() -> Any:
    """Z-Image with two layers."""
    tokenizer = toys.qwen_tokenizer()
    torch.manual_seed(20)
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=_QWEN_WIDTH,
        axes_dims=[16, 8, 8],
        axes_lens=[1024, 512, 512],
    ).eval()
    with torch.no_grad():
        transformer.x_pad_token.fill_(1.0)  # it is created as torch.empty
        transformer.cap_pad_token.fill_(1.0)
    vae = diffusers.AutoencoderKL(
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **_BLOCKS,
    ).eval()
    return diffusers.ZImagePipeline(
        transformer=_louder(transformer, 1.5),
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=_qwen(tokenizer, n_layers=3),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def build_klein() -> Any:
    """FLUX.2 klein with one layer of each kind; its text encoder needs 28, of which three are read."""
    tokenizer = toys.qwen_tokenizer()
    torch.manual_seed(21)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=3 * _QWEN_WIDTH,
        timestep_guidance_channels=256,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    ).eval()
    vae = diffusers.AutoencoderKLFlux2(
        latent_channels=32, use_quant_conv=True, use_post_quant_conv=True, **_BLOCKS
    ).eval()
    return diffusers.Flux2KleinPipeline(
        transformer=_louder(transformer, 2.0),
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=_qwen(tokenizer, n_layers=28),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        is_distilled=True,
    )


def build_sd3() -> Any:
    """Stable Diffusion 3, with keys and queries normalised as in 3.5 large, and T5."""
    whole = tiny.build_sd3()
    first, second = _clip(whole.tokenizer, width=32, seed=24), _clip(whole.tokenizer_2, width=64, seed=25)
    torch.manual_seed(22)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        caption_projection_dim=64,
        joint_attention_dim=_CONTEXT_WIDTH,
        pooled_projection_dim=32 + 64,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    ).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("to_k.bias"):  # zero when new, and not zero when trained
                parameter.normal_(0.0, 0.5)
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(whole.tokenizer_3),
            d_model=_CONTEXT_WIDTH,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        **{
            **whole.components,
            "transformer": _louder(transformer, 2.0),
            "text_encoder": first,
            "text_encoder_2": second,
            "text_encoder_3": t5,
        }
    )


BUILD: dict[str, Callable[[], Any]] = {"zimage": build_zimage, "klein": build_klein, "sd3": build_sd3}


def write(name: str, root: Path) -> Path:
    """The folder of that checkpoint below `root`, written now."""
    folder = root / f"thin-{name}"
    BUILD[name]().save_pretrained(folder)
    return folder


def _qwen(tokenizer: Any, *, n_layers: int) -> Any:
    torch.manual_seed(23)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=_QWEN_WIDTH,
            intermediate_size=_QWEN_WIDTH,
            num_hidden_layers=n_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


def _clip(tokenizer: Any, *, width: int, seed: int) -> Any:
    """DiffusionKit's CLIP is four times as wide between its layers, whatever the config says."""
    torch.manual_seed(seed)
    return _louder(
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval(),
        3.0,
    )


def _louder(module: Any, gain: float) -> Any:
    """Weights as large as trained ones, so that seeds and prompts can be seen in the pixels."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    return module
