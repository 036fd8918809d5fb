"""Checkpoints without a download: a published model's configs, and weights drawn from a seed when they are loaded.

Such a checkpoint is an ordinary folder in the diffusers layout. Its safetensors files have a true header and a hole
where the numbers would be, so that everything that reads headers (what it is, whether it fits) works as ever, and a
model of 24 GB takes some kilobytes on the disk. Who loads tensors asks `is_random` and then takes `draw`.

The speed of such a model is that of the published one; its pictures are noise.
"""

from __future__ import annotations

import json
import math
import string
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from zlib import crc32

import torch
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from sdfleet.engine.networks.choice import own_network
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

if TYPE_CHECKING:
    from sdfleet.catalog.architectures import Architecture, Part

_MARK = "random_seed"
# Weights are cut from one row of normal numbers, each from its own place in it: a copy is 30 times cheaper than a draw.
# A prime, so that no layer's width divides it and no two rows of a matrix are equal; 67 MB while weights are drawn.
_POOL_SIZE = 16_777_213
_INDEX_DTYPES = {"I64": torch.int64, "I32": torch.int32}
_TOKEN_MARKS = ("<|startoftext|>", "<|endoftext|>")
_QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# Qwen3's template for one message, in its least form.
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def write_checkpoint(architecture: Architecture, folder: Path, *, seed: int = 0) -> None:
    """Make `folder` a checkpoint of this architecture with weights drawn from `seed`; some kilobytes on the disk."""
    index: dict[str, Any] = {"_class_name": architecture.pipeline, **architecture.flags}
    for name, part in architecture.parts.items():
        index[name] = [_library(part.class_name), part.class_name]
        (folder / name).mkdir(parents=True)
        if name == "scheduler":
            _write_json(folder / name / "scheduler_config.json", {"_class_name": part.class_name, **part.config})
            continue
        module = on_meta(part)
        _write_config(module, part, folder / name)
        stem = "diffusion_pytorch_model" if _library(part.class_name) == "diffusers" else "model"
        _write_hole(_tensors(module), folder / name / f"{stem}.safetensors", seed=seed)
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", _write_tokenizer(part, folder / tokenizer)]
    _write_json(folder / "model_index.json", index)


def on_meta(part: Part) -> Any:
    """The component's module without memory for its weights: for names, shapes and counting.

    Our own network where there is one: its weights have the published names, and diffusers and transformers, which
    take five seconds to import, are left alone.
    """
    build = own_network(part.class_name, part.config)
    if build is not None:
        with torch.device("meta"):
            return build()
    library: Any = __import__(_library(part.class_name))
    cls = getattr(library, part.class_name)
    with torch.device("meta"):
        if library.__name__ == "diffusers":
            return cls.from_config(dict(part.config))
        return cls(cls.config_class(**part.config))


def is_random(file: Path) -> bool:
    """Whether the weights of a safetensors file are to be drawn rather than read."""
    with safe_open(file, framework="pt") as opened:
        return _MARK in (opened.metadata() or {})


