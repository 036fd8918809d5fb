"""Weights of one component from its safetensors files, strictly: every one accounted for, in the dtype asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdfleet.catalog.single_file.origins import read_origin
from sdfleet.engine import random_weights
from sdfleet.engine.prequantised import is_beside_a_weight
from sdfleet.engine.single_file import read_component
from sdfleet.errors import BrokenCheckpoint, PickleRefused

_SHOWN_NAMES = 3
# T5 has one table under two names; a file may hold either.
_SECOND_NAMES = {"shared.weight": "encoder.embed_tokens.weight"}


def read_weights(
    folder: Path, *, dtype: torch.dtype, device: str = "cpu", stem: str = "model", without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Every weight of the folder by its name in the file, floating point ones in `dtype`.

    stem: what the files are called, `model` by transformers and `diffusion_pytorch_model` by diffusers.
    without: beginnings of names to pass over. Raises BrokenCheckpoint and PickleRefused.
    """
    origin = read_origin(folder)
    if origin is not None and origin.n_file_bytes is not None:
        return read_component(origin.path, folder.name, dtype=dtype, device=device, without=without)
    folder = folder if origin is None else origin.path
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder, stem):
        try:
            if device == "meta" or random_weights.is_random(path):
                drawn = random_weights.draw([path], dtype=dtype, device=torch.device(device))
                weights |= {name: tensor for name, tensor in drawn.items() if not name.startswith(without)}
                continue
            with safe_open(path, framework="pt", device=device) as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    if not name.startswith(without):
                        tensor = file.get_tensor(name)
                        is_number = tensor.is_floating_point() and not is_beside_a_weight(name)
                        weights[name] = tensor.to(dtype) if is_number else tensor
        except FileNotFoundError as error:
            raise BrokenCheckpoint(f"{path} is missing", hint="download the checkpoint again") from error
        except SafetensorError as error:
            raise BrokenCheckpoint(f"{path} cannot be read: {error}", hint="download the checkpoint again") from error
    return weights


class WeightSource:
    """One component's weights, to be read a few at a time and as often as is liked.

    stem: as `read_weights`. Raises as it does.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, stem: str) -> None:
        self._dtype = dtype
        self._component = folder.name
        origin = read_origin(folder)
        self._single = origin.path if origin is not None and origin.n_file_bytes is not None else None
        self._random: set[Path] = set()
        self._pools: dict[int, Tensor] = {}
        self._places: dict[str, Path] = {}
        if self._single is not None:
            self._places = dict.fromkeys(
                read_component(self._single, folder.name, dtype=dtype, device="meta"), self._single
            )
            return
        for path in _weight_files(folder if origin is None else origin.path, stem):
            with _opened(path) as file:
                self._places |= dict.fromkeys(file.keys(), path)
            if random_weights.is_random(path):
                self._random.add(path)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These weights by the names that the module has for them, in the format of computing, on the CPU."""
        called = {self._in_file(name): name for name in names}
        found: dict[str, Tensor] = {}
        if self._single is not None:
            found = read_component(self._single, self._component, dtype=self._dtype, device="cpu", only=called)
        else:
            for path in dict.fromkeys(self._places[name] for name in called):
                found |= self._from(path, [name for name in called if self._places[name] == path])
        return {called[name]: tensor for name, tensor in found.items()}

    def _from(self, path: Path, names: Sequence[str]) -> dict[str, Tensor]:
        if path in self._random:
            return random_weights.draw(
                [path], dtype=self._dtype, device=torch.device("cpu"), only=names, pools=self._pools
            )
        with _opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in names}
        return {n: t.to(self._dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def _in_file(self, name: str) -> str:
        """What the file calls it: text encoders are saved with a prefix or without, and T5's table under two names."""
        for prefix in ("", "model.", "text_model."):
            if prefix + name in self._places:
                return prefix + name
        return _SECOND_NAMES.get(name, name)


def fill(module: Any, weights: Mapping[str, Tensor], *, folder: Path) -> None:
    """Give a module born on the meta device its weights. Raises BrokenCheckpoint naming what does not fit."""
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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} is missing", hint="download the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise BrokenCheckpoint(f"{path} cannot be read: {error}", hint="download the checkpoint again") from error


def json_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BrokenCheckpoint."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} is missing", hint="download the checkpoint again") from error
    except ValueError as error:
        raise BrokenCheckpoint(f"{path} is not JSON: {error}", hint="download the checkpoint again") from error
    if not isinstance(read, dict):
        raise BrokenCheckpoint(f"{path} holds no JSON object", hint="download the checkpoint again")
    return read


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files to read: one, or the shards of an index; float16 copies only if there is nothing else."""
    for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
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
    files = json_of(path).get("weight_map")
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()):
        raise BrokenCheckpoint(f"{path} has no weight_map", hint="download the checkpoint again")
    names = sorted(set(files.values()))
    for name in names:
        # An index from a stranger must not reach outside its own folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BrokenCheckpoint(f"{path} names {name!r}, which is no .safetensors file beside it")
    return [path.parent / name for name in names]


def _named(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN_NAMES} more" if len(listed) > _SHOWN_NAMES else ""
    return ", ".join(listed[:_SHOWN_NAMES]) + more
