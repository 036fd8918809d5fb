"""Reading what comes in: JSON whatever its label says, multipart forms, pictures in base64; all within limits.

Everything that takes long (parsing megabytes, decoding pictures) happens in worker threads.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from sdfleet.api.dialect import BadBody
from sdfleet.domain import Picture
from sdfleet.errors import BrokenPicture, InvalidValue, TooLarge
from sdfleet.storage import pictures

M = TypeVar("M", bound=BaseModel)

# Parsing this much JSON takes about a millisecond; more goes to a thread, so that /health never waits for it.
_INLINE_BYTES = 64 * 2**10
# The largest body known is A1111's: some 60 fields and an array of a picture for every ControlNet unit.
MAX_JSON_VALUES = 100_000
MAX_JSON_DEPTH = 50
MAX_JSON_DIGITS = 40
# Base64 is decoded in pieces of this many characters: each holds the interpreter, and with it /health, for some 5 ms.
_PIECE_CHARS = 2**20
MAX_FILES = 17  # 16 pictures and a mask
MAX_FIELDS = 200
MAX_FIELD_BYTES = 2**20
_DATA_URL = re.compile(r"data:(?P<type>[\w.+/-]*)(?P<params>(?:;[\w.=+-]+)*),", re.IGNORECASE)


def json_body(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency: the request's body as `model`, read as JSON whatever its Content-Type. Raises BadBody.

    An empty body is an empty object, so that routes without required fields may be called without one.
    """

    async def read(request: Request) -> M:
        # Piece by piece: joining the pieces of 10 MB at the end would hold the event loop for 60 ms.
        data = bytearray()
        async for piece in request.stream():
            data += piece
        if len(data) <= _INLINE_BYTES:
            return parse(model, data)
        return await asyncio.to_thread(parse, model, data)

    return read