def draw(
    files: Sequence[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    only: Collection[str] | None = None,
    pools: dict[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every tensor of the files by its name, made on `device` in `dtype` at once; never in a wider format first.

    Matrices and kernels are normal, scaled by what they sum over, so that activations keep their size through any
    number of layers; norms are 1 and biases 0. The same seed gives the same numbers on every device, but for rounding.
    On the device `meta` nothing is drawn, and the files may be any: only names and shapes are looked at.
    only: the names to draw, all where None. pools: what was drawn from the last time, by seed, for who asks often.
    """
    tensors: dict[str, Tensor] = {}
    pools = {} if pools is None else pools
    for file in files:
        with safe_open(file, framework="pt") as opened:
            seed = int((opened.metadata() or {}).get(_MARK, 0))
            for name in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if only is not None and name not in only:
                    continue
                cut = opened.get_slice(name)
                shape = tuple(cut.get_shape())
                kind = _INDEX_DTYPES.get(cut.get_dtype(), dtype)
                if device.type == "meta" or not kind.is_floating_point:
                    tensors[name] = torch.zeros(shape, dtype=kind, device=device)
                    continue
                if seed not in pools:
                    generator = torch.Generator().manual_seed(seed)
                    pools[seed] = torch.randn(_POOL_SIZE, generator=generator).to(device, dtype)
                tensors[name] = _drawn(name, shape, pools[seed])
    return tensors


def module_of(
    cls: Any, config: Mapping[str, Any], files: Sequence[Path], *, dtype: torch.dtype, device: torch.device
) -> Any:
    """A diffusers module with drawn weights. Raises BrokenCheckpoint where the files do not fit the config."""
    with torch.device("meta"):
        module = cls.from_config(dict(config))
    found = module.load_state_dict(draw(files, dtype=dtype, device=device), strict=False, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta and device.type != "meta"]
    if wrong := [*found.missing_keys, *found.unexpected_keys, *left]:
        raise BrokenCheckpoint(f"{files[0].parent} does not fit its config: {', '.join(sorted(wrong)[:3])}")
    return module


def _drawn(name: str, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    if len(shape) < 2:
        is_zero = name.endswith(("bias", "running_mean"))
        return torch.full(shape, 0.0 if is_zero else 1.0, dtype=pool.dtype, device=pool.device)
    tensor = torch.empty(math.prod(shape), dtype=pool.dtype, device=pool.device)
    begin = crc32(name.encode()) % _POOL_SIZE
    at = 0
    while at < tensor.numel():
        n = min(_POOL_SIZE - begin, tensor.numel() - at)
        tensor[at : at + n] = pool[begin : begin + n]
        at, begin = at + n, 0
    return tensor.mul_(math.prod(shape[1:]) ** -0.5).view(shape)


def _library(class_name: str) -> str:
    if class_name.startswith(("CLIP", "T5", "Qwen")):
        return "transformers"
    return "diffusers"


def _tensors(module: Any) -> dict[str, Tensor]:
    """What its file would hold: a table that has two names is written once."""
    kept: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept.setdefault(id(tensor), (name, tensor))
    return dict(kept.values())


def _write_hole(tensors: Mapping[str, Tensor], file: Path, *, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _MARK: str(seed)}}
    at = 0
    for name, tensor in tensors.items():
        dtype, width = ("BF16", 2) if tensor.is_floating_point() else ("I64", 8)
        end = at + tensor.numel() * width
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as written:
        written.write(struct.pack("<Q", len(raw)) + raw)
        written.truncate(8 + len(raw) + at)


def _write_config(module: Any, part: Part, folder: Path) -> None:
    if own_network(part.class_name, part.config) is not None:
        is_text = _library(part.class_name) == "transformers"
        known = {"architectures": [part.class_name]} if is_text else {"_class_name": part.class_name}
        _write_json(folder / "config.json", {**known, **part.config})
    elif _library(part.class_name) == "diffusers":
        module.save_config(str(folder))
    else:
        module.config.architectures = [part.class_name]
        module.config.save_pretrained(str(folder))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _write_tokenizer(part: Part, folder: Path) -> str:
    """A tokenizer that spells: every byte is a token. Returns its class.

    Its ids are all below 1024, which every vocabulary holds.
    """
    if not part.class_name.startswith("CLIP"):
        written = _tokenizer(part)
        written.save_pretrained(str(folder))
        return type(written).__name__
    folder.mkdir()
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *_TOKEN_MARKS]
    begin, end = _TOKEN_MARKS
    marks = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", {**marks, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    return "CLIPTokenizer"


def _tokenizer(part: Part) -> Any:
    """One of transformers' own classes."""
    import transformers

    alphabet = sorted(ByteLevel.alphabet())
    if part.class_name.startswith("T5"):
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
        pieces += [(letter, -4.0) for letter in string.ascii_letters + string.digits + string.punctuation]
        return cast("Any", transformers.T5Tokenizer)(vocab=pieces, extra_ids=0, model_max_length=512)
    if part.class_name.startswith("Qwen3"):
        tokens = [*alphabet, *_QWEN_MARKS]
        tokenizer = transformers.Qwen2Tokenizer(
            vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=131072,
            additional_special_tokens=list(_QWEN_MARKS[1:3]),
        )  # fmt: skip
        tokenizer.chat_template = _CHAT_TEMPLATE
        return tokenizer
    raise UnsupportedByModel(f"there is no tokenizer for a {part.class_name}")
