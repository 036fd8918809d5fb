"""What a router and its nodes say to each other about text, embeddings and speech; as bytes, see also packing.py.

    fleet.n.<node>.chat, embed, stt     a request for one node                        router -> node, signed
    fleet.n.<node>.credit, hush         go on to that byte; stop                      router -> node, signed
    fleet.up.<node>.tok.<req>           the answer, numbered; signs of life           node -> router, control connection
    fleet.up.<node>.want                the rest of a request that is long            node -> router, bulk connection

Nothing of it is written down: a request is given to one node, and to another only while nothing of an answer has come.
A gap in the numbers is an error, never a silent splice. A node sends no more than `WINDOW_BYTES` beyond what the router
says its reader has taken, so a slow reader holds no memory anywhere but in its own answer's window.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast, get_args

from sdfleet.fleet.packing import VERSION, BrokenMessage, pack, unpack
from sdfleet.language.asking import EMBEDDING, SPEECH, Ask, Door, LanguageModel, Sound

# One message of an answer. The control connection carries heartbeats too; with the window, 256 KiB wait before them.
PIECE_BYTES = 2**16
WINDOW_BYTES = 2**18
# A reader's progress is told each time it has taken so much.
CREDIT_STEP_BYTES = WINDOW_BYTES // 4
# A request takes longer only to compute, not to be heard.
HEARD_WITHIN_S = 2.0
# A node says so often that it still works on an answer, and is taken for lost after so long without a word.
ALIVE_EVERY_S = 1.0
SILENT_S = 5.0
# The same for the router, which answers every sign of life.
ROUTER_SILENT_S = 15.0
# Beyond any SD_MAX_BODY that makes sense: a recording, or pictures in base64.
MAX_ASK_BYTES = 2**29

_LENGTH = struct.Struct(">I")
_PLAIN = struct.Struct(">BBQ")


class UnknownDoor(BrokenMessage):
    """A request for a route that this version does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """A request. n_bytes: of `pack_ask`; data: its beginning, the rest is asked for with `WantRest`."""

    req: str
    epoch: int
    n_bytes: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """The answer may be sent up to this byte; also the router's sign of life."""

    req: str
    epoch: int
    to_byte: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hush:
    """Nobody wants the answer any more."""

    req: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WantRest:
    """A node asks for the bytes of a request from `offset` on; answered with a `BlobPart`."""

    req: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A part of an answer. seq: from 0, without a gap. model: with the first bytes, which one answers.

    data: pieces with a line feed after each where the request streams, else bytes of the only one. is_asking: the
    router is to answer with a `Credit`. is_end: nothing follows; with an error, the answer failed.
    """

    req: str
    seq: int
    data: bytes = field(default=b"", repr=False)
    is_asking: bool = False
    is_end: bool = False
    model: LanguageModel | None = None
    error: Mapping[str, str] | None = None


def subject_of(door: Door) -> str:
    """Which of a node's subjects a request goes to.

    >>> subject_of("/api/chat"), subject_of("/v1/embeddings"), subject_of("/api/transcribe")
    ('chat', 'embed', 'stt')
    """
    return "stt" if door in SPEECH else "embed" if door in EMBEDDING else "chat"


def pack_said(said: Said) -> bytes:
    """The payload of a part. One that carries nothing but data is 10 bytes and that data: there is one for each token.

    The other form begins with the length of a header, whose first byte is 0.

    >>> pack_said(Said(req="r", seq=7, data=b"x"))[:10].hex()
    '01000000000000000007'
    """
    if said.model is None and said.error is None:
        flags = said.is_asking | said.is_end << 1
        return _PLAIN.pack(VERSION, flags, said.seq) + said.data
    return pack(said)


def unpack_said(req: str, payload: bytes) -> Said:
    """The inverse of `pack_said`. req: the last part of the subject. Raises BrokenMessage."""
    if payload[:1] != bytes([VERSION]):
        return unpack(Said, payload)
    if not _PLAIN.size <= len(payload) <= _PLAIN.size + PIECE_BYTES:
        raise BrokenMessage(f"a part of {len(payload)} bytes")
    _, flags, seq = _PLAIN.unpack_from(payload)
    data = payload[_PLAIN.size :]
    return Said(req=req, seq=seq, data=data, is_asking=bool(flags & 1), is_end=bool(flags & 2))


def pack_ask(ask: Ask) -> bytes:
    """A request as bytes: the length of its JSON, the JSON, the recording."""
    sound = None if ask.sound is None else {"name": ask.sound.name, "kind": ask.sound.kind}
    facts = {"door": ask.door, "model": ask.model, "body": ask.body, "sound": sound}
    text = json.dumps(facts, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(text)), text, b"" if ask.sound is None else ask.sound.data))


def unpack_ask(data: bytes) -> Ask:
    """The inverse of `pack_ask`. Raises UnknownDoor, and BrokenMessage for whatever makes no sense."""
    if len(data) < _LENGTH.size:
        raise BrokenMessage("no request")
    (n_text,) = _LENGTH.unpack_from(data)
    try:
        facts = json.loads(data[_LENGTH.size : _LENGTH.size + n_text])
        door, model, body, sound = facts["door"], facts["model"], facts["body"], facts["sound"]
        if not isinstance(door, str) or not isinstance(model, str) or not isinstance(body, dict):
            raise BrokenMessage("a request whose parts are of the wrong kind")
        if door not in get_args(Door):
            raise UnknownDoor(f"a request for {door[:80]!r}")
        heard = None
        if sound is not None:
            heard = Sound(name=str(sound["name"]), kind=str(sound["kind"]), data=data[_LENGTH.size + n_text :])
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise BrokenMessage(f"a request that cannot be read: {type(exc).__name__}") from exc
    return Ask(door=cast("Door", door), model=model, body=body, sound=heard)
