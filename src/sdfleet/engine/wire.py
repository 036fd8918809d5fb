"""What the parent process and an engine's process say to each other, and how it is put into bytes.

One frame is one message:

    4 bytes   length of the header, big endian
    header    JSON object: {"type": "picture_done", "blobs": [196608], ...the fields of the message}
    blobs     the raw bytes that the header declared, one after the other, in that order

A `bytes` field stands in the header as {"blob": i}. The parent sends commands, the child sends reports.

A header that is JSON with honest lengths but wrong content is a `BrokenMessage`: the next frame can still be read.
Anything else is a `BrokenStream`: where the next frame begins is no longer known, so the conversation is over.

Only the standard library is used, so that a child in another virtual environment (mflux, DiffusionKit) can import
this file with nothing but sdfleet's folder on its path.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import cast

from sdfleet.domain import Drawing, JobId, Progress
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed, PictureDone
from sdfleet.errors import SdfleetError
from sdfleet.plain import Misfit, from_plain, to_plain

# Raised by one whenever a message changes shape; both sides must agree.
PROTOCOL = 2

# Two prompts of 16 000 characters, every one escaped to twelve bytes of JSON, are 400 kB.
MAX_HEADER_BYTES = 2**20
# A 4096x4096 RGB picture is 48 MiB; a drawing carries two, an upscaled picture may be larger.
MAX_FRAME_BYTES = 2**28
MAX_BLOBS = 8

_LENGTH = struct.Struct(">I")


class BrokenStream(Exception):
    """The bytes are not frames, or end in the middle of one. Caught by the owner of the pipe, who ends the talk."""


class BrokenMessage(Exception):
    """One message makes no sense; the next can be read. `job_id` is the job it was about, where that is legible."""

    def __init__(self, text: str, *, job_id: JobId | None = None) -> None:
        super().__init__(text)
        self.job_id = job_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Draw this. Answered by any number of Progress and PictureDone, then one JobDone or JobFailed.

    A drawing of no pictures only loads its checkpoint.
    """

    drawing: Drawing


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop this job between two steps. Answered by its JobFailed; a job that is not there is not an error."""

    job_id: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Start or stop computing previews for a job."""

    job_id: JobId
    previews: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Let a checkpoint leave the device. Answered, under an id of its own, by a JobDone or a JobFailed (InUse)."""

    job_id: JobId
    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """These checkpoints, and no others, must not leave to make room."""

    checkpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """End; unfinished jobs are dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine stands. Commands may be sent before this; they wait in the child."""

    facts: Mapping[str, object] = field(default_factory=dict)
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What `Engine.facts` says now; sent when it changed with a job, or in the pause after one."""

    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The child cannot go on and ends after this."""

    error: SdfleetError


Command = Submit | Cancel | Watch | Unload | Pin | Close
Report = Ready | Facts | Event | Fault

_COMMANDS: Mapping[str, type] = {
    "submit": Submit, "cancel": Cancel, "watch": Watch, "unload": Unload, "pin": Pin, "close": Close
}  # fmt: skip
_REPORTS: Mapping[str, type] = {
    "ready": Ready,
    "facts": Facts,
    "progress": Progress,
    "picture_done": PictureDone,
    "job_done": JobDone,
    "job_failed": JobFailed,
    "fault": Fault,
}
_NAMES: Mapping[type, str] = {kind: name for table in (_COMMANDS, _REPORTS) for name, kind in table.items()}


def encode(message: Command | Report) -> list[bytes]:
    """The parts of one frame, to be written one after the other; blobs are the message's own bytes, not copies.

    Raises BrokenMessage for what cannot be said (a number that is not finite, a frame over the limits).
    """
    blobs: list[bytes] = []
    body = cast("dict[str, object]", to_plain(message, blobs))
    job_id = _job_id_in(body)
    header = {"type": _NAMES[type(message)], "blobs": [len(blob) for blob in blobs], **body}
    try:
        text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError) as exc:
        raise BrokenMessage(f"{header['type']}: {exc}", job_id=job_id) from exc
    n_bytes = sum(map(len, blobs))
    if len(text) > MAX_HEADER_BYTES or n_bytes > MAX_FRAME_BYTES or len(blobs) > MAX_BLOBS:
        sizes = f"{len(text)} bytes of header, {len(blobs)} blobs of {n_bytes} bytes"
        raise BrokenMessage(f"{header['type']}: too large to send ({sizes})", job_id=job_id)
    return [_LENGTH.pack(len(text)) + text, *blobs]


def read_command(read: Callable[[int], bytes]) -> Command | None:
    """The next command, or None at the end of the stream. `read(n)` gives n bytes, fewer only at the end.

    Raises BrokenMessage (read on) or BrokenStream (stop).
    """
    frame = _frame()
    n_wanted = next(frame)
    while True:
        try:
            n_wanted = frame.send(read(n_wanted))
        except StopIteration as end:
            return cast("Command | None", _decode(end.value, _COMMANDS))


async def read_report(reader: asyncio.StreamReader) -> Report | None:
    """The next report, or None at the end of the stream. Raises as `read_command` does."""
    frame = _frame()
    n_wanted = next(frame)
    while True:
        try:
            part = await reader.readexactly(n_wanted)
        except asyncio.IncompleteReadError as exc:
            part = exc.partial
        try:
            n_wanted = frame.send(part)
        except StopIteration as end:
            return cast("Report | None", _decode(end.value, _REPORTS))


_Frame = tuple[dict[str, object], list[bytes]]


def _frame() -> Generator[int, bytes, _Frame | None]:
    """Asks for byte counts and is sent the bytes; so the same rules serve blocking and async readers."""
    prefix = yield _LENGTH.size
    if not prefix:
        return None
    (n_header,) = _LENGTH.unpack(_whole(prefix, _LENGTH.size))
    if not 2 <= n_header <= MAX_HEADER_BYTES:
        raise BrokenStream(f"{prefix!r} is no header length (2 to {MAX_HEADER_BYTES})")
    text = _whole((yield n_header), n_header)
    try:
        header = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise BrokenStream(f"the header is not JSON: {text[:80]!r}") from exc
    if not isinstance(header, dict):
        raise BrokenStream(f"the header is not a JSON object: {text[:80]!r}")
    lengths = header.pop("blobs", None)
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        raise BrokenStream(f"the header does not declare its blobs: {text[:80]!r}")
    if len(lengths) > MAX_BLOBS or sum(lengths) > MAX_FRAME_BYTES:
        raise BrokenStream(f"{len(lengths)} blobs of {sum(lengths)} bytes are more than one frame may carry")
    blobs: list[bytes] = []
    for n_blob in lengths:
        blobs.append(_whole((yield n_blob), n_blob) if n_blob else b"")  # noqa: PERF401  a comprehension cannot yield
    return header, blobs


def _whole(part: bytes, n_bytes: int) -> bytes:
    if len(part) != n_bytes:
        raise BrokenStream(f"the stream ended {n_bytes - len(part)} bytes before the end of a frame")
    return part


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _decode(frame: _Frame | None, table: Mapping[str, type]) -> object:
    if frame is None:
        return None
    header, blobs = frame
    name = header.pop("type", None)
    job_id = _job_id_in(header)
    kind = table.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or kind is None:
        raise BrokenMessage(f"{str(name)[:40]!r} is not one of {', '.join(table)}", job_id=job_id)
    if kind is Ready and header.get("protocol") != PROTOCOL:
        theirs = str(header.get("protocol"))[:20]
        raise BrokenStream(f"the engine's process speaks protocol {theirs}, this one speaks {PROTOCOL}")
    try:
        return from_plain(kind, header, blobs, where=name)
    except Misfit as exc:
        raise BrokenMessage(str(exc), job_id=job_id) from exc


def _job_id_in(body: Mapping[str, object]) -> JobId | None:
    drawing = body.get("drawing")
    job_id = drawing.get("job_id") if isinstance(drawing, Mapping) else body.get("job_id")
    return JobId(job_id) if isinstance(job_id, str) else None


def encode_options(options: EngineOptions) -> str:
    """The options as one JSON argument for the child's command line."""
    return json.dumps(to_plain(options, []), allow_nan=False)


def decode_options(text: str) -> EngineOptions:
    """The inverse of `encode_options`; absent fields keep their defaults. Raises ValueError with what does not fit."""
    try:
        return cast("EngineOptions", from_plain(EngineOptions, json.loads(text), [], where="options"))
    except Misfit as exc:
        raise ValueError(str(exc)) from exc
