"""The transformer of FLUX.1 in its authors' names (Black Forest Labs, `double_blocks` and `single_blocks`)."""

from __future__ import annotations

import re
from typing import Any

from sdfleet.catalog.single_file.pieces import Part, Piece, Shapes, count, shape_at, split_rows
from sdfleet.errors import BrokenCheckpoint

_HEAD_WIDTH = 128
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_FINAL = "final_layer.adaLN_modulation.1"
_DOUBLE = re.compile(r"double_blocks\.(\d+)\.(.+)")
_SINGLE = re.compile(r"single_blocks\.(\d+)\.(.+)")
OF_DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
QKV_OF_DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
}
OF_SINGLE = {
    "modulation.lin": "norm.linear", "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
}  # fmt: skip
QKV_AND_MLP = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]


def read_flux(shapes: Shapes) -> Part:
    """The transformer whose tensors these are. Raises BrokenCheckpoint."""
    width, in_channels = shape_at(shapes, "img_in.weight", 2)
    if width % _HEAD_WIDTH:
        raise BrokenCheckpoint(f"the transformer is {width} wide, which is no FLUX.1's width")
    pieces: dict[str, Piece] = {}
    for name in shapes:
        pieces |= _translated(name, shapes, width=width)
    config: dict[str, Any] = {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": shape_at(shapes, "final_layer.linear.weight", 2)[0],
        "num_layers": count(shapes, "double_blocks."),
        "num_single_layers": count(shapes, "single_blocks."),
        "attention_head_dim": _HEAD_WIDTH,
        "num_attention_heads": width // _HEAD_WIDTH,
        "joint_attention_dim": shape_at(shapes, "txt_in.weight", 2)[1],
        "pooled_projection_dim": shape_at(shapes, "vector_in.in_layer.weight", 2)[1],
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }
    return Part(class_name="FluxTransformer2DModel", config=config, pieces=pieces)


def _translated(name: str, shapes: Shapes, *, width: int) -> dict[str, Piece]:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return {f"{TOP[stem]}.{kind}": Piece(source=name)}
    if stem == _FINAL:
        # Shift and scale there, scale and shift here.
        return {f"norm_out.linear.{kind}": Piece(source=name, then="halves_swapped")}
    kind = "weight" if kind == "scale" else kind
    if (double := _DOUBLE.fullmatch(stem)) is not None:
        block, layer = f"transformer_blocks.{double[1]}", double[2]
        if layer in QKV_OF_DOUBLE:
            return split_rows(
                name, shapes, [width] * 2, [f"{block}.{target}.{kind}" for target in QKV_OF_DOUBLE[layer]]
            )
        return {f"{block}.{OF_DOUBLE[layer]}.{kind}": Piece(source=name)} if layer in OF_DOUBLE else {}
    if (single := _SINGLE.fullmatch(stem)) is not None:
        block, layer = f"single_transformer_blocks.{single[1]}", single[2]
        if layer == "linear1":
            return split_rows(name, shapes, [width] * 3, [f"{block}.{target}.{kind}" for target in QKV_AND_MLP])
        return {f"{block}.{OF_SINGLE[layer]}.{kind}": Piece(source=name)} if layer in OF_SINGLE else {}
    return {}
