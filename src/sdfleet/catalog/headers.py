"""What a safetensors file says about itself, read from its header alone; no weight is loaded.

Format: 8 bytes little-endian header length, the header as JSON, then the tensors back to back.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdfleet.errors import BrokenCheckpoint

# Endings of files of weights that can run code when they are opened.
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
# The safetensors library refuses headers past 100 MB; FLUX.1, the longest we know, needs 0.2 MB.
MAX_HEADER_BYTES = 32 * 2**20
MAX_JSON_BYTES = 32 * 2**20

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors of one file: `shapes` by tensor name, `bytes_by_dtype` as stored (F16, BF16, F32, ...).

    dtypes: by tensor name. metadata: what whoever saved the file wrote beside the tensors.
    """

    shapes: Mapping[str, tuple[int, ...]]
    bytes_by_dtype: Mapping[str, int]
    n_parameters: int
    dtypes: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path, *, label: str = "") -> Header:
    """The header of a safetensors file whose tensors all lie inside the file.

    label: how to name the file in an error. Raises BrokenCheckpoint, naming the missing bytes of a truncated file.
    """
    label = label or str(path)
    try:
        with path.open("rb") as file:
            n_file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                raise _broken(label, f"is truncated: it has {len(start)} bytes, its header alone needs more")
            (n_header_bytes,) = struct.unpack("<Q", start)
            if n_header_bytes > MAX_HEADER_BYTES:
                raise _broken(label, "is not a safetensors file: its first 8 bytes are no header length")
            raw = file.read(n_header_bytes)
    except OSError as exc:
        raise _broken(label, f"cannot be read: {exc.strerror or exc}") from exc
    if len(raw) < n_header_bytes:
        raise _broken(label, f"is truncated: {n_header_bytes - len(raw)} bytes of its header are missing")
    tensors = _parse(raw, label)
    return _checked(tensors, n_data_bytes=n_file_bytes - 8 - n_header_bytes, label=label)


def read_json(path: Path, *, label: str = "") -> dict[str, object]:
    """A JSON file that holds one object. Raises BrokenCheckpoint for anything else."""
    label = label or str(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise _broken(label, "is too large for a config")
        raw = path.read_bytes()
    except OSError as exc:
        raise _broken(label, f"cannot be read: {exc.strerror or exc}") from exc
    return _parse(raw, label)


def _parse(raw: bytes, label: str) -> dict[str, object]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise _broken(label, f"is not JSON ({exc})") from exc
    if not isinstance(value, dict):
        raise _broken(label, "holds no JSON object")
    return value


def _checked(tensors: Mapping[str, object], *, n_data_bytes: int, label: str) -> Header:
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    bytes_by_dtype: dict[str, int] = {}
    n_parameters = end_of_data = 0
    for name, facts in tensors.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _facts(facts, name=name, label=label)
        n_elements = math.prod(shape)
        if end - begin != (n_elements * BITS[dtype] + 7) // 8:
            raise _broken(label, f"is damaged: {name!r} has {end - begin} bytes, not what {dtype} {list(shape)} needs")
        shapes[name], dtypes[name] = shape, dtype
        bytes_by_dtype[dtype] = bytes_by_dtype.get(dtype, 0) + end - begin
        n_parameters += n_elements
        end_of_data = max(end_of_data, end)
    if end_of_data > n_data_bytes:
        raise _broken(
            label, f"is truncated: {end_of_data - n_data_bytes} of {end_of_data} bytes of weights are missing"
        )
    if not shapes:
        raise _broken(label, "holds no weights")
    said = tensors.get("__metadata__")
    return Header(
        shapes=shapes,
        bytes_by_dtype=bytes_by_dtype,
        n_parameters=n_parameters,
        dtypes=dtypes,
        metadata={key: str(value) for key, value in said.items()} if isinstance(said, dict) else {},
    )


def _facts(facts: object, *, name: str, label: str) -> tuple[str, tuple[int, ...], int, int]:
    match facts:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype in BITS and all(type(n) is int and n >= 0 for n in shape) and 0 <= begin <= end:
                return dtype, tuple(shape), begin, end
    raise _broken(label, f"is damaged: its header makes no sense at {name[:80]!r}")


def _broken(label: str, what: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{label} {what}", hint="copy or download this file again")
