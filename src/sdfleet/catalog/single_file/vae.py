"""The picture codec in its authors' names (CompVis latent-diffusion; FLUX.1's is the same without two convolutions)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdfleet.catalog.single_file.pieces import Part, Piece, Shapes, count, shape_at

_PLACES = (
    (r"(encoder|decoder)\.norm_out", r"\1.conv_norm_out"),
    (r"(encoder|decoder)\.conv_(in|out)", r"\1.conv_\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.norm", r"\1.mid_block.attentions.0.group_norm"),
    (r"(encoder|decoder)\.mid\.attn_1\.([qkv])", r"\1.mid_block.attentions.0.to_\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out", r"\1.mid_block.attentions.0.to_out.0"),
    (r"(post_)?quant_conv", r"\g<0>"),
)
_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)\.(\d+)\.(?:block\.(\d+)|(down|up)sample)\.(\w+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.block_([12])\.(\w+)")


def read_vae(shapes: Shapes, *, told: Mapping[str, Any]) -> Part:
    """The codec whose tensors these are. Raises BrokenCheckpoint.

    told: settings that no file says, such as how its latents are scaled.
    """
    n_levels = count(shapes, "encoder.down.")
    n_resnets = count(shapes, "encoder.down.0.block.")
    pieces = {}
    for name, shape in shapes.items():
        target = _translated(name, n_levels)
        if target is not None:
            is_matrix = ".attentions." in target and name.endswith(".weight") and len(shape) > 2
            pieces[target] = Piece(source=name, then="matrix" if is_matrix else "as_it_is")
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": shape_at(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_at(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": shape_at(shapes, "decoder.conv_in.weight", 4)[1],
        "layers_per_block": n_resnets,
        "block_out_channels": [
            shape_at(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(n_levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * n_levels,
        "up_block_types": ["UpDecoderBlock2D"] * n_levels,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        **told,
    }
    return Part(class_name="AutoencoderKL", config=config, pieces=pieces)


def _translated(name: str, n_levels: int) -> str | None:
    stem, _, kind = name.rpartition(".")
    if (middle := _MIDDLE.fullmatch(stem)) is not None:
        side, number, layer = middle.groups()
        return f"{side}.mid_block.resnets.{int(number) - 1}.{_layer(layer)}.{kind}"
    if (block := _BLOCK.fullmatch(stem)) is not None:
        side, way, level, number, sampler, layer = block.groups()
        # The decoder's levels are counted from the full size there, from the smallest here.
        i = int(level) if way == "down" else n_levels - 1 - int(level)
        where = f"{way}samplers.0" if sampler else f"resnets.{number}"
        return f"{side}.{way}_blocks.{i}.{where}.{_layer(layer)}.{kind}"
    for pattern, target in _PLACES:
        if re.fullmatch(pattern, stem):
            return f"{re.sub(pattern, target, stem)}.{kind}"
    return None


def _layer(name: str) -> str:
    return "conv_shortcut" if name == "nin_shortcut" else name
