"""CLIP, T5 and Qwen3 text encoders from a checkpoint's folder: every weight accounted for, in the dtype asked for.

transformers' own `from_pretrained` fills what a file lacks with random numbers and only logs it; here a missing,
unexpected or misshapen weight is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, InvalidValue, PickleRefused

_CLIP_PREFIX = "text_model."
_SHOWN_NAMES = 3


def load_clip_text_encoder(folder: Path, *, dtype: torch.dtype, with_projection: bool, device: str = "cpu") -> Any:
    """A CLIPTextModel, or a CLIPTextModelWithProjection, ready to encode (eval mode, no gradients).

    Weights may carry the prefix `text_model.` or not: transformers 4 saved CLIPTextModel with it, 5 saves it without.
    Raises CheckpointNotFound, BrokenCheckpoint, PickleRefused, and InvalidValue for float16 on a CPU.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    _refuse_float16_on_cpu(dtype, device)
    config = _config(folder, CLIPTextConfig)
    weights: dict[str, Tensor] = {}
    for name, tensor in _weights(folder, dtype=dtype, device=device).items():
        if name.endswith("position_ids"):
            continue
        bare = name.removeprefix(_CLIP_PREFIX)
        target = _CLIP_PREFIX + bare if with_projection and bare != "text_projection.weight" else bare
        if target in weights:
            raise BrokenCheckpoint(f"{folder} holds {bare!r} twice, with and without the prefix {_CLIP_PREFIX!r}")
        weights[target] = tensor
    with torch.device("meta"):
        module = (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)
    _fill(module, weights, folder=folder)
    embeddings = (module.text_model if with_projection else module).embeddings
    # Not saved: a buffer that only counts. It was born on the meta device with the rest.
    embeddings.position_ids = torch.arange(config.max_position_embeddings, device=device)[None]
    return module.eval().requires_grad_(requires_grad=False)


def load_t5_encoder(folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A T5EncoderModel, ready to encode. The decoder of a whole T5 is passed over. Raises as above."""
    from transformers import T5Config, T5EncoderModel

    _refuse_float16_on_cpu(dtype, device)
    config = _config(folder, T5Config)
    weights = _weights(folder, dtype=dtype, device=device, without=("decoder.", "lm_head."))
    # One table under two names; a file may hold either or both.
    table = weights.pop("encoder.embed_tokens.weight", None)
    if table is not None:
        weights.setdefault("shared.weight", table)
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    with torch.device("meta"):
        module = T5EncoderModel(config)
    _fill(module, weights, folder=folder)
    module.set_input_embeddings(module.shared)
    return module.eval().requires_grad_(requires_grad=False)


def load_qwen3(folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A Qwen3Model, ready to encode, also of a Qwen3ForCausalLM: nothing here writes text. Raises as above.

    The causal model's file has the prefix `model.`, and its head only where that is not the embedding table again.
    """
    from transformers import Qwen3Config, Qwen3Model

    _refuse_float16_on_cpu(dtype, device)
    config = _config(folder, Qwen3Config)
    read = _weights(folder, dtype=dtype, device=device, without=("lm_head.",))
    with torch.device("meta"):
        module = Qwen3Model(config)
    _fill(module, {name.removeprefix("model."): tensor for name, tensor in read.items()}, folder=folder)
    # Not saved either: frequencies that the config gives, born on the meta device with the rest.
    module.rotary_emb = type(module.rotary_emb)(config=config).to(device)
    return module.eval().requires_grad_(requires_grad=False)


def _refuse_float16_on_cpu(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float16 and torch.device(device).type == "cpu":
        raise InvalidValue("dtype", "float16 does not run on a CPU", hint="use bfloat16 or float32")


def _config(folder: Path, config_class: Any) -> Any:
    if not folder.is_dir():
        raise CheckpointNotFound(f"there is no folder {folder}", hint="check the checkpoint's path")
    return config_class.from_dict(_json(folder / "config.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} is missing", hint="download the checkpoint again") from error
    except ValueError as error:
        raise BrokenCheckpoint(f"{path} is not JSON: {error}", hint="download the checkpoint again") from error
    if not isinstance(read, dict):
        raise BrokenCheckpoint(f"{path} holds no JSON object", hint="download the checkpoint again")
    return read


def _weights(folder: Path, *, dtype: torch.dtype, device: str, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Every weight of the folder by its name in the file, floating point ones in `dtype`."""
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=device) as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    if not name.startswith(without):
                        tensor = file.get_tensor(name)
                        weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        except FileNotFoundError as error:
            raise BrokenCheckpoint(f"{path} is missing", hint="download the checkpoint again") from error
        except SafetensorError as error:
            raise BrokenCheckpoint(f"{path} cannot be read: {error}", hint="download the checkpoint again") from error
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files to read: one, or the shards of an index; float16 copies only if there is nothing else."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).exists():
            return _shards(folder / name)
    # A variant's files: model.fp16.safetensors, or model.safetensors.index.fp16.json with its shards.
    variants = sorted([*folder.glob("*.index.*.json"), *folder.glob("*.*.safetensors")])
    variants = [path for path in variants if "-of-" not in path.name]
    if len(variants) == 1:
        return _shards(variants[0])
    if variants:
        names = ", ".join(path.name for path in variants)
        raise BrokenCheckpoint(f"{folder} has several sets of weights ({names})", hint="keep one of them")
    for pickle in sorted([*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]):
        raise PickleRefused(str(pickle))
    raise BrokenCheckpoint(f"{folder} has no .safetensors file", hint="download the checkpoint again")


def _shards(path: Path) -> list[Path]:
    if path.suffix != ".json":
        return [path]
    files = _json(path).get("weight_map")
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()):
        raise BrokenCheckpoint(f"{path} has no weight_map", hint="download the checkpoint again")
    names = sorted(set(files.values()))
    for name in names:
        # An index from a stranger must not reach outside its own folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BrokenCheckpoint(f"{path} names {name!r}, which is no .safetensors file beside it")
    return [path.parent / name for name in names]


def _fill(module: Any, weights: Mapping[str, Tensor], *, folder: Path) -> None:
    wanted: Mapping[str, Tensor] = module.state_dict()
    faults = []
    if missing := wanted.keys() - weights.keys():
        faults.append(f"lacks {_named(missing)}")
    if unexpected := weights.keys() - wanted.keys():
        faults.append(f"holds {_named(unexpected)}, unknown to its config")
    faults += [
        f"holds {name} as {list(weights[name].shape)} where its config says {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & weights.keys())
        if wanted[name].shape != weights[name].shape
    ][:_SHOWN_NAMES]
    if faults:
        raise BrokenCheckpoint(f"{folder} {'; '.join(faults)}", hint="the weights and config.json do not fit together")
    module.load_state_dict(weights, strict=True, assign=True)


def _named(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN_NAMES} more" if len(listed) > _SHOWN_NAMES else ""
    return ", ".join(listed[:_SHOWN_NAMES]) + more
