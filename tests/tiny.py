"""Toy checkpoints of every family: diffusers' own classes, thin, with random weights; written in well under a second.

They answer to prompt, seed and guidance with visibly other pictures, and keep what decides behaviour in production:
eight pixels a latent, CLIP's begin, end and pad marks, who has a projection, what is padded to whose width.

    path = write("sdxl", tmp_path)          # a folder as `save_pretrained` writes it
    pipe = build_sdxl()                     # the pipeline itself
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests import toys
from tests.toys import CLIP_G_WIDTH, CLIP_L_WIDTH, QWEN_WIDTH, SIDE_PX, T5_WIDTH

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_sd15() -> Any:
    """SD 1.5: predicts the noise."""
    return diffusers.StableDiffusionPipeline(**sd_parts(toys.unet(CLIP_L_WIDTH), toys.clip_tokenizer()))


def build_sd15_checked() -> Any:
    """SD 1.5 with its safety checker. Its thresholds are drawn as its concepts are: some pictures pass, some do not."""
    parts = sd_parts(toys.unet(CLIP_L_WIDTH), toys.clip_tokenizer())
    parts |= {"safety_checker": toys.safety_checker(), "feature_extractor": toys.clip_preparation()}
    return diffusers.StableDiffusionPipeline(**parts | {"requires_safety_checker": True})


def build_sd15_inpaint() -> Any:
    """SD 1.5 for inpainting: the UNet also sees the mask and the masked picture (4 + 1 + 4 channels)."""
    parts = sd_parts(toys.unet(CLIP_L_WIDTH, in_channels=9), toys.clip_tokenizer())
    return diffusers.StableDiffusionInpaintPipeline(**parts)


def build_sd21() -> Any:
    """SD 2.1: predicts v. Its text encoder pads with "!", and was saved without its last layer: "last" is right."""
    tokenizer = toys.clip_tokenizer(pad_token="!")
    parts = sd_parts(toys.unet(CLIP_L_WIDTH, linear=True), tokenizer, prediction_type="v_prediction")
    return diffusers.StableDiffusionPipeline(**parts)


def build_sdxl() -> Any:
    """SDXL base: two CLIPs, the second with a projection, sizes in the time embedding."""
    return diffusers.StableDiffusionXLPipeline(**sdxl_parts(in_channels=4))


def build_sdxl_inpaint() -> Any:
    """SDXL for inpainting, with nine channels."""
    return diffusers.StableDiffusionXLInpaintPipeline(**sdxl_parts(in_channels=9))


def build_sd3() -> Any:
    """SD3 with T5."""
    return diffusers.StableDiffusion3Pipeline(**sd3_parts())


def build_sd3_no_t5() -> Any:
    """SD3 saved without T5. To load it, diffusers must be told `text_encoder_3=None, tokenizer_3=None` again."""
    return diffusers.StableDiffusion3Pipeline(**sd3_parts(has_t5=False))


def build_sd35() -> Any:
    """SD3.5: normalised queries and keys, and a block that attends twice."""
    return diffusers.StableDiffusion3Pipeline(**sd3_parts(qk_norm="rms_norm", dual_attention_layers=(0,)))


def build_sdxl_refiner() -> Any:
    """SDXL refiner: the second text encoder alone, and an aesthetic score in the place of the target size."""
    return refiner(sdxl_parts(in_channels=4, context=CLIP_G_WIDTH, n_ids=5))


def refiner(parts: dict[str, Any]) -> Any:
    """The refiner of these parts of an SDXL."""
    parts |= {"tokenizer": None, "text_encoder": None}
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
    )


def build_flux_dev() -> Any:
    """FLUX.1 dev: guidance is an input, the noise is shifted by the picture's size."""
    return diffusers.FluxPipeline(**flux_parts())


def build_flux_schnell() -> Any:
    """FLUX.1 schnell: neither guidance nor shift."""
    return diffusers.FluxPipeline(**flux_parts(has_guidance=False))


def build_flux_fill() -> Any:
    """FLUX.1 Fill: sees the masked picture (16 channels) and the mask (8x8 pixels a cell) beside the latents."""
    return diffusers.FluxFillPipeline(**flux_parts(beside=16 + 64))


def build_flux_kontext() -> Any:
    """FLUX.1 Kontext: dev under another name."""
    return diffusers.FluxKontextPipeline(**flux_parts())


def build_klein() -> Any:
    """FLUX.2 klein: distilled, so that guidance has no effect."""
    return diffusers.Flux2KleinPipeline(**_klein_parts(), is_distilled=True)


def build_klein_base() -> Any:
    """FLUX.2 klein base: the same network, guided by a negative prompt."""
    return diffusers.Flux2KleinPipeline(**_klein_parts(), is_distilled=False)


