"""One part of a checkpoint in its own folder: its config, its files of weights, and whether they belong together.

Faults are collected, not raised: a person is told all those of a checkpoint at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from sdfleet.catalog.headers import PICKLES, Header, read_header, read_json
from sdfleet.catalog.single_file.origins import header_within, read_origin
from sdfleet.errors import BrokenCheckpoint, PickleRefused

# What transformers needs to read T5's spiece.model where there is no tokenizer.json, and the name to import it by.
TO_READ_PIECES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a checkpoint; `bytes_by_dtype` is empty for parts without weights (tokenizers, scheduler)."""

    name: str
    class_name: str
    config: Mapping[str, object] = field(repr=False)
    bytes_by_dtype: Mapping[str, int] = field(default_factory=dict)
    n_parameters: int = 0

    @property
    def n_bytes(self) -> int:
        """Size of its weights as stored."""
        return sum(self.bytes_by_dtype.values())


def read_component(path: Path, *, name: str, class_name: str, faults: list[str]) -> Component | None:
    """The part `name` of the checkpoint at `path`; None where it cannot be used, with the reasons added to `faults`.

    Raises PickleRefused.
    """
    folder = path / name
    if not folder.is_dir():
        faults.append(f"the folder {name}/ is missing")
        return None
    if name == "scheduler":
        config = _config(folder / "scheduler_config.json", faults)
        return None if config is None else Component(name=name, class_name=class_name, config=config)
    if name.startswith("tokenizer"):
        return _tokenizer(folder, class_name=class_name, faults=faults)
    config = _config(folder / "config.json", faults)
    headers = _weights(folder, faults)
    if config is None or not headers:
        return None
    _check_fits(name, config, headers, faults)
    totals: dict[str, int] = {}
    for header in headers:
        for dtype, n_bytes in header.bytes_by_dtype.items():
            totals[dtype] = totals.get(dtype, 0) + n_bytes
    return Component(
        name=name,
        class_name=class_name,
        config=config,
        bytes_by_dtype=totals,
        n_parameters=sum(header.n_parameters for header in headers),
    )


def _config(file: Path, faults: list[str]) -> Mapping[str, object] | None:
    label = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        faults.append(f"{label} is missing")
        return None
    try:
        return read_json(file, label=label)
    except BrokenCheckpoint as exc:
        faults.append(exc.message)
        return None


def _tokenizer(folder: Path, *, class_name: str, faults: list[str]) -> Component | None:
    has_whole = (folder / "tokenizer.json").is_file()
    parts = ("spiece.model",) if class_name.startswith("T5") else ("vocab.json", "merges.txt")
    missing = [] if has_whole else [name for name in parts if not (folder / name).is_file()]
    faults.extend(f"{folder.name}/{name} is missing" for name in missing)
    if not has_whole and "spiece.model" in parts:
        faults.extend(
            f"{folder.name} needs the package {package}, which is not installed (pip install {package})"
            for package, module in TO_READ_PIECES.items()
            if not _can_import(module)
        )
    config = _config(folder / "tokenizer_config.json", faults)
    if missing or config is None:
        return None
    return Component(name=folder.name, class_name=class_name, config=config)


def _can_import(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _weights(folder: Path, faults: list[str]) -> list[Header]:
    try:
        origin = read_origin(folder)
        if origin is not None and origin.n_file_bytes is not None:
            return [header_within(origin.path, folder.name)]
    except BrokenCheckpoint as exc:
        faults.append(exc.message)
        return []
    folder = folder if origin is None else origin.path
    names = sorted(child.name for child in folder.iterdir() if child.is_file())
    indexes = [name for name in names if re.search(r"\.safetensors\.index(\.\w+)?\.json$", name)]
    plain = [name for name in ("diffusion_pytorch_model.safetensors", "model.safetensors") if name in names]
    variants = [name for name in names if re.fullmatch(r"(diffusion_pytorch_model|model)\.\w+\.safetensors", name)]
    files: list[str]
    if plain:
        files = [plain[0]]
    elif indexes:
        files = _shards(folder, index=min(indexes, key=len), faults=faults)
    elif variants:
        files = variants[:1]
    else:
        pickles = [name for name in names if name.lower().endswith(PICKLES)]
        if pickles:
            raise PickleRefused(str(folder / pickles[0]))
        faults.append(f"{folder.name}/ has no weights (*.safetensors)")
        return []
    headers = []
    for name in files:
        try:
            headers.append(read_header(folder / name, label=f"{folder.name}/{name}"))
        except BrokenCheckpoint as exc:
            faults.append(exc.message)
    if len(headers) < len(files):
        return []
    if indexes and not plain:
        _check_index(folder, min(indexes, key=len), dict(zip(files, headers, strict=True)), faults)
    return headers


def _check_index(folder: Path, index: str, headers: Mapping[str, Header], faults: list[str]) -> None:
    """Whether every shard has the tensors that its index expects there: a shard of another checkpoint has not."""
    # A dictionary, as `_shards` found it.
    weight_map = cast("dict[str, str]", read_json(folder / index, label=f"{folder.name}/{index}")["weight_map"])
    for name, header in headers.items():
        lost = sorted(tensor for tensor, file in weight_map.items() if file == name and tensor not in header.shapes)
        if lost:
            told = f"{lost[0]!r}" + (f" and {len(lost) - 1} more tensors" if len(lost) > 1 else "")
            faults.append(f"{folder.name}/{name} lacks {told} of {index}: they do not belong together")


def _shards(folder: Path, *, index: str, faults: list[str]) -> list[str]:
    label = f"{folder.name}/{index}"
    try:
        weight_map = read_json(folder / index, label=label).get("weight_map")
    except BrokenCheckpoint as exc:
        faults.append(exc.message)
        return []
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    # A shard is a neighbour of its index; a path in there would lead out of the folder.
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        faults.append(f"{label} lists no shards that can be read")
        return []
    missing = [name for name in names if not (folder / name).is_file()]
    faults.extend(f"{folder.name}/{name} is missing (one of {len(names)} shards)" for name in missing)
    return [] if missing else names


def _check_fits(name: str, config: Mapping[str, object], headers: list[Header], faults: list[str]) -> None:
    """The cheapest sign that weights belong to another config: the first layer's input channels."""
    tensors, key = {
        "unet": (("conv_in.weight",), "in_channels"),
        "transformer": (("pos_embed.proj.weight", "x_embedder.weight"), "in_channels"),
        "vae": (("encoder.conv_in.weight",), "in_channels"),
    }.get(name, ((), ""))
    found = [header.shapes[tensor] for header in headers for tensor in tensors if tensor in header.shapes]
    faults.extend(
        f"{name}/config.json says {key} {config[key]}, its weights have {shape[1]}: they do not belong together"
        for shape in found
        if len(shape) in {2, 4} and key in config and shape[1] != config[key]
    )
