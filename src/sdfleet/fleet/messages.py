"""What a router and its nodes say to each other; as bytes, see packing.py.

    fleet.n.<node>.run, cancel, watch, order, hello     router -> node, each signed (see signing.py)
    fleet.up.<node>.hb, hello, ev, ans.<id>             node -> router, over the control connection
    fleet.up.<node>.res, blob                           node -> router, over the bulk connection; answered to the
                                                        node's own inbox and nowhere else

Times are seconds. `job` is the id of a job; `lease` proves that the router gave that job to that node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sdfleet.catalog.hubs.hub import Source
from sdfleet.domain import MAX_IMAGES, ImageRequest, ImageResult, JobId, Picture
from sdfleet.errors import SdfleetError
from sdfleet.fleet.packing import BrokenMessage, pack, unpack
from sdfleet.language.asking import LanguageModel, Speaking

# 64 pictures of 4096x4096 would be 3 GB; a job that large is answered in parts by nobody.
MAX_RESULT_BYTES = 2**30
# Chunks on their way that were not acknowledged: a slow reader loses nothing, a heartbeat waits for at most these.
CREDIT_WINDOW = 3
HEARTBEAT_S = 2.0
SUSPECT_S = 6.0
DEAD_S = 15.0

Verdict = Literal["ok", "have", "busy", "refuse"]
Phase = Literal["step", "computed", "dropped"]
Orders = Literal["load", "unload", "pin", "unpin", "plan", "pull", "stop", "forget"]


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


def pack_outcome(outcome: Outcome) -> bytes:
    """How a job ended, as a node keeps it in its spool and sends it in chunks; without folders and input pictures."""
    if isinstance(outcome, Failure):
        return pack(_Outcome(failure=outcome), max_blobs=0, max_bytes=0)
    # The router has its own, of which it knows no folder. LoRAs and embeddings are told with their contents alone.
    loras = tuple(replace(one, file=replace(one.file, path="")) for one in outcome.drawing.loras)
    embeddings = tuple(replace(one, path="") for one in outcome.drawing.embeddings)
    drawing = replace(outcome.drawing, checkpoint="", image=None, mask=None, loras=loras, embeddings=embeddings)
    result = replace(outcome, drawing=drawing)
    return pack(_Outcome(result=result), max_blobs=MAX_IMAGES, max_bytes=MAX_RESULT_BYTES)


def unpack_outcome(data: bytes) -> Outcome:
    """The inverse of `pack_outcome`. Raises BrokenMessage."""
    found = unpack(_Outcome, data, max_blobs=MAX_IMAGES)
    outcome = found.result or found.failure
    if outcome is None:
        raise BrokenMessage("an outcome that is neither a result nor a failure")
    return outcome
