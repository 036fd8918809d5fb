"""What LoRA files call the layers of a network: by its own names, by its authors', with dots or underscores.

Every layer is looked up under one flat name, dots as underscores, which is how kohya's files have them. Where the
authors keep several layers as one (`qkv`), a name stands for a stack of layers, one under the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sdfleet.catalog.single_file import flux, sd3, unet

Layout = dict[str, "Stack"]

# FLUX.2 by Black Forest Labs: as FLUX.1's, but for these.
_FLUX2_OF_DOUBLE = {
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
}  # fmt: skip
_FLUX2_OF_SINGLE = {"linear1": ["attn.to_qkv_mlp_proj"], "linear2": ["attn.to_out"]}
_FLUX2_TOP = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
}  # fmt: skip
_FINAL = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
# Z-Image by Tongyi-MAI: the same but for these.
_ZIMAGE_TOP = {
    "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}  # fmt: skip
_QKV = ("to_q", "to_k", "to_v")
# diffusers' first LoRA files named the text encoder's layers as the UNet's.
_FIRST_TEXT_NAMES = {"self_attn.q_proj": "to_q", "self_attn.k_proj": "to_k", "self_attn.v_proj": "to_v",
                     "self_attn.out_proj": "to_out"}  # fmt: skip
_NUMBERED = re.compile(r"(\w+)\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers that one name stands for, in the order of their rows. is_swapped: its halves change places here."""

    layers: tuple[str, ...]
    is_swapped: bool = False


def flat(name: str) -> str:
    """The name with underscores for dots, without what transformers wraps text encoders in.

    >>> flat("text_model.encoder.layers.0.mlp.fc1"), flat("text_model_encoder_layers_0_mlp_fc1")
    ('encoder_layers_0_mlp_fc1', 'encoder_layers_0_mlp_fc1')
    """
    name = name.replace(".", "_")
    for wrapping in ("text_model_", "model_"):
        name = name.removeprefix(wrapping)
    return name


def names_of(layers: Iterable[str]) -> Layout:
    """Every flat name that the layers of one component are known by.

    >>> names_of(["down_blocks.0.resnets.1.conv1", "mid_block.resnets.0.conv1"])["input_blocks_2_0_in_layers_2"].layers
    ('down_blocks.0.resnets.1.conv1',)
    >>> len(names_of([f"layers.0.attention.to_{part}" for part in "qkv"])["layers_0_attention_qkv"].layers)
    3
    """
    own = dict.fromkeys(layers)
    found: Layout = {}
    for name, stack in _by_authors(own):
        if all(layer in own for layer in stack.layers):
            found.setdefault(flat(name), stack)
    for layer in own:
        for name in _also(layer):
            found.setdefault(flat(name), Stack((layer,)))
    # Last, so that a layer's own name is never taken by another's.
    return found | {flat(layer): Stack((layer,)) for layer in own}


def _also(layer: str) -> Iterator[str]:
    if layer.endswith(".to_out.0"):
        yield layer.removesuffix(".0")
    if layer.endswith(".attention.to_out.0"):
        yield layer.removesuffix("to_out.0") + "out"
    for ending, first in _FIRST_TEXT_NAMES.items():
        if layer.endswith(ending):
            yield layer.removesuffix(ending) + f"self_attn.{first}"


def _by_authors(own: Mapping[str, None]) -> Iterator[tuple[str, Stack]]:
    if any(name.startswith("mid_block.") for name in own):
        yield from _of_unet(own)
    elif any(".attn.to_qkv_mlp_proj" in name for name in own):
        yield from _of_flux(own, _FLUX2_TOP, _FLUX2_OF_DOUBLE, _FLUX2_OF_SINGLE)
    elif any(name.startswith("single_transformer_blocks.") for name in own):
        single = {name: [target] for name, target in flux.OF_SINGLE.items()} | {"linear1": flux.QKV_AND_MLP}
        yield from _of_flux(own, flux.TOP, flux.OF_DOUBLE, single)
    elif any(name.startswith("transformer_blocks.") for name in own):
        yield from _of_sd3(own)
    elif any(".attention.to_q" in name for name in own):
        yield from _singly(_ZIMAGE_TOP)
        for name in own:
            if name.endswith(".attention.to_q"):
                place = name.removesuffix("to_q")
                yield f"{place}qkv", Stack(tuple(place + part for part in _QKV))


