"""Text encoders in a single file: CLIP in transformers' names or in OpenCLIP's, and T5."""

from __future__ import annotations

import re
from typing import Any

from sdfleet.catalog.single_file.pieces import Part, Piece, Shapes, count, shape_at, split_rows
from sdfleet.errors import BrokenCheckpoint

# CLIP-L, -H, -G and T5 v1.1 XXL all have heads of this width.
_HEAD_WIDTH = 64
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_RESBLOCK_LAYERS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_OPEN_CLIP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_PROJECTION = "text_projection.weight"


def read_clip(shapes: Shapes, *, act: str, is_projected: bool) -> Part:
    """A CLIP in transformers' names, with or without `text_model.` in front.

    act: `quick_gelu` for OpenAI's, `gelu` for OpenCLIP's. is_projected: as the checkpoint's family takes it; a file
    without a projection gets one that changes nothing, as SD3's authors have it for CLIP-L.
    """
    prefix = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
    table = shape_at(shapes, f"{prefix}embeddings.token_embedding.weight", 2)
    pieces = {
        name.removeprefix(prefix): Piece(source=name)
        for name in shapes
        if name.startswith((f"{prefix}embeddings.", f"{prefix}encoder.", f"{prefix}final_layer_norm."))
    }
    pieces.pop("embeddings.position_ids", None)
    projected_width = table[1]
    if is_projected:
        has_projection = _PROJECTION in shapes
        pieces[_PROJECTION] = (
            Piece(source=_PROJECTION)
            if has_projection
            else Piece(source=f"{prefix}embeddings.token_embedding.weight", then="identity")
        )
        projected_width = shape_at(shapes, _PROJECTION, 2)[0] if has_projection else projected_width
    return _clip(
        shapes,
        pieces,
        table=table,
        n_layers=count(shapes, f"{prefix}encoder.layers."),
        fc1=f"{prefix}encoder.layers.0.mlp.fc1.weight",
        positions=f"{prefix}embeddings.position_embedding.weight",
        act=act,
        projected_width=projected_width if is_projected else None,
    )


def read_open_clip(shapes: Shapes, *, is_projected: bool, without_last: bool) -> Part:
    """An OpenCLIP text encoder in its own names. without_last: SD 2.x reads the layer before the last."""
    n_layers = count(shapes, "transformer.resblocks.") - without_last
    table = shape_at(shapes, "token_embedding.weight", 2)
    pieces = {target: Piece(source=name) for name, target in _OPEN_CLIP.items() if name in shapes}
    for name in shapes:
        match = _RESBLOCK.fullmatch(name)
        if match is None or int(match[1]) >= n_layers:
            continue
        layer = f"encoder.layers.{match[1]}"
        if match[2].startswith("attn.in_proj_"):
            kind = match[2].removeprefix("attn.in_proj_")
            names = [f"{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            pieces |= split_rows(name, shapes, [table[1]] * 2, names)
        else:
            stem, _, kind = match[2].rpartition(".")
            if stem in _RESBLOCK_LAYERS:
                pieces[f"{layer}.{_RESBLOCK_LAYERS[stem]}.{kind}"] = Piece(source=name)
    projected_width = None
    if is_projected:
        projected_width = shape_at(shapes, "text_projection", 2)[1]
        pieces[_PROJECTION] = Piece(source="text_projection", then="transposed")
    return _clip(
        shapes,
        pieces,
        table=table,
        n_layers=n_layers,
        fc1="transformer.resblocks.0.mlp.c_fc.weight",
        positions="positional_embedding",
        act="gelu",
        projected_width=projected_width,
    )


def _clip(
    shapes: Shapes,
    pieces: dict[str, Piece],
    *,
    table: tuple[int, ...],
    n_layers: int,
    fc1: str,
    positions: str,
    act: str,
    projected_width: int | None,
) -> Part:
    if table[1] % _HEAD_WIDTH or not n_layers:
        raise BrokenCheckpoint(f"the text encoder of {n_layers} layers is {table[1]} wide, which is no CLIP's width")
    class_name = "CLIPTextModel" if projected_width is None else "CLIPTextModelWithProjection"
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": "clip_text_model",
        "vocab_size": table[0],
        "hidden_size": table[1],
        "intermediate_size": shape_at(shapes, fc1, 2)[0],
        "num_hidden_layers": n_layers,
        "num_attention_heads": table[1] // _HEAD_WIDTH,
        "max_position_embeddings": shape_at(shapes, positions, 2)[0],
        "hidden_act": act,
        "projection_dim": projected_width or table[1],
        # As the published configs say, and wrong: the begin and end marks have the two highest ids.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    if projected_width is not None:
        pieces = {name if name == _PROJECTION else f"text_model.{name}": piece for name, piece in pieces.items()}
    return Part(class_name=class_name, config=config, pieces=pieces)


def read_t5(shapes: Shapes) -> Part:
    """The encoder of a T5 v1.1, in transformers' names."""
    table = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    vocab_size, width = shape_at(shapes, table, 2)
    queries = shape_at(shapes, "encoder.block.0.layer.0.SelfAttention.q.weight", 2)
    n_buckets, n_heads = shape_at(shapes, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)
    config: dict[str, Any] = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocab_size,
        "d_model": width,
        "d_ff": shape_at(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        "d_kv": queries[0] // n_heads,
        "num_heads": n_heads,
        "num_layers": count(shapes, "encoder.block."),
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": n_buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    pieces = {name: Piece(source=name) for name in shapes if name.startswith("encoder.") or name == "shared.weight"}
    if table == "shared.weight":
        pieces.pop("encoder.embed_tokens.weight", None)
    return Part(class_name="T5EncoderModel", config=config, pieces=pieces)
