"""CLIP, T5 and Qwen3 text encoders from a checkpoint's folder: every weight accounted for, in the dtype asked for.

transformers' own `from_pretrained` fills what a file lacks with random numbers and only logs it; here a missing,
unexpected or misshapen weight is an error that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdfleet.engine.networks.choice import own_network
from sdfleet.engine.prequantised import KEY, format_of, put_in
from sdfleet.engine.weight_files import fill, json_of, read_weights
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, InvalidValue

_CLIP_PREFIX = "text_model."


def load_clip_text_encoder(folder: Path, *, dtype: torch.dtype, with_projection: bool, device: str = "cpu") -> Any:
    """A CLIPTextModel, or a CLIPTextModelWithProjection, ready to encode (eval mode, no gradients).

    Ours where it knows every option of the config, else transformers'. Weights may carry the prefix `text_model.` or
    not: transformers 4 saved CLIPTextModel with it, 5 saves it without.
    Raises CheckpointNotFound, BrokenCheckpoint, PickleRefused, and InvalidValue for float16 on a CPU.
    """
    _refuse_float16_on_cpu(dtype, device)
    config = _config(folder)
    weights: dict[str, Tensor] = {}
    for name, tensor in read_weights(folder, dtype=dtype, device=device).items():
        if name.endswith("position_ids"):
            continue
        bare = name.removeprefix(_CLIP_PREFIX)
        target = _CLIP_PREFIX + bare if with_projection and bare != "text_projection.weight" else bare
        if target in weights:
            raise BrokenCheckpoint(f"{folder} holds {bare!r} twice, with and without the prefix {_CLIP_PREFIX!r}")
        weights[target] = tensor
    ours = own_network("CLIPTextModelWithProjection" if with_projection else "CLIPTextModel", config)
    if ours is None:
        return _transformers_clip(config, weights, folder=folder, with_projection=with_projection, device=device)
    module = ours()
    fill(module, weights, folder=folder)
    return module.eval().requires_grad_(requires_grad=False)


def _transformers_clip(
    config: dict[str, Any], weights: dict[str, Tensor], *, folder: Path, with_projection: bool, device: str
) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    read = CLIPTextConfig.from_dict(config)
    with torch.device("meta"):
        module = (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(read)
    fill(module, weights, folder=folder)
    embeddings = (module.text_model if with_projection else module).embeddings
    # Not saved: a buffer that only counts. It was born on the meta device with the rest.
    embeddings.position_ids = torch.arange(read.max_position_embeddings, device=device)[None]
    return module.eval().requires_grad_(requires_grad=False)


def load_t5_encoder(folder: Path, *, dtype: torch.dtype, device: str = "cpu", read_into: str | None = None) -> Any:
    """A T5EncoderModel, ready to encode. The decoder of a whole T5 is passed over. Raises as above.

    read_into: where its weights are put for now if not on the device that will compute with them.
    """
    from transformers import T5Config, T5EncoderModel

    _refuse_float16_on_cpu(dtype, device)
    config = T5Config.from_dict(_plain(_config(folder), folder))
    weights = read_weights(folder, dtype=dtype, device=read_into or device, without=("decoder.", "lm_head."))
    # One table under two names; a file may hold either or both.
    table = weights.pop("encoder.embed_tokens.weight", None)
    if table is not None:
        weights.setdefault("shared.weight", table)
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    with torch.device("meta"):
        module = T5EncoderModel(config)
    weights = put_in(module, weights, dtype=dtype, where=str(folder))
    fill(module, weights, folder=folder)
    module.set_input_embeddings(module.shared)
    return module.eval().requires_grad_(requires_grad=False)


def load_qwen3(folder: Path, *, dtype: torch.dtype, device: str = "cpu", read_into: str | None = None) -> Any:
    """A Qwen3Model, ready to encode, also of a Qwen3ForCausalLM: nothing here writes text. Raises as above.

    The causal model's file has the prefix `model.`, and its head only where that is not the embedding table again.
    """
    from transformers import Qwen3Config, Qwen3Model

    _refuse_float16_on_cpu(dtype, device)
    config = Qwen3Config.from_dict(_plain(_config(folder), folder))
    read = read_weights(folder, dtype=dtype, device=read_into or device, without=("lm_head.",))
    with torch.device("meta"):
        module = Qwen3Model(config)
    weights = {name.removeprefix("model."): tensor for name, tensor in read.items()}
    fill(module, put_in(module, weights, dtype=dtype, where=str(folder)), folder=folder)
    # Not saved either: frequencies that the config gives, born on the meta device with the rest.
    module.rotary_emb = type(module.rotary_emb)(config=config).to(device)
    return module.eval().requires_grad_(requires_grad=False)


def _refuse_float16_on_cpu(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float16 and torch.device(device).type == "cpu":
        raise InvalidValue("dtype", "float16 does not run on a CPU", hint="use bfloat16 or float32")


def _plain(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config without what transformers would do about quantised weights. Raises UnsupportedByModel as they ask."""
    format_of(config, where=str(folder))
    return {name: value for name, value in config.items() if name != KEY}


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointNotFound(f"there is no folder {folder}", hint="check the checkpoint's path")
    return json_of(folder / "config.json")
