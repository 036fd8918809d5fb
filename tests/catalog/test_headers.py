"""Headers of weight files: read without the weights, and never believed beyond what the file holds."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfleet.catalog.headers import read_header
from sdfleet.errors import BrokenCheckpoint
from tests.catalog.folders import safetensors


def _file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    return path


def _with_header(header: Any, data: bytes = b"") -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_a_whole_file_tells_shapes_sizes_and_parameters(tmp_path: Path) -> None:
    header = read_header(_file(tmp_path, safetensors({"a": (2, 3), "b": (4,)})))
    assert dict(header.shapes) == {"a": (2, 3), "b": (4,)}
    assert dict(header.bytes_by_dtype) == {"F16": 20}
    assert header.n_parameters == 10


def test_a_file_the_safetensors_library_wrote_is_read_alike(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    path = tmp_path / "theirs.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.int64)}, path)
    assert dict(read_header(path).bytes_by_dtype) == {"F32": 24, "I64": 8}


@pytest.mark.parametrize("n_missing", [1, 5, 20])
def test_a_truncated_file_is_named_with_its_missing_bytes(tmp_path: Path, n_missing: int) -> None:
    path = _file(tmp_path, safetensors({"a": (2, 3), "b": (4,)})[:-n_missing])
    with pytest.raises(BrokenCheckpoint, match=rf"weights\.safetensors is truncated: {n_missing} of 20 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x10\0\0",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        b"\x80\x04pickle that only has the right extension",
        _with_header({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 3]}}, bytes(4)),
        _with_header({"a": {"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]}}, bytes(4)),
        _with_header({"a": {"dtype": "F17", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        _with_header({"a": {"dtype": "F16", "shape": [2], "data_offsets": [4, 0]}}, bytes(4)),
        _with_header({"a": {"dtype": "F16", "shape": "2", "data_offsets": [0, 4]}}, bytes(4)),
        _with_header({"a": 5}),
    ],
    ids=range(15),
)
def test_a_header_that_makes_no_sense_is_a_broken_checkpoint(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BrokenCheckpoint):
        read_header(_file(tmp_path, data))


@given(cut=st.integers(0, 160), byte=st.integers(0, 255))
def test_no_damage_to_one_byte_raises_anything_but_broken_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, cut: int, byte: int
) -> None:
    whole = bytearray(safetensors({"a": (2, 3), "b": (4,)}))
    whole[cut % len(whole)] = byte
    path = _file(tmp_path_factory.mktemp("one"), bytes(whole))
    with contextlib.suppress(BrokenCheckpoint):
        read_header(path)