def _singly(names: Mapping[str, str]) -> Iterator[tuple[str, Stack]]:
    for name, layer in names.items():
        yield name, Stack((layer,))


def _numbers(own: Iterable[str], block: str) -> list[str]:
    found = (match for name in own if (match := _NUMBERED.fullmatch(name)) is not None and match[1] == block)
    return list(dict.fromkeys(match[2] for match in found))


def _of_flux(
    own: Mapping[str, None], top: Mapping[str, str], double: Mapping[str, str], single: Mapping[str, list[str]]
) -> Iterator[tuple[str, Stack]]:
    yield from _singly(top)
    for name, layer in _FINAL.items():
        yield name, Stack((layer,), is_swapped=True)
    for number in _numbers(own, "transformer_blocks"):
        there, here = f"double_blocks.{number}", f"transformer_blocks.{number}"
        yield from _singly({f"{there}.{name}": f"{here}.{layer}" for name, layer in double.items()})
        for name, layers in flux.QKV_OF_DOUBLE.items():
            yield f"{there}.{name}", Stack(tuple(f"{here}.{layer}" for layer in layers))
    for number in _numbers(own, "single_transformer_blocks"):
        for name, layers in single.items():
            stack = tuple(f"single_transformer_blocks.{number}.{layer}" for layer in layers)
            yield f"single_blocks.{number}.{name}", Stack(stack)


def _of_sd3(own: Mapping[str, None]) -> Iterator[tuple[str, Stack]]:
    yield from _singly(sd3.TOP)
    for name, layer in _FINAL.items():
        yield name, Stack((layer,), is_swapped=True)
    numbers = _numbers(own, "transformer_blocks")
    for number in numbers:
        here = f"transformer_blocks.{number}"
        for side, layers in sd3.LAYERS.items():
            for name, layer in layers.items():
                # See sd3.py: the last block's words are never changed.
                is_swapped = (side, name, number) == ("context", "adaLN_modulation.1", numbers[-1])
                yield f"joint_blocks.{number}.{side}_block.{name}", Stack((f"{here}.{layer}",), is_swapped)
        for (side, name), parts in sd3.QKV.items():
            yield f"joint_blocks.{number}.{side}_block.{name}", Stack(tuple(f"{here}.{part}" for part in parts))


def _of_unet(own: Mapping[str, None]) -> Iterator[tuple[str, Stack]]:
    """Blocks are numbered one after the other there, and by resolution here; see catalog/single_file/unet.py."""
    yield from _singly(unet.TOP)
    n_down = 1 + max(int(match[1]) for name in own if (match := re.match(r"down_blocks\.\d+\.resnets\.(\d+)", name)))
    places: dict[str, tuple[str, ...]] = {
              "mid_block.resnets.0": ("middle_block.0",), "mid_block.attentions.0": ("middle_block.1",),
              "mid_block.resnets.1": ("middle_block.2",)}  # fmt: skip
    for name in own:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", name):
            way, block, kind, number = match[1], int(match[2]), match[3], int(match[4])
            if way == "down":
                first = 1 + block * (n_down + 1)
                at = first + n_down if kind == "downsamplers" else first + number
                places[match[0]] = (f"input_blocks.{at}.{1 if kind == 'attentions' else 0}",)
            else:
                first = block * (n_down + 1)
                at = first + n_down if kind == "upsamplers" else first + number
                # An upsampler goes behind the resnet, or behind its attention.
                within = {"resnets": (0,), "attentions": (1,), "upsamplers": (1, 2)}[kind]
                places[match[0]] = tuple(f"output_blocks.{at}.{each}" for each in within)
    inner = {layer: name for name, layer in unet.RESNET.items()}
    for name in own:
        for here, theres in places.items():
            if not name.startswith(f"{here}."):
                continue
            rest = name.removeprefix(f"{here}.")
            if ".resnets." in here:
                rest = inner.get(rest, rest)
            elif here.rsplit(".", 2)[1] == "downsamplers":
                rest = "op"
            for there in theres:
                yield f"{there}.{rest}", Stack((name,))
