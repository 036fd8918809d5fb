"""The transformer of SD3 and SD3.5 in its authors' names (Stability AI, `joint_blocks`)."""

from __future__ import annotations

import math
import re
from typing import Any

from sdfleet.catalog.single_file.pieces import Part, Piece, Shapes, count, shape_at, split_rows
from sdfleet.errors import BrokenCheckpoint

_HEAD_WIDTH = 64
TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_FINAL = "final_layer.adaLN_modulation.1"
_BLOCK = re.compile(r"joint_blocks\.(\d+)\.(x|context)_block\.(.+)")
LAYERS = {
    "x": {
        "attn.proj": "attn.to_out.0", "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k",
        "attn2.proj": "attn2.to_out.0", "attn2.ln_q": "attn2.norm_q", "attn2.ln_k": "attn2.norm_k",
        "adaLN_modulation.1": "norm1.linear", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    },
    "context": {
        "attn.proj": "attn.to_add_out", "attn.ln_q": "attn.norm_added_q", "attn.ln_k": "attn.norm_added_k",
        "adaLN_modulation.1": "norm1_context.linear", "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}  # fmt: skip
QKV = {
    ("x", "attn.qkv"): ["attn.to_q", "attn.to_k", "attn.to_v"],
    ("x", "attn2.qkv"): ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    ("context", "attn.qkv"): ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
}


def read_sd3(shapes: Shapes) -> Part:
    """The transformer whose tensors these are. Raises BrokenCheckpoint."""
    width, in_channels, patch, _ = shape_at(shapes, "x_embedder.proj.weight", 4)
    n_layers = count(shapes, "joint_blocks.")
    pieces = {"pos_embed.pos_embed": Piece(source="pos_embed")} if "pos_embed" in shapes else {}
    for name in shapes:
        pieces |= _translated(name, shapes, width=width, last=n_layers - 1)
    n_positions = shape_at(shapes, "pos_embed", 3)[1]
    if width % _HEAD_WIDTH or math.isqrt(n_positions) ** 2 != n_positions:
        raise BrokenCheckpoint(f"the transformer is {width} wide with {n_positions} positions, which is no SD3's")
    dual = sorted({int(name.split(".")[1]) for name in shapes if ".x_block.attn2." in name})
    config: dict[str, Any] = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": shape_at(shapes, "final_layer.linear.weight", 2)[0] // patch**2,
        "num_layers": n_layers,
        "attention_head_dim": _HEAD_WIDTH,
        "num_attention_heads": width // _HEAD_WIDTH,
        "joint_attention_dim": shape_at(shapes, "context_embedder.weight", 2)[1],
        "caption_projection_dim": shape_at(shapes, "context_embedder.weight", 2)[0],
        "pooled_projection_dim": shape_at(shapes, "y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": math.isqrt(n_positions),
    }
    if any(name.endswith(".attn.ln_q.weight") for name in shapes):
        config["qk_norm"] = "rms_norm"
    if dual:
        config["dual_attention_layers"] = dual
    return Part(class_name="SD3Transformer2DModel", config=config, pieces=pieces)


def _translated(name: str, shapes: Shapes, *, width: int, last: int) -> dict[str, Piece]:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return {f"{TOP[stem]}.{kind}": Piece(source=name)}
    if stem == _FINAL:
        # Shift and scale there, scale and shift here.
        return {f"norm_out.linear.{kind}": Piece(source=name, then="halves_swapped")}
    match = _BLOCK.fullmatch(stem)
    if match is None:
        return {}
    number, side, layer = match.groups()
    block = f"transformer_blocks.{number}"
    if (side, layer) in QKV:
        return split_rows(name, shapes, [width] * 2, [f"{block}.{target}.{kind}" for target in QKV[side, layer]])
    if layer not in LAYERS[side]:
        return {}
    # The last block's words are only looked at, never changed: two of six numbers, in the other order.
    is_swapped = side == "context" and layer == "adaLN_modulation.1" and int(number) == last
    target = f"{block}.{LAYERS[side][layer]}.{kind}"
    return {target: Piece(source=name, then="halves_swapped" if is_swapped else "as_it_is")}
