"""Toy checkpoints in one file, in their authors' layouts: what `tiny.py` makes, under the other names.

Widths follow what a file cannot say: heads of 64 or 128 channels, eight heads in SD 1.x, norms of 32 groups. The
renaming is written the other way round than the package's; `test_renaming_is_what_diffusers_undoes` holds it to the
library's own converters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny, toys

State = dict[str, Tensor]
CLIP_L, CLIP_G, T5 = 64, 128, toys.T5_WIDTH

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def write(kind: str, root: Path) -> tuple[Path, Path]:
    """(the diffusers folder, the single file) of one toy checkpoint; the same weights in both."""
    folder, file = root / kind, root / f"{kind}.safetensors"
    if not file.exists():
        BUILDERS[kind]().save_pretrained(folder, safe_serialization=True)
        save_file(as_published(kind, folder), file)
    return folder, file


def as_published(kind: str, folder: Path) -> State:
    """All weights of a toy folder under the names that this kind of checkpoint is published with."""
    family = "sdxl" if kind.startswith("sdxl") else kind.split("-", maxsplit=1)[0]
    state: State = {}
    if family in {"sd15", "sd21", "sdxl"}:
        state |= _prefixed("model.diffusion_model.", unet_as_published(_weights(folder, "unet")))
        state |= _prefixed("first_stage_model.", vae_as_published(_weights(folder, "vae")))
    match family:
        case "sd15":
            names = _prefixed("text_model.", _bare(_weights(folder, "text_encoder")))
            state |= _prefixed("cond_stage_model.transformer.", names)
        case "sd21":
            clip = clip_as_open_clip(_weights(folder, "text_encoder"), has_one_more=True)
            state |= _prefixed("cond_stage_model.model.", clip)
        case "sdxl":
            second = clip_as_open_clip(_weights(folder, "text_encoder_2"), has_one_more=False)
            if kind.endswith("refiner"):
                second = {name: tensor.contiguous() for name, tensor in second.items()}
                return state | _prefixed("conditioner.embedders.0.model.", second)
            first = _prefixed("text_model.", _bare(_weights(folder, "text_encoder")))
            state |= _prefixed("conditioner.embedders.0.transformer.", first)
            state |= _prefixed("conditioner.embedders.1.model.", second)
        case "sd3" | "sd35":
            state |= _prefixed("model.diffusion_model.", sd3_as_published(_weights(folder, "transformer")))
            state |= _prefixed("first_stage_model.", vae_as_published(_weights(folder, "vae")))
            first = _weights(folder, "text_encoder")
            del first["text_projection.weight"]
            state |= _prefixed("text_encoders.clip_l.transformer.", first)
            state |= _prefixed("text_encoders.clip_g.transformer.", _weights(folder, "text_encoder_2"))
            state |= _prefixed("text_encoders.t5xxl.transformer.", _weights(folder, "text_encoder_3"))
        case "flux":
            state = flux_as_published(_weights(folder, "transformer"))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def unet_as_published(weights: State) -> State:
    """diffusers' UNet names to CompVis': n resnets and a downsampling a level on the way down, n + 1 on the way up."""
    n = 1 + max(int(m[1]) for name in weights if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", name)))
    has_attention = {int(m[1]) for name in weights if (m := re.match(r"up_blocks\.(\d+)\.attentions", name))}

    def renamed(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in _UNET_TOP:
            return f"{_UNET_TOP[stem]}.{kind}"
        parts = stem.split(".")
        if parts[0] == "mid_block":
            block = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}[".".join(parts[1:3])]
            return ".".join(["middle_block", block, _inner(parts[1], ".".join(parts[3:])), kind])
        level, what, j = int(parts[1]), parts[2], int(parts[3])
        inner = _inner(what, ".".join(parts[4:]))
        if parts[0] == "down_blocks":
            if what == "downsamplers":
                return f"input_blocks.{(n + 1) * (level + 1)}.0.op.{kind}"
            return f"input_blocks.{1 + (n + 1) * level + j}.{int(what == 'attentions')}.{inner}.{kind}"
        if what == "upsamplers":
            return f"output_blocks.{(n + 1) * level + n}.{1 + (level in has_attention)}.conv.{kind}"
        return f"output_blocks.{(n + 1) * level + j}.{int(what == 'attentions')}.{inner}.{kind}"

    return {renamed(name): tensor for name, tensor in weights.items()}


def _inner(what: str, layer: str) -> str:
    return _RESNET[layer] if what == "resnets" else layer


def vae_as_published(weights: State) -> State:
    """diffusers' codec names to CompVis'; four levels."""
    state = {}
    for name, tensor in weights.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if ".attentions." in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = re.sub(r"to_([qkv])\.", r"\1.", new).replace("to_out.0", "proj_out")
        state[new] = tensor[:, :, None, None] if ".mid.attn_1." in new and tensor.ndim == 2 else tensor
    return state


def clip_as_open_clip(weights: State, *, has_one_more: bool) -> State:
    """transformers' CLIP names to OpenCLIP's. has_one_more: with the last layer that SD 2.x passes over."""
    weights = _bare(weights)
    layers = 1 + max(int(m[1]) for name in weights if (m := re.match(r"encoder\.layers\.(\d+)", name)))
    if has_one_more:
        last = f"encoder.layers.{layers - 1}."
        weights |= {
            name.replace(last, f"encoder.layers.{layers}."): tensor + 1.0
            for name, tensor in weights.items()
            if name.startswith(last)
        }
        layers += 1
    state = {
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": weights["text_projection.weight"].T
        if "text_projection.weight" in weights
        else torch.eye(weights["final_layer_norm.weight"].shape[0]),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for i in range(layers):
        old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            state |= {f"{new}{target}.{kind}": weights[f"{old}{source}.{kind}"] for source, target in names.items()}
            state[f"{new}attn.in_proj_{kind}"] = torch.cat(
                [weights[f"{old}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            )
    return state


def sd3_as_published(weights: State) -> State:
    """diffusers' SD3 names to Stability's."""
    last = max(int(m[1]) for name in weights if (m := re.match(r"transformer_blocks\.(\d+)", name)))
    top = {
        "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear", "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    }  # fmt: skip
    layers = {
        "attn.to_out.0": "x_block.attn.proj", "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj", "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k", "norm1.linear": "x_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "attn.to_add_out": "context_block.attn.proj", "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k", "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    }  # fmt: skip
    fused = {
        "attn.to_q": ("x_block.attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        "attn2.to_q": ("x_block.attn2.qkv", ["attn2.to_q", "attn2.to_k", "attn2.to_v"]),
        "attn.add_q_proj": ("context_block.attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    }
    state = {"pos_embed": weights["pos_embed.pos_embed"]}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in top:
            state[f"{top[stem]}.{kind}"] = tensor
        elif stem == "norm_out.linear":
            state[f"final_layer.adaLN_modulation.1.{kind}"] = _swapped(tensor)
        elif (m := re.match(r"transformer_blocks\.(\d+)\.(.+)", stem)) is not None:
            here = f"transformer_blocks.{m[1]}"
            if m[2] in fused:
                target, sources = fused[m[2]]
                state[f"joint_blocks.{m[1]}.{target}.{kind}"] = torch.cat(
                    [weights[f"{here}.{source}.{kind}"] for source in sources]
                )
            elif m[2] in layers:
                is_swapped = m[2] == "norm1_context.linear" and int(m[1]) == last
                state[f"joint_blocks.{m[1]}.{layers[m[2]]}.{kind}"] = _swapped(tensor) if is_swapped else tensor
    return state


def flux_as_published(weights: State) -> State:
    """diffusers' FLUX.1 names to Black Forest Labs'."""
    top = {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    }  # fmt: skip
    double = {
        "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    }  # fmt: skip
    scales = {
        "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
    }  # fmt: skip
    fused = {
        "attn.to_q": ("img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        "attn.add_q_proj": ("txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    }
    state = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        block = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.+)", stem)
        if stem in top:
            state[f"{top[stem]}.{kind}"] = tensor
        elif stem == "norm_out.linear":
            state[f"final_layer.adaLN_modulation.1.{kind}"] = _swapped(tensor)
        elif block is None:
            raise AssertionError(name)
        elif block[1] is None:
            here, i, layer = f"transformer_blocks.{block[2]}", f"double_blocks.{block[2]}", block[3]
            if layer in fused:
                state[f"{i}.{fused[layer][0]}.{kind}"] = torch.cat(
                    [weights[f"{here}.{s}.{kind}"] for s in fused[layer][1]]
                )
            elif layer in scales:
                state[f"{i}.{scales[layer]}.scale"] = tensor
            elif layer in double:
                state[f"{i}.{double[layer]}.{kind}"] = tensor
        else:
            here, i, layer = f"single_transformer_blocks.{block[2]}", f"single_blocks.{block[2]}", block[3]
            if layer == "attn.to_q":
                parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
                state[f"{i}.linear1.{kind}"] = torch.cat([weights[f"{here}.{part}.{kind}"] for part in parts])
            elif layer in {"attn.norm_q", "attn.norm_k"}:
                state[f"{i}.norm.{'query' if layer[-1] == 'q' else 'key'}_norm.scale"] = tensor
            elif layer in {"norm.linear", "proj_out"}:
                state[f"{i}.{'modulation.lin' if layer == 'norm.linear' else 'linear2'}.{kind}"] = tensor
    return state


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _bare(weights: State) -> State:
    return {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


def _weights(folder: Path, component: str) -> State:
    return load_file(next((folder / component).glob("*.safetensors")))


def _sd(*, linear: bool, in_channels: int = 4) -> Any:
    tokenizer = toys.clip_tokenizer(pad_token="!" if linear else "<|endoftext|>")
    parts = tiny.sd_parts(
        _unet((64, 128) if linear else (32, 64), CLIP_L, in_channels=in_channels, linear=linear),
        tokenizer,
        prediction_type="v_prediction" if linear else "epsilon",
    )
    parts |= {"vae": _vae(4), "text_encoder": _clip(tokenizer, hidden_act="gelu" if linear else "quick_gelu")}
    inpaints = in_channels == 9
    return (diffusers.StableDiffusionInpaintPipeline if inpaints else diffusers.StableDiffusionPipeline)(**parts)


def _sdxl(*, in_channels: int = 4, is_refiner: bool = False) -> Any:
    parts = tiny.sdxl_parts(in_channels=in_channels)
    parts |= {
        "vae": _vae(4, scaling_factor=0.13025),
        "unet": _unet(
            (64, 128),
            CLIP_G if is_refiner else CLIP_L + CLIP_G,
            in_channels=in_channels,
            linear=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=(5 if is_refiner else 6) * 256 + CLIP_G,
        ),
        "text_encoder": _clip(parts["tokenizer"]),
        "text_encoder_2": _clip(parts["tokenizer_2"], CLIP_G, has_projection=True),
    }
    if is_refiner:
        return tiny.refiner(parts)
    inpaints = in_channels == 9
    cls = diffusers.StableDiffusionXLInpaintPipeline if inpaints else diffusers.StableDiffusionXLPipeline
    return cls(**parts)


def _sd3(**of_transformer: Any) -> Any:
    parts = tiny.sd3_parts()
    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=1,
        caption_projection_dim=64,
        joint_attention_dim=T5,
        pooled_projection_dim=2 * CLIP_L,
        pos_embed_max_size=24,
        **of_transformer,
    ).eval()
    clip_l = _clip(parts["tokenizer"], has_projection=True, hidden_act="quick_gelu")
    with torch.no_grad():
        clip_l.text_projection.weight.copy_(torch.eye(CLIP_L))
    parts |= {
        "transformer": toys.louder(transformer, 2.0),
        "vae": _vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305),
        "text_encoder": clip_l,
        "text_encoder_2": _clip(parts["tokenizer_2"], has_projection=True, seed=2),
    }
    return diffusers.StableDiffusion3Pipeline(**parts)


def _flux(*, has_guidance: bool = True, beside: int = 0) -> Any:
    parts = tiny.flux_parts(has_guidance=has_guidance, beside=beside)
    torch.manual_seed(8)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * (16 + beside),
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=T5,
        pooled_projection_dim=CLIP_L,
        guidance_embeds=has_guidance,
    ).eval()
    parts |= {
        "transformer": toys.louder(transformer, 2.0),
        "vae": _vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        "text_encoder": _clip(parts["tokenizer"]),
    }
    return (diffusers.FluxFillPipeline if beside else diffusers.FluxPipeline)(**parts)


def _unet(widths: tuple[int, int], context: int, *, in_channels: int, linear: bool, **config: Any) -> Any:
    if not linear:
        config |= {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    heads = tuple(width // 64 for width in widths) if linear else 8
    return toys.unet(
        context,
        in_channels=in_channels,
        linear=linear,
        norm_num_groups=32,
        block_out_channels=widths,
        attention_head_dim=heads,
        **config,
    )


def _vae(latent_channels: int, **config: Any) -> Any:
    return toys.vae(latent_channels, norm_num_groups=32, block_out_channels=(32, 32, 64, 64), **config)


def _clip(tokenizer: Any, width: int = CLIP_L, **config: Any) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return toys.clip(tokenizer, width, num_attention_heads=width // 64, **ids | config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd15": lambda: _sd(linear=False),
    "sd15-inpaint": lambda: _sd(linear=False, in_channels=9),
    "sd21": lambda: _sd(linear=True),
    "sdxl": _sdxl,
    "sdxl-inpaint": lambda: _sdxl(in_channels=9),
    "sdxl-refiner": lambda: _sdxl(is_refiner=True),
    "sd3": _sd3,
    "sd35": lambda: _sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux-dev": _flux,
    "flux-schnell": lambda: _flux(has_guidance=False),
    "flux-fill": lambda: _flux(beside=16 + 64),
}