def described(model: type[BaseModel], *, form: bool = False, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` for a route whose body is read by `json_body` (or a form): the framework does not see it."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    nested = schema.pop("$defs", {})
    kind = "multipart/form-data" if form else "application/json"
    body = {"content": {kind: {"schema": _inlined(schema, nested)}}, "required": required}
    return {"requestBody": body}


def _inlined(schema: Any, nested: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        name = str(schema.get("$ref", "")).rpartition("/")[2]
        if name in nested:
            return _inlined({**nested[name], **{k: v for k, v in schema.items() if k != "$ref"}}, nested)
        return {key: _inlined(value, nested) for key, value in schema.items()}
    return [_inlined(item, nested) for item in schema] if isinstance(schema, list) else schema


def parse(model: type[M], data: bytes | bytearray) -> M:
    """Bytes as JSON as `model`. Raises BadBody with the place of the fault."""
    return validated(model, read_json(data))


def read_json(data: bytes | bytearray) -> dict[str, Any]:
    """Bytes as a JSON object that every encoder of ours can write again; nothing is an empty one. Raises BadBody.

    Refused: numbers that are none or that no field holds, half characters, and more or deeper values than any client
    sends (a body of commas would take a hundred times its size in memory, and the interpreter for seconds).
    """
    n_values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if n_values > MAX_JSON_VALUES:
        raise BadBody(f"the body has {n_values} values, more than {MAX_JSON_VALUES}", hint="send fewer")
    try:
        value = json.loads(data, parse_constant=_no_number, parse_float=_float, parse_int=_int) if data.strip() else {}
        _check_values(value, depth=1)
    except RecursionError as exc:
        raise BadBody("the body is nested too deeply", hint="send a JSON object") from exc
    except ValueError as exc:
        raise BadBody(f"the body is not JSON: {exc}", hint="send a JSON object") from exc
    if not isinstance(value, dict):
        raise BadBody(f"the body is JSON but no object: {type(value).__name__}", hint="send a JSON object")
    return value


def _check_values(value: object, *, depth: int) -> None:
    if depth > MAX_JSON_DEPTH:
        raise BadBody("the body is nested too deeply", hint=f"at most {MAX_JSON_DEPTH} levels are read")
    if isinstance(value, str):
        # Free for the megabytes of a picture: the interpreter knows of a text whether it is ASCII.
        if not value.isascii():
            value.encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_values(key, depth=depth)
            _check_values(item, depth=depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, depth=depth + 1)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_JSON_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def validated(model: type[M], value: object) -> M:
    """A value as `model`. Raises BadBody that names the first field at fault and lists all of them."""
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        issues = [
            {"loc": ["body", *fault["loc"]], "msg": fault["msg"], "type": fault["type"]}
            for fault in exc.errors(include_url=False, include_context=False, include_input=False)
        ]
        first = exc.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "body"
        raise BadBody(f"{name}: {first['msg'].removeprefix('Value error, ')}", issues=issues) from exc


async def form_of(request: Request) -> FormData:
    """The fields and files of a multipart form, within limits. Raises BadBody or TooLarge."""
    try:
        return await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as exc:
        raise BadBody(f"the form cannot be read: {exc.detail}", hint="send multipart/form-data") from exc


async def picture_of(upload: UploadFile, *, field: str) -> bytes:
    """The bytes of an uploaded picture. Raises TooLarge."""
    data = await upload.read(pictures.MAX_FILE_BYTES + 1)
    if len(data) > pictures.MAX_FILE_BYTES:
        raise TooLarge(f"{field} is larger than {pictures.MAX_FILE_BYTES} bytes", hint="make the file smaller")
    return data


def from_base64(text: str, *, field: str) -> bytes:
    """The bytes of a picture written as base64, with or without a `data:` prefix. Raises InvalidValue or TooLarge."""
    found = _DATA_URL.match(text[:200])
    if found is not None:
        if ";base64" not in found["params"].lower():
            raise InvalidValue(field, "the data URL is not base64", hint="use data:image/png;base64,...")
        text = text[found.end() :]
    if len(text) * 3 // 4 > pictures.MAX_FILE_BYTES + 2:
        raise TooLarge(f"{field} is larger than {pictures.MAX_FILE_BYTES} bytes", hint="make the picture smaller")
    parts: list[bytes] = []
    left = ""
    try:
        for at in range(0, len(text), _PIECE_CHARS):
            # Some clients break lines, leave the padding out, or use the alphabet of URLs.
            left += "".join(text[at : at + _PIECE_CHARS].split()).replace("-", "+").replace("_", "/")
            if at + _PIECE_CHARS < len(text):
                n_whole = len(left) // 4 * 4
                parts.append(base64.b64decode(left[:n_whole], validate=True))
                left = left[n_whole:]
        left = left.rstrip("=")
        parts.append(base64.b64decode(left + "=" * (-len(left) % 4), validate=True))
    except (binascii.Error, ValueError) as exc:
        raise InvalidValue(field, "it is not base64", hint="send the file's bytes as base64") from exc
    return b"".join(parts)


async def decoded(data: bytes, *, field: str) -> Picture:
    """The pixels of a picture file. Raises BrokenPicture, naming the field."""
    return await asyncio.to_thread(_decoded, pictures.decode, data, field)


async def decoded_mask(data: bytes, *, field: str) -> Picture:
    """The brightness of a picture file: 255 is drawn anew, 0 is kept. Raises BrokenPicture, naming the field."""
    return await asyncio.to_thread(_decoded, pictures.decode_mask, data, field)


async def decoded_alpha_mask(data: bytes, *, field: str) -> Picture:
    """A mask out of a picture's transparency: clear is drawn anew, solid is kept. Raises BrokenPicture."""
    return await asyncio.to_thread(_decoded, pictures.decode_alpha_mask, data, field)


def _decoded(decode: Callable[[bytes], Picture], data: bytes, field: str) -> Picture:
    try:
        return decode(data)
    except BrokenPicture as exc:
        raise BrokenPicture(f"{field}: {exc.message}", hint=exc.hint) from exc
