"""Parts of toy checkpoints, of the libraries' own classes, thin; their random weights follow from their arguments.

What stands in a `config` goes to the class, over what is said here.
"""

from __future__ import annotations

import string
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


def qwen_tokenizer() -> Any:
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


def qwen(tokenizer: Any, *, n_layers: int, cls: Any) -> Any:
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
    return louder(cls(config), 3.0).eval()


def clip_tokenizer(*, pad_token: str = "<|endoftext|>") -> Any:
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


def t5_tokenizer() -> Any:
    """A Unigram model with T5's own special ids: <pad> 0, </s> 1, <unk> 2."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -6.0)]
    pieces += [("\u2581" + word, -4.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in string.ascii_letters + string.digits + ".,;:!?'\"()[]-"]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def clip(tokenizer: Any, width: int, *, has_projection: bool = False, seed: int = 1, **config: Any) -> Any:
    torch.manual_seed(seed)
    told = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "max_position_embeddings": 77,
        "hidden_act": "gelu" if has_projection else "quick_gelu",
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        # The published configs say 2, an old mistake that makes transformers look for the highest id instead.
        "eos_token_id": 2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    cls = transformers.CLIPTextModelWithProjection if has_projection else transformers.CLIPTextModel
    module = louder(cls(transformers.CLIPTextConfig(**told | config)), 3.0).eval()
    with torch.no_grad():
        # A trained layer norm has a bias; without one every mean is zero and weights could not restore it.
        (module.text_model if has_projection else module).final_layer_norm.bias.add_(0.1)
    return module


def t5(tokenizer: Any) -> Any:
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


def vae(latent_channels: int, **config: Any) -> Any:
    torch.manual_seed(5)
    told = {
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": SIDE_PX,
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return diffusers.AutoencoderKL(latent_channels=latent_channels, **told | config).eval()


def unet(cross_attention_dim: int, *, in_channels: int = 4, linear: bool = False, **config: Any) -> Any:
    torch.manual_seed(6)
    told = {
        "sample_size": SIDE_PX // 8,
        "out_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "block_out_channels": (4, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
    }
    network = diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=linear,
        **told | config,
    )
    return louder(network.eval(), 2.0)


def louder(module: Any, gain: float) -> Any:
    """Random thin layers hardly listen to their input; louder ones make every input visible in the picture."""
    with torch.no_grad():
        for parameter in module.parameters():
            # A 1x1 convolution is a linear layer too: SD 1.5's way into and out of attention.
            if parameter.ndim == 2 or parameter.shape[2:] == (1, 1):
                parameter.mul_(gain)
    return module


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


def clip_preparation() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
