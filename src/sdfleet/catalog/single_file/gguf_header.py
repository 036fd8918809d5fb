"""What a GGUF file holds, told by the `gguf` package, which maps the file and reads no weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sdfleet.catalog.headers import Header
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

if TYPE_CHECKING:
    from gguf import GGUFReader

# Stored as they are; everything else is in blocks along a row.
PLAIN = frozenset(("F32", "F16", "BF16"))
# Those that diffusers 0.42.1 takes apart in torch, so that they may stay packed in memory.
PACKED = frozenset(("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"))
# A kernel whose rows fit no block lies flat in the file; the tool most people convert with notes its shape like this.
_TRUE_SHAPE = "comfy.gguf.orig_shape."


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF file does, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def open_gguf(path: Path) -> GGUFReader:
    """The file, mapped. Raises UnsupportedByModel without the package, BrokenCheckpoint for a file that is damaged."""
    try:
        import gguf
    except ImportError as exc:
        raise UnsupportedByModel(
            f"{path} is a GGUF file, and the package that reads it is not installed",
            hint="install it: pip install 'sdfleet[gguf]'",
        ) from exc
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as exc:
        raise BrokenCheckpoint(
            f"{path} is damaged or truncated: {str(exc)[:200]}", hint="copy or download this file again"
        ) from exc


def read_gguf_header(path: Path) -> Header:
    """As `read_header`, of a GGUF file. Raises as `open_gguf`, and UnsupportedByModel for a format that is not read."""
    reader = open_gguf(path)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    bytes_by_dtype: dict[str, int] = {}
    for tensor in reader.tensors:
        dtype = tensor.tensor_type.name
        if dtype not in PLAIN | PACKED:
            raise UnsupportedByModel(
                f"{path} holds {tensor.name!r} as {dtype}, which is not read",
                hint=f"get the file in one of: {', '.join(sorted(PLAIN | PACKED))}",
            )
        shapes[tensor.name], dtypes[tensor.name] = true_shape(reader, tensor.name, tensor.shape), dtype
        bytes_by_dtype[dtype] = bytes_by_dtype.get(dtype, 0) + int(tensor.n_bytes)
    if not shapes:
        raise BrokenCheckpoint(f"{path} holds no weights", hint="copy or download this file again")
    return Header(
        shapes=shapes,
        bytes_by_dtype=bytes_by_dtype,
        n_parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtypes=dtypes,
    )


def true_shape(reader: GGUFReader, name: str, sides: object) -> tuple[int, ...]:
    """A tensor's shape as torch has it: GGUF counts sides from the last, and kernels may lie flat."""
    field = reader.get_field(_TRUE_SHAPE + name)
    if field is not None:
        return tuple(int(field.parts[i][0]) for i in field.data)
    return tuple(int(side) for side in reversed(list(sides)))  # type: ignore[call-overload]  # a numpy array
