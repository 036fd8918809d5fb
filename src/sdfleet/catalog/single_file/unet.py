"""The UNet of Stable Diffusion 1.x, 2.x and XL in its authors' names (CompVis, Stability AI; `input_blocks` and so on).

Blocks are numbered one after the other there, and by resolution here; which is which is read off the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sdfleet.catalog.single_file.pieces import Part, Piece, Shapes, count, shape_at
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# The picture's size is told in six numbers, the refiner's in five, as waves of this many channels each.
_WAVES = 256
_HEADS_OF_SD1 = 8
_HEAD_WIDTH = 64


@dataclass(slots=True)
class _Level:
    """One resolution as the file has it; attends: depth of its transformers on the way down and up, 0 for none."""

    widths: list[int] = field(default_factory=list)
    depths_down: list[int] = field(default_factory=list)
    depths_up: list[int] = field(default_factory=list)


def read_unet(shapes: Shapes) -> Part:
    """The UNet whose tensors these are. Raises BrokenCheckpoint and UnsupportedByModel."""
    places: dict[str, str] = dict(TOP)
    levels = _walk_down(shapes, places)
    _walk_up(shapes, levels, places)
    places |= {"middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
               "middle_block.2": "mid_block.resnets.1"}  # fmt: skip
    depth = _depth(shapes, "middle_block.1")
    if not depth:
        raise UnsupportedByModel("the middle of this UNet has no attention", hint="such a network is not served")
    pieces = {target: Piece(source=name) for name in shapes if (target := _translated(name, places)) is not None}
    return Part(class_name="UNet2DConditionModel", config=_config(shapes, levels, mid_depth=depth), pieces=pieces)


def _walk_down(shapes: Shapes, places: dict[str, str]) -> list[_Level]:
    levels = [_Level()]
    for i in range(1, count(shapes, "input_blocks.")):
        here, level = f"input_blocks.{i}", levels[-1]
        target = f"down_blocks.{len(levels) - 1}"
        if f"{here}.0.op.weight" in shapes:
            places[f"{here}.0.op"] = f"{target}.downsamplers.0.conv"
            levels.append(_Level())
            continue
        level.widths.append(shape_at(shapes, f"{here}.0.in_layers.2.weight", 4)[0])
        places[f"{here}.0"] = f"{target}.resnets.{len(level.widths) - 1}"
        places[f"{here}.1"] = f"{target}.attentions.{len(level.widths) - 1}"
        level.depths_down.append(_depth(shapes, f"{here}.1"))
    if not all(level.widths and len(set(level.widths)) == 1 for level in levels):
        raise BrokenCheckpoint("the file's input_blocks are not those of a UNet", hint="copy or download it again")
    return levels


def _walk_up(shapes: Shapes, levels: list[_Level], places: dict[str, str]) -> None:
    i = 0
    for up, level in enumerate(reversed(levels)):
        for j in range(len(level.widths) + 1):
            here, target = f"output_blocks.{i}", f"up_blocks.{up}"
            places[f"{here}.0"] = f"{target}.resnets.{j}"
            places[f"{here}.1"] = f"{target}.attentions.{j}"
            for k in (1, 2):
                # Behind the resnet, or behind its attention.
                places[f"{here}.{k}.conv"] = f"{target}.upsamplers.0.conv"
            level.depths_up.append(_depth(shapes, f"{here}.1"))
            i += 1
    if count(shapes, "output_blocks.") != i:
        raise BrokenCheckpoint(
            f"the file has {count(shapes, 'output_blocks.')} output_blocks where its input_blocks ask for {i}",
            hint="copy or download it again",
        )


def _depth(shapes: Shapes, block: str) -> int:
    return count(shapes, f"{block}.transformer_blocks.")


def _translated(name: str, places: dict[str, str]) -> str | None:
    stem, _, kind = name.rpartition(".")
    if stem in places:
        return f"{places[stem]}.{kind}"
    match = re.match(r"(?:(?:input|output)_blocks\.\d+|middle_block)\.\d+", stem)
    if match is None or match[0] not in places:
        return None
    target, rest = places[match[0]], stem[match.end() + 1 :]
    if ".resnets." in target:
        return f"{target}.{RESNET[rest]}.{kind}" if rest in RESNET else None
    return f"{target}.{rest}.{kind}"


def _config(shapes: Shapes, levels: list[_Level], *, mid_depth: int) -> dict[str, Any]:
    in_channels = shape_at(shapes, "input_blocks.0.0.weight", 4)[1]
    projection = shapes.get("middle_block.1.proj_in.weight", ())
    is_linear = len(projection) == 2
    widths = [level.widths[0] for level in levels]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": in_channels,
        "out_channels": shape_at(shapes, "out.2.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": _one_or_all([len(level.widths) for level in levels]),
        "down_block_types": ["CrossAttnDownBlock2D" if any(x.depths_down) else "DownBlock2D" for x in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if any(x.depths_up) else "UpBlock2D" for x in reversed(levels)],
        "cross_attention_dim": shape_at(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "attention_head_dim": [width // _HEAD_WIDTH for width in widths] if is_linear else _HEADS_OF_SD1,
        "transformer_layers_per_block": _one_or_all(_depths(levels, mid_depth)),
        "norm_num_groups": 32,
        "use_linear_projection": is_linear,
    }
    if "label_emb.0.0.weight" in shapes:
        beside = shape_at(shapes, "label_emb.0.0.weight", 2)[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _WAVES,
            "projection_class_embeddings_input_dim": beside,
        }
    elif any(name.startswith("label_emb.") for name in shapes):
        raise UnsupportedByModel("this UNet is told a class or a noise level beside the words", hint="it is not served")
    return config


def is_refiner(config: dict[str, Any]) -> bool:
    """Whether an XL UNet is the refiner's: told five numbers, and the pooled vector of the encoder it attends to."""
    beside = config.get("projection_class_embeddings_input_dim", 0)
    return bool(beside) and beside - 5 * _WAVES == config["cross_attention_dim"]


def _depths(levels: list[_Level], mid_depth: int) -> list[int]:
    depths = []
    for i, level in enumerate(levels):
        found = {*level.depths_down, *level.depths_up} - {0}
        if i == len(levels) - 1:
            found.add(mid_depth)
        mixed = [d for d in (level.depths_down, level.depths_up) if 0 in d and any(d)]
        if len(found) > 1 or mixed:
            raise UnsupportedByModel(
                "the transformers of this UNet differ within one resolution", hint="such a network is not served"
            )
        depths.append(found.pop() if found else 1)
    return depths


def _one_or_all(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers
