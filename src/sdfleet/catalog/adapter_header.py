"""What a LoRA or an embedding is, from its tensors' names and shapes alone; no weight is read.

A LoRA's tensors are named after the layers that it changes. Three programs left three ways to write that:

    diffusers  unet.down_blocks.0.attentions.0.proj_in.lora.down.weight, transformer.….lora_A.weight
    PEFT       base_model.model.….lora_A.weight, alpha in adapter_config.json beside the file
    kohya      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, and .alpha
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdfleet.catalog.headers import Header, read_json
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

if TYPE_CHECKING:
    from sdfleet.catalog.cards import Family

Kind = Literal["lora", "embedding"]
Layout = Literal["diffusers", "PEFT", "kohya"]
Side = Literal["down", "up", "mid", "alpha"]

# Beside PEFT's files, which say nothing of their alpha themselves.
PEFT_CONFIG = "adapter_config.json"
# In the header of files that diffusers saved.
_DIFFUSERS_CONFIG = "lora_adapter_metadata"

_TENSOR = re.compile(
    r"""(?P<layer>.+?)
        (?: [._]lora_(?P<letter>[AB])(?:\.\w+)?\.weight
          | [._]lora_(?P<way>down|up|mid)(?:\.\w+)?\.weight
          | [._]lora(?:_linear_layer)?\.(?P<dotted>down|up)\.weight
          | \.(?P<alpha>alpha)
        )""",
    re.VERBOSE,
)
_SIDES: Mapping[str, Side] = {"A": "down", "B": "up", "down": "down", "up": "up", "mid": "mid", "alpha": "alpha"}
# Other ways to change a layer, by a part of a tensor's name, and what people call them.
_NOT_SERVED = (
    (".hada_w1_a", "a LoHa"),
    (".lokr_w1", "a LoKr"),
    (".lokr_w2", "a LoKr"),
    (".dora_scale", "a DoRA"),
    (".lora_magnitude_vector", "a DoRA"),
    (".oft_", "an OFT"),
    (".on_input", "an IA3"),
    (".vera_lambda", "a VeRA"),
)
_DENOISER = (
    r"(?:unet|transformer|diffusion_model|model\.diffusion_model)\.|lora_(?:unet|transformer|prior_unet)_|lycoris_"
)
_TEXT = (
    r"(?:lora_te(?P<kohya>[123]?)_|text_encoder(?:_(?P<dotted>[23]))?\."
    r"|text_encoders\.(?P<comfy>clip_l|clip_g|t5xxl)\.(?:transformer\.)?)"
)
_WHERE = re.compile(rf"(?:base_model\.model\.)?(?:{_TEXT}|{_DENOISER})?")
_COMFY = {"clip_l": 1, "clip_g": 2, "t5xxl": 3}

# Width of the words' states that attention in a UNet looks at.
_FAMILY_BY_WORDS: Mapping[int, Family] = {768: "sd", 1024: "sd", 2048: "sdxl", 1280: "sdxl"}
# Rows of the first layer in a single block, in widths: queries, keys, values, and a feed-forward, plain or gated.
_FAMILY_BY_ROWS: Mapping[int, Family] = {7: "flux", 9: "flux2"}
# Keys of embeddings that are made for both of SDXL's encoders.
_BOTH_CLIPS = frozenset(("clip_l", "clip_g"))
_MOST_VECTORS = 255


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a LoRA belongs. text_encoder: 0 for the denoiser, else 1, 2, 3. layer: as the file calls it."""

    text_encoder: int
    layer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What one file is. family: None where the names do not tell it; whether it fits is then seen when it is used.

    rank: the largest of a LoRA. widths: of an embedding, by the encoder (`clip_l`, `clip_g`, or `` for any one).
    n_vectors: of an embedding. word: what an embedding is called inside, like `<cat-toy>`; empty where it is not.
    """

    kind: Kind
    layout: Layout | None = None
    family: Family | None = None
    n_layers: int = 0
    rank: int = 0
    widths: Mapping[str, int] | None = None
    n_vectors: int = 0
    word: str = ""
    is_for_text: bool = False


def part_of(name: str) -> tuple[Place, Side] | None:
    """Where a tensor belongs and which part of the change it is; None for a tensor of something else.

    >>> part_of("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight")
    (Place(text_encoder=2, layer='text_model_encoder_layers_0_mlp_fc1'), 'down')
    >>> part_of("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight")
    (Place(text_encoder=0, layer='down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'), 'up')
    >>> part_of("first_stage_model.decoder.conv_in.weight") is None
    True
    """
    found = _TENSOR.fullmatch(name)
    if found is None:
        return None
    layer = found["layer"].replace(".processor.", ".")
    where = _WHERE.match(layer)
    assert where is not None  # every part of it may be absent
    number = 0
    if where["comfy"]:
        number = _COMFY[where["comfy"]]
    elif where["kohya"] is not None or "text_encoder" in where[0]:
        number = int(where["kohya"] or where["dotted"] or 1)
    side = _SIDES[found["letter"] or found["way"] or found["dotted"] or found["alpha"]]
    return Place(text_encoder=number, layer=layer[where.end() :]), side


def places_of(names: Iterable[str]) -> list[Place]:
    """The layers that a LoRA changes, as its file calls them."""
    parts = (part_of(name) for name in names)
    return list(dict.fromkeys(part[0] for part in parts if part is not None and part[1] != "alpha"))


def read_facts(header: Header, *, label: str) -> AdapterFacts | None:
    """What a file with this header is; None when it is neither a LoRA nor an embedding.

    Raises UnsupportedByModel for other kinds of adapters, by their name, and BrokenCheckpoint for half a LoRA.
    """
    refuse_other_kinds(header, label=label)
    embedding = _embedding(header)
    if embedding is not None:
        return embedding
    parts = {name: part for name in header.shapes if (part := part_of(name)) is not None}
    sides = {place: set[Side]() for place, _ in parts.values()}
    for place, side in parts.values():
        sides[place].add(side)
    whole = [place for place, found in sides.items() if {"down", "up"} <= found]
    halves = [place.layer for place, found in sides.items() if len({"down", "up"} & found) == 1]
    if halves:
        raise BrokenCheckpoint(
            f"{label} has half of what changes {halves[0]!r}", hint="copy or download this file again"
        )
    if not whole:
        return None
    ranks = [header.shapes[name][0] for name, (_, side) in parts.items() if side == "down"]
    return AdapterFacts(
        kind="lora",
        layout=_layout(header),
        family=_family(header, parts),
        n_layers=len(whole),
        rank=max(ranks),
        is_for_text=any(place.text_encoder for place in whole),
    )


def refuse_other_kinds(header: Header, *, label: str) -> None:
    """Raises UnsupportedByModel for a LoHa, a LoKr, a DoRA and their like."""
    for mark, what in _NOT_SERVED:
        if any(mark in name for name in header.shapes):
            raise UnsupportedByModel(
                f"{label} is {what}, which changes layers in another way than a LoRA",
                hint="get it as a plain LoRA, or merge it into its checkpoint with the program that made it",
            )


def read_alphas(file: Path, header: Header) -> Mapping[str, float]:
    """Alpha where it is not among the tensors: by flat layer, "" for all others. Raises BrokenCheckpoint.

    PEFT writes adapter_config.json beside the file, diffusers the same into the file's own header.
    """
    config: Mapping[str, object] = {}
    if _DIFFUSERS_CONFIG in header.metadata:
        try:
            told = json.loads(header.metadata[_DIFFUSERS_CONFIG])
        except ValueError as exc:
            raise BrokenCheckpoint(f"{file}: what it says of itself is not JSON", hint="get it again") from exc
        config = told if isinstance(told, dict) else {}
    elif (file.parent / PEFT_CONFIG).is_file():
        config = read_json(file.parent / PEFT_CONFIG)
        if config.get("use_dora"):
            raise UnsupportedByModel(f"{file} is a DoRA, which is not served", hint="get it as a plain LoRA")
    alphas: dict[str, float] = {}
    for key, value in config.items():
        *above, name = key.split(".")
        within = f"{above[0]}." if above else ""
        if name == "lora_alpha" and isinstance(value, int | float):
            alphas[within] = float(value)
        elif name == "alpha_pattern" and isinstance(value, dict):
            alphas |= {f"{within}{layer}": float(alpha) for layer, alpha in value.items()}
    if config.get("use_rslora") or any(value is True and key.endswith("use_rslora") for key, value in config.items()):
        raise UnsupportedByModel(f"{file} is a rank-stabilised LoRA", hint="get it with alpha divided by rank")
    return alphas


def _embedding(header: Header) -> AdapterFacts | None:
    """`emb_params` of the web UI, both of SDXL's, or the one word of diffusers' file."""
    shapes = dict(header.shapes)
    if shapes.keys() == _BOTH_CLIPS and all(len(shape) == 2 for shape in shapes.values()):
        widths = {name: shape[1] for name, shape in shapes.items()}
        is_sdxl = widths == {"clip_l": 768, "clip_g": 1280}
        return AdapterFacts(
            kind="embedding", family="sdxl" if is_sdxl else None, widths=widths, n_vectors=_n_vectors(shapes["clip_l"])
        )
    if len(shapes) != 1:
        return None
    ((name, shape),) = shapes.items()
    is_word = name in {"emb_params", "*"} or re.fullmatch(r"<[^<>\s]+>|[\w-]+", name) is not None
    if not is_word or len(shape) not in {1, 2} or not 1 <= _n_vectors(shape) <= _MOST_VECTORS:
        return None
    width = shape[-1]
    return AdapterFacts(
        kind="embedding",
        family=_FAMILY_BY_WORDS.get(width) if width in {768, 1024} else None,
        widths={"": width},
        n_vectors=_n_vectors(shape),
        word="" if name in {"emb_params", "*"} else name,
    )


def _n_vectors(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) == 1 else shape[0]


def _layout(header: Header) -> Layout:
    names = list(header.shapes)
    if any(name.startswith(("lora_", "lycoris_")) for name in names):
        return "kohya"
    return "PEFT" if any(name.startswith("base_model.model.") for name in names) else "diffusers"


def _family(header: Header, parts: Mapping[str, tuple[Place, Side]]) -> Family | None:
    """Told by names that only one family has, and by the width of the words a UNet attends to."""
    layers = {place.layer.replace(".", "_") for place, _ in parts.values() if not place.text_encoder}
    if any("joint_blocks_" in layer for layer in layers):
        return "sd3"
    if any("to_qkv_mlp_proj" in layer for layer in layers):
        return "flux2"
    if any(re.search(r"(?:^|_)layers_\d+_attention_", layer) for layer in layers):
        return "zimage"
    for name, (place, side) in parts.items():
        shape, layer = header.shapes[name], place.layer.replace(".", "_")
        if place.text_encoder:
            continue
        if side == "down" and layer.endswith(("attn2_to_k", "attn2_to_v")) and "blocks_" in layer:
            family = _FAMILY_BY_WORDS.get(shape[1])
            if family is not None and re.search(r"(?:down|up|mid|input|output|middle)_block", layer):
                return family
        if side == "up" and re.search(r"single_blocks_\d+_linear1$", layer):
            width = next(
                (header.shapes[other][1] for other, (its, way) in parts.items() if its == place and way == "down"), 0
            )
            return _FAMILY_BY_ROWS.get(shape[0] // width if width else 0)
    if any(re.search(r"single_transformer_blocks_\d+_(?:attn_to_[qkv]|proj_|norm_)", layer) for layer in layers):
        return "flux"
    return None
