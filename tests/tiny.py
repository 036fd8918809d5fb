"""Toy checkpoints of every family: diffusers' own classes, thin, with random weights; written in well under a second.

They answer to prompt, seed and guidance with visibly other pictures, and keep what decides behaviour in production:
eight pixels a latent, CLIP's begin, end and pad marks, who has a projection, what is padded to whose width.

    path = write("sdxl", tmp_path)          # a folder as `save_pretrained` writes it
    pipe = build_sdxl()                     # the pipeline itself
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 32, 64, 128
QWEN_WIDTH = 16
SIDE_PX = 64

# Words that T5's toy tokenizer knows whole; it spells the others.
WORDS = ("the", "cat", "dog", "moon", "sky", "red", "blue", "robot", "painting", "on", "castle", "sea", "blurry", "low")

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_sd15() -> Any:
    """SD 1.5: predicts the noise."""
    return diffusers.StableDiffusionPipeline(**_sd_parts(_unet(CLIP_L_WIDTH), _clip_tokenizer()))


def build_sd15_checked() -> Any:
    """SD 1.5 with its safety checker. Its thresholds are drawn as its concepts are: some pictures pass, some do not."""
    parts = _sd_parts(_unet(CLIP_L_WIDTH), _clip_tokenizer())
    parts |= {"safety_checker": safety_checker(), "feature_extractor": _clip_preparation()}
    return diffusers.StableDiffusionPipeline(**parts | {"requires_safety_checker": True})


def safety_checker() -> Any:
    """diffusers' checker of 17 concepts and 3 special ones, four patches by four."""
    torch.manual_seed(11)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8, "projection_dim": 16,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for table in (checker.concept_embeds, checker.special_care_embeds):
            table.normal_()
        checker.concept_embeds_weights.uniform_(0.3, 0.6)
        checker.special_care_embeds_weights.uniform_(0.0, 0.4)
        for parameter in checker.vision_model.parameters():
            parameter.mul_(4.0)
    return checker


def _clip_preparation() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def build_sd15_inpaint() -> Any:
    """SD 1.5 for inpainting: the UNet also sees the mask and the masked picture (4 + 1 + 4 channels)."""
    parts = _sd_parts(_unet(CLIP_L_WIDTH, in_channels=9), _clip_tokenizer())
    return diffusers.StableDiffusionInpaintPipeline(**parts)


def build_sd21() -> Any:
    """SD 2.1: predicts v. Its text encoder pads with "!", and was saved without its last layer: "last" is right."""
    tokenizer = _clip_tokenizer(pad_token="!")
    parts = _sd_parts(_unet(CLIP_L_WIDTH, linear=True), tokenizer, prediction_type="v_prediction")
    return diffusers.StableDiffusionPipeline(**parts)


def build_sdxl() -> Any:
    """SDXL base: two CLIPs, the second with a projection, sizes in the time embedding."""
    return diffusers.StableDiffusionXLPipeline(**_sdxl_parts(in_channels=4))


def build_sdxl_inpaint() -> Any:
    """SDXL for inpainting, with nine channels."""
    return diffusers.StableDiffusionXLInpaintPipeline(**_sdxl_parts(in_channels=9))


def build_sd3() -> Any:
    """SD3 with T5."""
    return _sd3(has_t5=True)


def build_sd3_no_t5() -> Any:
    """SD3 saved without T5. To load it, diffusers must be told `text_encoder_3=None, tokenizer_3=None` again."""
    return _sd3(has_t5=False)


def build_sd35() -> Any:
    """SD3.5: normalised queries and keys, and a block that attends twice."""
    return _sd3(has_t5=True, qk_norm="rms_norm", dual_attention_layers=(0,))


def build_sdxl_refiner() -> Any:
    """SDXL refiner: the second text encoder alone, and an aesthetic score in the place of the target size."""
    parts = _sdxl_parts(in_channels=4, context=CLIP_G_WIDTH, n_ids=5)
    parts |= {"tokenizer": None, "text_encoder": None}
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
    )


def build_flux_dev() -> Any:
    """FLUX.1 dev: guidance is an input, the noise is shifted by the picture's size."""
    return diffusers.FluxPipeline(**_flux_parts())


def build_flux_schnell() -> Any:
    """FLUX.1 schnell: neither guidance nor shift."""
    return diffusers.FluxPipeline(**_flux_parts(has_guidance=False))


def build_flux_fill() -> Any:
    """FLUX.1 Fill: sees the masked picture (16 channels) and the mask (8x8 pixels a cell) beside the latents."""
    return diffusers.FluxFillPipeline(**_flux_parts(beside=16 + 64))


def build_flux_kontext() -> Any:
    """FLUX.1 Kontext: dev under another name."""
    return diffusers.FluxKontextPipeline(**_flux_parts())


def build_klein() -> Any:
    """FLUX.2 klein: distilled, so that guidance has no effect."""
    return diffusers.Flux2KleinPipeline(**_klein_parts(), is_distilled=True)


def build_klein_base() -> Any:
    """FLUX.2 klein base: the same network, guided by a negative prompt."""
    return diffusers.Flux2KleinPipeline(**_klein_parts(), is_distilled=False)


def build_zimage() -> Any:
    """Z-Image. Its pad tokens are zero at birth, as its norms are one; here they are something."""
    tokenizer = _qwen_tokenizer()
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
        vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        text_encoder=_qwen(tokenizer, n_layers=3, cls=transformers.Qwen3Model),
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


