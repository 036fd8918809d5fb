"""Dataclasses of ours as plain JSON values and back, for talk between processes and between machines.

Only the standard library is used: a child in another virtual environment imports it with nothing else installed.

>>> from sdfleet.domain import JobId, Progress
>>> to_plain(Progress(job_id=JobId("a"), image_index=0, step=1, n_steps=4), [])["n_steps"]
4
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Literal, NewType, Union, get_args, get_origin, get_type_hints

from sdfleet.errors import SdfleetError, from_wire


class Misfit(Exception):
    """A value that does not fit its field. Caught by whoever reads messages, never shown to a caller as it is."""


def to_plain(value: object, blobs: list[bytes]) -> object:
    """JSON values for a dataclass of ours; its bytes are appended to `blobs`, and stand there as {"blob": i}."""
    if isinstance(value, bytes):
        blobs.append(value)
        return {"blob": len(blobs) - 1}
    if isinstance(value, SdfleetError):
        return value.to_wire()
    if is_dataclass(value):
        return {each.name: to_plain(getattr(value, each.name), blobs) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_plain(each, blobs) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(each, blobs) for each in value]
    return value


def from_plain(kind: object, value: object, blobs: Sequence[bytes], *, where: str) -> object:
    """The inverse of `to_plain`, strict: exact types, no unknown and no missing field. Raises Misfit.

    where: how to call the value in a fault. Fields that are absent and have defaults keep them.
    """
    if isinstance(kind, NewType):
        return from_plain(kind.__supertype__, value, blobs, where=where)
    if kind is object:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind in (str, int, bool, float):
        return _checked(value, fits=type(value) is kind, where=where)
    if kind is bytes:
        return _blob(value, blobs, where=where)
    if kind is SdfleetError:
        return _error(value, where=where)
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass(kind, value, blobs, where=where)
    return _generic(kind, value, blobs, where=where)


def _generic(kind: object, value: object, blobs: Sequence[bytes], *, where: str) -> object:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return _checked(value, fits=isinstance(value, str) and value in args, where=where)
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not types.NoneType)
        return None if value is None else from_plain(inner, value, blobs, where=where)
    if origin is tuple and isinstance(value, list):
        inners = [args[0]] * len(value) if args[1:] == (...,) else list(args)
        _checked(value, fits=len(inners) == len(value), where=where)
        pairs = enumerate(zip(inners, value, strict=True))
        return tuple(from_plain(each, item, blobs, where=f"{where}[{i}]") for i, (each, item) in pairs)
    if origin is Mapping and isinstance(value, dict):
        return {name: from_plain(args[1], item, blobs, where=f"{where}.{name}") for name, item in value.items()}
    return _checked(value, fits=False, where=where)


def _dataclass(kind: type, value: object, blobs: Sequence[bytes], *, where: str) -> object:
    if not isinstance(value, dict):
        raise Misfit(f"{where}: an object was expected")
    hints = _hints(kind)
    unknown = sorted(value.keys() - hints.keys())
    missing = sorted(_required(kind) - value.keys())
    if unknown or missing:
        raise Misfit(f"{where}: unknown fields {unknown[:5]}, missing fields {missing[:5]}")
    given = {name: from_plain(hints[name], item, blobs, where=f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**given)
    except SdfleetError as exc:
        raise Misfit(f"{where}: {exc}") from exc


def _blob(value: object, blobs: Sequence[bytes], *, where: str) -> bytes:
    index = value.get("blob") if isinstance(value, dict) and len(value) == 1 else None
    if type(index) is not int or not 0 <= index < len(blobs):
        raise Misfit(f"{where}: no such blob")
    return blobs[index]


def _error(value: object, *, where: str) -> SdfleetError:
    parts = {"code", "message", "hint"}
    if not isinstance(value, dict) or value.keys() != parts or not all(isinstance(v, str) for v in value.values()):
        raise Misfit(f"{where}: an error is an object of code, message and hint")
    return from_wire(value)


def _checked(value: object, *, fits: bool, where: str) -> object:
    if not fits:
        raise Misfit(f"{where}: {str(value)[:80]!r} does not fit")
    return value


@cache
def _hints(kind: type) -> Mapping[str, object]:
    return get_type_hints(kind)


@cache
def _required(kind: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