def build_zimage() -> Any:
    """Z-Image. Its pad tokens are zero at birth, as its norms are one; here they are something."""
    tokenizer = toys.qwen_tokenizer()
    torch.manual_seed(9)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=QWEN_WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    ).eval()
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=toys.vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        text_encoder=toys.qwen(tokenizer, n_layers=3, cls=transformers.Qwen3Model),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd15": build_sd15,
    "sd15-inpaint": build_sd15_inpaint,
    "sd15-checked": build_sd15_checked,
    "sd21": build_sd21,
    "sdxl": build_sdxl,
    "sdxl-inpaint": build_sdxl_inpaint,
    "sd3": build_sd3,
    "sd3-no-t5": build_sd3_no_t5,
    "sd35": build_sd35,
    "sdxl-refiner": build_sdxl_refiner,
    "flux-dev": build_flux_dev,
    "flux-schnell": build_flux_schnell,
    "flux-fill": build_flux_fill,
    "flux-kontext": build_flux_kontext,
    "klein": build_klein,
    "klein-base": build_klein_base,
    "zimage": build_zimage,
}


def write(name: str, root: Path) -> Path:
    """The checkpoint as a folder under `root`."""
    path = root / name
    BUILDERS[name]().save_pretrained(path, safe_serialization=True)
    return path


def load(path: Path) -> Any:
    """The pipeline that `write` put there, as diffusers itself loads it."""
    absent = {} if (path / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    is_sd3 = "StableDiffusion3Pipeline" in (path / "model_index.json").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True, **(absent if is_sd3 else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_parts(unet: Any, tokenizer: Any, *, prediction_type: str = "epsilon") -> dict[str, Any]:
    return {
        "vae": toys.vae(4),
        "unet": unet,
        "tokenizer": tokenizer,
        "text_encoder": toys.clip(tokenizer, CLIP_L_WIDTH),
        "scheduler": diffusers.DDIMScheduler(
            **SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sdxl_parts(*, in_channels: int, context: int = CLIP_L_WIDTH + CLIP_G_WIDTH, n_ids: int = 6) -> dict[str, Any]:
    first, second = toys.clip_tokenizer(), toys.clip_tokenizer(pad_token="!")
    return {
        "vae": toys.vae(4),
        "unet": toys.unet(
            context,
            in_channels=in_channels,
            linear=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=n_ids * 8 + CLIP_G_WIDTH,
        ),
        "tokenizer": first,
        "tokenizer_2": second,
        "text_encoder": toys.clip(first, CLIP_L_WIDTH),
        "text_encoder_2": toys.clip(second, CLIP_G_WIDTH, has_projection=True, seed=2),
        "scheduler": diffusers.EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
    }


def sd3_parts(*, has_t5: bool = True, **of_transformer: Any) -> dict[str, Any]:
    first, second, third = toys.clip_tokenizer(), toys.clip_tokenizer(pad_token="!"), toys.t5_tokenizer()
    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE_PX // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
        **of_transformer,
    ).eval()
    return {
        "transformer": toys.louder(transformer, 2.0),
        "vae": toys.vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer": first,
        "text_encoder": toys.clip(first, CLIP_L_WIDTH, has_projection=True),
        "tokenizer_2": second,
        "text_encoder_2": toys.clip(second, CLIP_G_WIDTH, has_projection=True, seed=2),
        "tokenizer_3": third if has_t5 else None,
        "text_encoder_3": toys.t5(third) if has_t5 else None,
    }


def flux_parts(*, has_guidance: bool = True, beside: int = 0) -> dict[str, Any]:
    clip_tokenizer, t5_tokenizer = toys.clip_tokenizer(), toys.t5_tokenizer()
    torch.manual_seed(8)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * (16 + beside),
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_L_WIDTH,
        guidance_embeds=has_guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    with torch.no_grad():
        # Among 500 padding tokens a word is heard only where attention is sharp.
        transformer.context_embedder.weight.mul_(4.0)
        for name, parameter in transformer.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
                parameter.mul_(4.0)
    return {
        "transformer": toys.louder(transformer, 2.0),
        "vae": toys.vae(
            16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=has_guidance, shift=3.0 if has_guidance else 1.0
        ),
        "tokenizer": clip_tokenizer,
        "text_encoder": toys.clip(clip_tokenizer, CLIP_L_WIDTH),
        "tokenizer_2": t5_tokenizer,
        "text_encoder_2": toys.t5(t5_tokenizer),
    }


def _klein_parts() -> dict[str, Any]:
    tokenizer = toys.qwen_tokenizer()
    torch.manual_seed(10)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * QWEN_WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()
    vae = diffusers.AutoencoderKLFlux2(
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=SIDE_PX,
        block_out_channels=(4, 4, 4, 4),
    ).eval()
    # What training measured of the latents; a fresh batch norm says 0 and 1.
    vae.bn.running_mean.normal_(0.0, 0.2)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return {
        "transformer": toys.louder(transformer, 2.5),
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "tokenizer": tokenizer,
        # Layers 9, 18 and 27 are read.
        "text_encoder": toys.qwen(tokenizer, n_layers=28, cls=transformers.Qwen3ForCausalLM),
    }