def _sd_parts(unet: Any, tokenizer: Any, *, prediction_type: str = "epsilon") -> dict[str, Any]:
    return {
        "vae": _vae(latent_channels=4),
        "unet": unet,
        "tokenizer": tokenizer,
        "text_encoder": _clip(tokenizer, CLIP_L_WIDTH),
        "scheduler": diffusers.DDIMScheduler(
            **SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sdxl_parts(*, in_channels: int, context: int = CLIP_L_WIDTH + CLIP_G_WIDTH, n_ids: int = 6) -> dict[str, Any]:
    first, second = _clip_tokenizer(), _clip_tokenizer(pad_token="!")
    return {
        "vae": _vae(latent_channels=4),
        "unet": _unet(
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
        "text_encoder": _clip(first, CLIP_L_WIDTH),
        "text_encoder_2": _clip(second, CLIP_G_WIDTH, has_projection=True, seed=2),
        "scheduler": diffusers.EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
    }


def _sd3(*, has_t5: bool, **of_transformer: Any) -> Any:
    first, second, third = _clip_tokenizer(), _clip_tokenizer(pad_token="!"), _t5_tokenizer()
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
    return diffusers.StableDiffusion3Pipeline(
        transformer=_louder(transformer, 2.0),
        vae=_vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=first,
        text_encoder=_clip(first, CLIP_L_WIDTH, has_projection=True),
        tokenizer_2=second,
        text_encoder_2=_clip(second, CLIP_G_WIDTH, has_projection=True, seed=2),
        tokenizer_3=third if has_t5 else None,
        text_encoder_3=_t5(third) if has_t5 else None,
    )


def _flux_parts(*, has_guidance: bool = True, beside: int = 0) -> dict[str, Any]:
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
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
        "transformer": _louder(transformer, 2.0),
        "vae": _vae(
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=has_guidance, shift=3.0 if has_guidance else 1.0
        ),
        "tokenizer": clip_tokenizer,
        "text_encoder": _clip(clip_tokenizer, CLIP_L_WIDTH),
        "tokenizer_2": t5_tokenizer,
        "text_encoder_2": _t5(t5_tokenizer),
    }


def _klein_parts() -> dict[str, Any]:
    tokenizer = _qwen_tokenizer()
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
        "transformer": _louder(transformer, 2.5),
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "tokenizer": tokenizer,
        # Layers 9, 18 and 27 are read.
        "text_encoder": _qwen(tokenizer, n_layers=28, cls=transformers.Qwen3ForCausalLM),
    }


def _qwen_tokenizer() -> Any:
    """Bytes, two merges and Qwen's own marks, with a chat template that says whether the answer is thought about."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    merges = [("c", "a"), ("ca", "t")]
    tokens = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges), *marks]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        model_max_length=131072,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return tokenizer


def _qwen(tokenizer: Any, *, n_layers: int, cls: Any) -> Any:
    torch.manual_seed(11)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=QWEN_WIDTH,
        intermediate_size=2 * QWEN_WIDTH,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _louder(cls(config), 3.0).eval()


def _clip_tokenizer(*, pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's layout: bytes, bytes that end a word, merges, then the begin and the end mark with the highest ids.

    "!" has id 0, which is what SD 2.x and the second tokenizer of SDXL and SD3 pad with.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("o", "n</w>")]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77, pad_token=pad_token
    )


def _t5_tokenizer() -> Any:
    """A Unigram model with T5's own special ids: <pad> 0, </s> 1, <unk> 2."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -6.0)]
    pieces += [("\u2581" + word, -4.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in string.ascii_letters + string.digits + ".,;:!?'\"()[]-"]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _clip(tokenizer: Any, width: int, *, has_projection: bool = False, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_hidden_layers=3,
        max_position_embeddings=77,
        hidden_act="gelu" if has_projection else "quick_gelu",
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        # The published configs say 2, an old mistake that makes transformers look for the highest id instead.
        eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    cls = transformers.CLIPTextModelWithProjection if has_projection else transformers.CLIPTextModel
    module = _louder(cls(config), 3.0).eval()
    with torch.no_grad():
        # A trained layer norm has a bias; without one every mean is zero and weights could not restore it.
        (module.text_model if has_projection else module).final_layer_norm.bias.add_(0.1)
    return module


def _t5(tokenizer: Any) -> Any:
    torch.manual_seed(4)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_ff=37,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return transformers.T5EncoderModel(config).eval()


def _vae(*, latent_channels: int, **more: Any) -> Any:
    torch.manual_seed(5)
    return diffusers.AutoencoderKL(
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=SIDE_PX,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **more,
    ).eval()


def _unet(cross_attention_dim: int, *, in_channels: int = 4, linear: bool = False, **more: Any) -> Any:
    torch.manual_seed(6)
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE_PX // 8,
        in_channels=in_channels,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        use_linear_projection=linear,
        **more,
    ).eval()
    return _louder(unet, 2.0)


def _louder(module: Any, gain: float) -> Any:
    """Random thin layers hardly listen to their input; louder ones make every input visible in the picture."""
    with torch.no_grad():
        for parameter in module.parameters():
            # A 1x1 convolution is a linear layer too: SD 1.5's way into and out of attention.
            if parameter.ndim == 2 or parameter.shape[2:] == (1, 1):
                parameter.mul_(gain)
    return module
