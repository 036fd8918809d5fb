"""Names and layouts of Stable Diffusion 3's weights: from diffusers' folders to DiffusionKit's modules.

DiffusionKit reads the single files of its own repositories; people have the folders that every other engine reads.
Convolutions in MLX have their channels last: [out, height, width, in].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Arrays = dict[str, Any]

# Of the whole denoiser, by the beginning of a name; the blocks follow below.
_DENOISER = {
    "pos_embed.proj.": "x_embedder.proj.",
    "pos_embed.pos_embed": "x_pos_embedder.pos_embed.weight",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.layers.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.layers.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.layers.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.layers.2.",
    "context_embedder.": "context_embedder.",
    "norm_out.linear.": "final_layer.adaLN_modulation.layers.1.",
    "proj_out.": "final_layer.linear.",
}
_BLOCK = {
    "norm1.linear.": "image_transformer_block.adaLN_modulation.layers.1.",
    "norm1_context.linear.": "text_transformer_block.adaLN_modulation.layers.1.",
    "attn.to_q.": "image_transformer_block.attn.q_proj.",
    "attn.to_k.": "image_transformer_block.attn.k_proj.",
    "attn.to_v.": "image_transformer_block.attn.v_proj.",
    "attn.to_out.0.": "image_transformer_block.attn.o_proj.",
    "attn.add_q_proj.": "text_transformer_block.attn.q_proj.",
    "attn.add_k_proj.": "text_transformer_block.attn.k_proj.",
    "attn.add_v_proj.": "text_transformer_block.attn.v_proj.",
    "attn.to_add_out.": "text_transformer_block.attn.o_proj.",
    "attn.norm_q.": "image_transformer_block.qk_norm.q_norm.",
    "attn.norm_k.": "image_transformer_block.qk_norm.k_norm.",
    "attn.norm_added_q.": "text_transformer_block.qk_norm.q_norm.",
    "attn.norm_added_k.": "text_transformer_block.qk_norm.k_norm.",
    "ff.net.0.proj.": "image_transformer_block.mlp.fc1.",
    "ff.net.2.": "image_transformer_block.mlp.fc2.",
    "ff_context.net.0.proj.": "text_transformer_block.mlp.fc1.",
    "ff_context.net.2.": "text_transformer_block.mlp.fc2.",
}
_VAE = {
    "mid_block.resnets.0.": "mid_blocks.0.",
    "mid_block.attentions.0.": "mid_blocks.1.",
    "mid_block.resnets.1.": "mid_blocks.2.",
    ".downsamplers.0.conv.": ".downsample.",
    ".upsamplers.0.conv.": ".upsample.",
    "to_q.": "query_proj.",
    "to_k.": "key_proj.",
    "to_v.": "value_proj.",
    "to_out.0.": "out_proj.",
}
_CONVOLUTION = 4


def read(folder: Path) -> Arrays:
    """Every array of the safetensors files in a folder; MLX reads them when they are needed."""
    import mlx.core as mx

    found: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(mx.load(str(path)))
    return found


def denoiser(arrays: Mapping[str, Any], *, n_blocks: int) -> Arrays:
    """`SD3Transformer2DModel`'s arrays as `MMDiT`'s. Raises KeyError for a name that SD3 does not have."""
    made: Arrays = {}
    for name, array in arrays.items():
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
        if block is None:
            mine = _renamed(name, _DENOISER)
        else:
            mine = f"multimodal_transformer_blocks.{block[1]}.{_renamed(block[2], _BLOCK)}"
        is_last_context = name.startswith(f"transformer_blocks.{n_blocks - 1}.norm1_context.linear.")
        if is_last_context or name.startswith("norm_out.linear."):
            # diffusers keeps these two as (scale, shift), the checkpoint's authors as (shift, scale).
            made[mine] = _halves_swapped(array)
        elif name == "pos_embed.pos_embed":
            made[mine] = array[0]
        elif array.ndim == _CONVOLUTION:
            made[mine] = array.transpose(0, 2, 3, 1)
        else:
            made[mine] = array
    return made


def vae(arrays: Mapping[str, Any], part: str, *, n_levels: int) -> Arrays:
    """The part (encoder or decoder) of `AutoencoderKL`'s arrays as `VAEEncoder`'s or `VAEDecoder`'s."""
    made: Arrays = {}
    for name, array in arrays.items():
        if not name.startswith(f"{part}."):
            continue
        mine = name.removeprefix(f"{part}.")
        for theirs, ours in _VAE.items():
            mine = mine.replace(theirs, ours)
        level = re.match(r"up_blocks\.(\d+)\.", mine)
        if level is not None:  # counted from the other end
            mine = f"up_blocks.{n_levels - 1 - int(level[1])}.{mine[level.end() :]}"
        if ".conv_shortcut." in mine and array.ndim == _CONVOLUTION:
            made[mine] = array[:, :, 0, 0]
        else:
            made[mine] = array.transpose(0, 2, 3, 1) if array.ndim == _CONVOLUTION else array
    return made


def t5(arrays: Mapping[str, Any]) -> Arrays:
    """With T5's table of words under each of its names; files hold it once."""
    table = arrays["shared.weight"] if "shared.weight" in arrays else arrays["encoder.embed_tokens.weight"]
    return {**arrays, "shared.weight": table, "encoder.embed_tokens.weight": table}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise KeyError(f"{name} is not known of Stable Diffusion 3")


def _halves_swapped(array: Any) -> Any:
    import mlx.core as mx

    first, second = mx.split(array, 2, axis=0)
    return mx.concatenate([second, first], axis=0)
