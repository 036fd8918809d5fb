"""What a router and its nodes say to each other, and how that is put into bytes.

One message is one payload on the bus:

    4 bytes   length of the header, big endian
    header    JSON object: {"v": 1, "blobs": [49152], ...the fields of the message}
    blobs     the raw bytes that the header declared, one after the other

Subjects tell which message it is, so a payload has no type of its own. Fields that a reader does not know are ignored,
so that a node and a router may differ by a version; another `v` is refused. What is drawn (`ImageRequest`) is read
strictly: a node that does not know a field of it must not draw without it. Nothing here is code, a pickle or a path.

    fleet.n.<node>.run, cancel, watch, order, hello     router -> node, each signed (see `sign`)
    fleet.up.<node>.hb, hello, ev, ans.<id>             node -> router, over the control connection
    fleet.up.<node>.res, blob                           node -> router, over the bulk connection; answered to the
                                                        node's own inbox and nowhere else

Times are seconds. `job` is the id of a job; `lease` proves that the router gave that job to that node.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

from sdfleet.catalog.hubs.hub import Source
from sdfleet.domain import MAX_IMAGES, ImageRequest, ImageResult, JobId, Picture
from sdfleet.errors import SdfleetError
from sdfleet.language.asking import LanguageModel, Speaking
from sdfleet.plain import Misfit, from_plain, to_plain

VERSION = 1
# A prompt of 32 000 characters, every one escaped, is 400 kB; the broker takes 1 MB.
MAX_HEADER_BYTES = 2**19
# What one payload may carry beside its header; larger things travel in chunks.
CHUNK_BYTES = 2**18
MAX_BLOBS = 8
# 64 pictures of 4096x4096 would be 3 GB; a job that large is answered in parts by nobody.
MAX_RESULT_BYTES = 2**30
# Chunks on their way that were not acknowledged: a slow reader loses nothing, a heartbeat waits for at most these.
CREDIT_WINDOW = 3

# The header of everything that a node is told: `sign` of the rest.
SIGNATURE = "Sdfleet-Signature"

HEARTBEAT_S = 2.0
SUSPECT_S = 6.0
DEAD_S = 15.0

_LENGTH = struct.Struct(">I")
_NODE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

T = TypeVar("T")
Verdict = Literal["ok", "have", "busy", "refuse"]
Phase = Literal["step", "computed", "dropped"]
Orders = Literal["load", "unload", "pin", "unpin", "plan", "pull", "stop", "forget"]
ModelState = Literal["on_disk", "loaded"]


class BrokenMessage(Exception):
    """A payload makes no sense. Caught by whoever reads it, who logs it and goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureBlob:
    """An input picture, too large for one message: the node asks for its pixels in chunks. sha256: lower-case hex."""

    width_px: int
    height_px: int
    mode: Literal["RGB", "L"]
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Draw this job. Idempotent by job: said again with the same lease, it is answered with `have`.

    request: nothing left open; without its input pictures, which are `image` and `mask`.
    attempt: how often the job was begun. epoch: of the router; a node refuses a lower one than it has seen.
    budget_s: after so many seconds nobody wants it any more; None: no limit.
    """

    job: JobId
    lease: str
    attempt: int
    epoch: int
    request: ImageRequest
    image: PictureBlob | None = None
    mask: PictureBlob | None = None
    wants_previews: bool = False
    budget_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAnswer:
    """ok: it is begun. have: it was begun, or is done and waits to be fetched. busy: no slot. refuse: never here."""

    job: JobId
    lease: str
    verdict: Verdict
    free_in_s: float | None = None
    error: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop after the step that runs, and forget what was drawn."""

    job: JobId
    lease: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Start or stop sending previews of a job."""

    job: JobId
    previews: bool
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Do something with a model.

    plan: say what a pull would bring. stop: end what the order of this id began. consent: the id of the plan that
    somebody said yes to, for this node; nothing else is pulled. source: of the weights; None for the node's choice.
    """

    id: str
    order: Orders
    model: str
    epoch: int
    consent: str = ""
    source: Source | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderAnswer:
    """What became of an order, or, before its last answer, how it goes. facts: of a plan that wants a yes, say."""

    id: str
    is_last: bool = True
    error: Mapping[str, str] | None = None
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SayHello:
    """Tell who you are (answered by a Hello); sent to a node that is heard and not known."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHere:
    """A model on a node's disk. identity: hash of what decides its pictures; two nodes' models of one name must agree.

    card, found: as the node's catalog has them, without folders.
    """

    name: str
    identity: str
    n_bytes: int
    card: Mapping[str, object]
    found: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterHere:
    """A LoRA or an embedding on a node's disk. family: which it is for, "" where its file does not tell.

    content: as in `AdapterFile`, "" until the node has read the whole file. widths: of an embedding's vectors.
    metadata: the little of its maker's that lists show.
    """

    kind: Literal["lora", "embedding"]
    name: str
    n_bytes: int
    family: str = ""
    content: str = ""
    widths: Mapping[str, int] | None = None
    n_vectors: int = 0
    word: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who a node is. Sent when it starts, when its models change, and when asked.

    boot: new with every start of the node's process. hello: counts up whenever this message says something new.
    slots: pictures that may be drawn at once. facts: hardware for people and /fleet/status (JSON values).
    language: models that write, embed or listen, as they are while they are not used.
    """

    boot: str
    hello: int
    name: str
    version: str
    device: str
    slots: int
    models: tuple[ModelHere, ...] = ()
    adapters: tuple[AdapterHere, ...] = ()
    memory_bytes: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)
    language: tuple[LanguageModel, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningJob:
    """A job being drawn. part: 0 to 1 done; eta_s: to the end of its computing, None until a step was timed."""

    job: JobId
    lease: str
    n_pictures: int
    part: float
    eta_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A job's result that lies in the node's spool until the router says it is stored."""

    job: JobId
    lease: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCurve:
    """Measured seconds of one step by pictures drawn together (rows_s[k] for k + 1 pictures; 0 where unmeasured).

    work: megapixels of the pictures that it was measured with.
    """

    model: str
    work: float
    rows_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """How a node stands, every two seconds and at every change of a slot.

    memory_free_bytes: that pictures may use: what language models hold, or are about to, is not among it.
    """

    boot: str
    seq: int
    hello: int
    slots: int
    free: int
    running: tuple[RunningJob, ...] = ()
    spool: tuple[Held, ...] = ()
    loaded: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    memory_free_bytes: int = 0
    memory_total_bytes: int = 0
    cpu_percent: float = 0.0
    curves: tuple[StepCurve, ...] = ()
    state: str = "ready"
    reason: str = ""
    is_leaving: bool = False
    language: tuple[Speaking, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobNews:
    """Something happened to a job on a node. computed: its slot is free, the pictures are in the spool.

    dropped: the node was told to cancel the job, and has nothing of it (any more).
    seq: counts up for each job of a node; what comes late is not heeded.
    """

    job: JobId
    lease: str
    seq: int
    phase: Phase
    image_index: int = 0
    step: int = 0
    n_steps: int = 0
    eta_s: float | None = None
    preview: Picture | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A job ended on a node without pictures."""

    job_id: JobId
    error: SdfleetError


Outcome = ImageResult | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    result: ImageResult | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a packed outcome (`pack_outcome`): bytes `offset` to `offset + len(data)` of `total`, of that sha256.

    The last one is answered when the router has stored the whole.
    """

    job: JobId
    lease: str
    offset: int
    total: int
    sha256: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkAnswer:
    """ok: go on. again: send from `offset`. stored: it is on the router's disk, forget it. dup: nobody wants it."""

    verdict: Literal["ok", "again", "stored", "dup", "refuse"]
    offset: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantBlob:
    """A node asks for bytes of an input picture of a job it was given."""

    job: JobId
    lease: str
    sha256: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobPart:
    """The bytes from that offset; empty with a `why` where they are not given."""

    data: bytes = field(default=b"", repr=False)
    why: str = ""


def pack(message: object) -> bytes:
    """The payload of a message. Raises BrokenMessage where it is too large to send."""
    return _packed(message, max_blobs=MAX_BLOBS, max_bytes=CHUNK_BYTES)


def pack_outcome(outcome: Outcome) -> bytes:
    """How a job ended, as a node keeps it in its spool and sends it in chunks; without folders and input pictures."""
    if isinstance(outcome, Failure):
        return _packed(_Outcome(failure=outcome), max_blobs=0, max_bytes=0)
    # The router has its own, of which it knows no folder. LoRAs and embeddings are told with their contents alone.
    loras = tuple(replace(one, file=replace(one.file, path="")) for one in outcome.drawing.loras)
    embeddings = tuple(replace(one, path="") for one in outcome.drawing.embeddings)
    drawing = replace(outcome.drawing, checkpoint="", image=None, mask=None, loras=loras, embeddings=embeddings)
    result = replace(outcome, drawing=drawing)
    return _packed(_Outcome(result=result), max_blobs=MAX_IMAGES, max_bytes=MAX_RESULT_BYTES)


def unpack_outcome(data: bytes) -> Outcome:
    """The inverse of `pack_outcome`. Raises BrokenMessage."""
    found = unpack(_Outcome, data, max_blobs=MAX_IMAGES)
    outcome = found.result or found.failure
    if outcome is None:
        raise BrokenMessage("an outcome that is neither a result nor a failure")
    return outcome


def _packed(message: object, *, max_blobs: int, max_bytes: int) -> bytes:
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


def sign(secret: bytes, subject: str, payload: bytes) -> str:
    """HMAC-SHA256 (RFC 2104) of a message to a node, in hex: only who has the node's secret gives it orders.

    The subject is part of it, so that nothing said to one node can be said to another.
    """
    return hmac.new(secret, subject.encode() + b"\0" + payload, hashlib.sha256).hexdigest()


def is_signed(secret: bytes, subject: str, payload: bytes, signature: str) -> bool:
    """Whether `signature` is `sign`'s, compared in constant time."""
    return hmac.compare_digest(sign(secret, subject, payload).encode(), signature.encode("utf-8", "replace"))


def lease_for(secret: bytes, *, job: JobId, node: str, attempt: int) -> str:
    """A token of 128 bits that only the router can make: that it gave this attempt of this job to this node.

    Needs no memory: after a restart the router knows its leases again.
    """
    text = f"lease\0{job}\0{node}\0{attempt}"
    return f"{attempt}.{hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:32]}"


def is_lease(secret: bytes, lease: str, *, job: JobId, node: str) -> bool:
    """Whether the router gave this job to this node, at whatever attempt."""
    attempt, _, _ = lease.partition(".")
    if not (attempt.isascii() and attempt.isdigit() and len(attempt) <= 9):
        return False
    genuine = lease_for(secret, job=job, node=node, attempt=int(attempt))
    return hmac.compare_digest(genuine.encode(), lease.encode("utf-8", "replace"))


def down(node: str, what: str) -> str:
    """The subject for something said to a node."""
    return f"fleet.n.{_checked(node)}.{what}"


def up(node: str, what: str) -> str:
    """The subject for something that a node says."""
    return f"fleet.up.{_checked(node)}.{what}"


def node_of(subject: str) -> str:
    """Whose subject this is; the broker lets only that node write to it. Raises BrokenMessage."""
    parts = subject.split(".")
    if len(parts) < 4 or parts[0] != "fleet" or parts[1] not in {"up", "n"} or not is_node_id(parts[2]):
        raise BrokenMessage(f"{subject[:80]!r} is no subject of the fleet")
    return parts[2]


def inbox_of(node: str) -> str:
    """The only subjects on which a node is answered."""
    return f"_INBOX_{_checked(node)}"


def is_node_id(text: str) -> bool:
    """Whether this may name a node: small letters, digits and dashes, at most 32.

    >>> is_node_id("mac-studio"), is_node_id("a.b"), is_node_id("*")
    (True, False, False)
    """
    return _NODE.fullmatch(text) is not None


def _checked(node: str) -> str:
    if not is_node_id(node):
        raise BrokenMessage(f"{node[:80]!r} names no node")
    return node


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
