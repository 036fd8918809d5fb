"""How the messages of a fleet become bytes.

One message is one payload on the bus:

    4 bytes   length of the header, big endian
    header    JSON object: {"v": 1, "blobs": [49152], ...the fields of the message}
    blobs     the raw bytes that the header declared, one after the other

Subjects tell which message it is, so a payload has no type of its own. Fields that a reader does not know are ignored,
so that a node and a router may differ by a version; another `v` is refused. What is drawn (`ImageRequest`) is read
strictly: a node that does not know a field of it must not draw without it. Nothing here is code, a pickle or a path.
"""

from __future__ import annotations

import json
import struct
from typing import Any, TypeVar, cast

from sdfleet.errors import SdfleetError
from sdfleet.plain import Misfit, from_plain, to_plain

VERSION = 1
# A prompt of 32 000 characters, every one escaped, is 400 kB; the broker takes 1 MB.
MAX_HEADER_BYTES = 2**19
# What one payload may carry beside its header; larger things travel in chunks.
CHUNK_BYTES = 2**18
MAX_BLOBS = 8

_LENGTH = struct.Struct(">I")

T = TypeVar("T")


class BrokenMessage(Exception):
    """A payload makes no sense. Caught by whoever reads it, who logs it and goes on."""


def pack(message: object, *, max_blobs: int = MAX_BLOBS, max_bytes: int = CHUNK_BYTES) -> bytes:
    """The payload of a message. Raises BrokenMessage where it is too large to send."""
    blobs: list[bytes] = []
    body = cast("dict[str, object]", to_plain(message, blobs))
    header = {"v": VERSION, "blobs": [len(blob) for blob in blobs], **body}
    try:
        text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError) as exc:
        raise BrokenMessage(f"{type(message).__name__}: {exc}") from exc
    if len(text) > MAX_HEADER_BYTES or len(blobs) > max_blobs or sum(map(len, blobs)) > max_bytes:
        raise BrokenMessage(f"{type(message).__name__}: {len(text)} bytes and {len(blobs)} blobs are too large")
    return b"".join((_LENGTH.pack(len(text)), text, *blobs))


def unpack(kind: type[T], payload: bytes, *, max_blobs: int = MAX_BLOBS) -> T:
    """The message in a payload. Raises BrokenMessage, also for values that our own types refuse."""
    if len(payload) < _LENGTH.size:
        raise BrokenMessage(f"{len(payload)} bytes are no message")
    (n_header,) = _LENGTH.unpack_from(payload)
    if n_header > MAX_HEADER_BYTES or n_header > len(payload) - _LENGTH.size:
        raise BrokenMessage(f"a header of {n_header} bytes in a payload of {len(payload)}")
    try:
        header = json.loads(payload[_LENGTH.size : _LENGTH.size + n_header], parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise BrokenMessage(f"the header is not JSON: {str(exc)[:80]}") from exc
    if not isinstance(header, dict) or header.pop("v", None) != VERSION:
        raise BrokenMessage(f"not a message of version {VERSION}")
    blobs = _blobs(header.pop("blobs", None), payload[_LENGTH.size + n_header :], max_blobs=max_blobs)
    known = {name: value for name, value in header.items() if name in _names_of(kind)}
    try:
        return cast("T", from_plain(kind, known, blobs, where=kind.__name__))
    except (Misfit, SdfleetError) as exc:
        raise BrokenMessage(str(exc)) from exc


def _blobs(lengths: object, rest: bytes, *, max_blobs: int) -> list[bytes]:
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        raise BrokenMessage("the header does not declare its blobs")
    if len(lengths) > max_blobs or sum(lengths) != len(rest):
        raise BrokenMessage(f"{len(rest)} bytes follow where {sum(lengths)} were declared")
    found, at = [], 0
    for n_bytes in lengths:
        found.append(rest[at : at + n_bytes])
        at += n_bytes
    return found


def _names_of(kind: type) -> set[str]:
    return set(cast("Any", kind).__dataclass_fields__)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
