"""How the router takes in what nodes have finished: chunk by chunk, checked, and answered to that node's inbox alone.

A node may lie. What it sends must be of a job that was given to it (the lease says so), of the announced hash, no
larger than such a result can be, and the pictures that were asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from sdfleet.domain import Drawing, ImageResult, JobId
from sdfleet.errors import SdfleetError
from sdfleet.fleet.messages import MAX_RESULT_BYTES, Chunk, ChunkAnswer, Failure, Outcome, PictureBlob, unpack_outcome
from sdfleet.fleet.packing import MAX_HEADER_BYTES, BrokenMessage, pack, unpack
from sdfleet.fleet.shipping import sha256_of
from sdfleet.fleet.signing import is_lease
from sdfleet.fleet.subjects import inbox_of, node_of
from sdfleet.fleet.transport import Bus, Incoming

log = logging.getLogger(__name__)

# Larger outcomes are looked at in a thread.
_LARGE_BYTES = 2**20
# A result may be damaged on its way; one that is wrong so often is wrong at the node.
MOST_BROKEN = 3


class BrokenResult(SdfleetError):
    """A node has sent results that are not what was asked for; another may do better."""

    code = "broken_result"
    http_status = 502


@dataclass(slots=True, eq=False)
class Expected:
    """What may come for one open job. drawing: what was asked for; says how large a result can be.

    arrived: the outcome and the node it came from. stored: set when the job has ended in the store: True if with these
    pictures. node, lease: who has the job now. n_broken: its results that were refused. blobs: the job's input
    pictures, once they were hashed.
    """

    job: JobId
    drawing: Drawing
    arrived: asyncio.Future[tuple[str, Outcome]]
    stored: asyncio.Future[bool]
    node: str = ""
    lease: str = ""
    n_broken: int = 0
    blobs: tuple[PictureBlob | None, PictureBlob | None] | None = None

    @classmethod
    def of(cls, drawing: Drawing) -> Expected:
        """Nothing has come yet."""
        loop = asyncio.get_running_loop()
        return cls(job=drawing.job_id, drawing=drawing, arrived=loop.create_future(), stored=loop.create_future())

    @property
    def most_bytes(self) -> int:
        """What a true result cannot exceed."""
        width, height = self.drawing.resize_to or (self.drawing.width_px, self.drawing.height_px)
        return min(self.drawing.n_images * 3 * width * height + MAX_HEADER_BYTES, MAX_RESULT_BYTES + MAX_HEADER_BYTES)


@dataclass(slots=True, eq=False)
class _Inbound:
    total: int
    sha256: str
    data: bytearray = field(default_factory=bytearray)
    is_whole: bool = False


class Receiving:
    """Handler of `fleet.up.*.res`. secret: what leases were made with.

    reigns: whether this router is to answer at all: another may share the broker. is_member: whether a
    node may take part. expected: what is awaited of a job;
    None where nobody awaits it. is_open: whether a job has not ended; None while this router does not know its jobs.
    offered: called with an open job that nobody awaits, and the node that has its outcome.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        secret: bytes,
        reigns: Callable[[], bool],
        is_member: Callable[[str], bool],
        expected: Callable[[JobId], Expected | None],
        is_open: Callable[[JobId], bool | None],
        offered: Callable[[JobId, str], None],
    ) -> None:
        self._bus = bus
        self._secret = secret
        self._reigns = reigns
        self._is_member = is_member
        self._expected = expected
        self._is_open = is_open
        self._offered = offered
        self._inbound: dict[tuple[JobId, str], _Inbound] = {}
        self._answering: set[asyncio.Future[None]] = set()

    def forget(self, job: JobId) -> None:
        """The job has ended: what came in of it so far is let go."""
        for key in [key for key in self._inbound if key[0] == job]:
            del self._inbound[key]

    async def close(self) -> None:
        """Answer nobody any more."""
        for task in self._answering:
            task.cancel()
        if self._answering:
            await asyncio.wait(self._answering)

    async def take(self, message: Incoming) -> None:
        """One chunk."""
        if not self._reigns():
            return  # the router that does answers; two answers would contradict each other
        try:
            node = node_of(message.subject)
            chunk = unpack(Chunk, message.data)
        except BrokenMessage as exc:
            log.warning("a chunk makes no sense", extra={"subject": message.subject, "why": str(exc)[:200]})
            return
        if not self._is_member(node):
            log.warning("a node that may not take part sent a result", extra={"node": node, "job_id": chunk.job})
            return
        if not message.reply.startswith(f"{inbox_of(node)}."):
            # The router may say what a node may not: it answers nowhere but in the node's own inbox.
            log.warning("a node asked to be answered elsewhere", extra={"node": node, "reply": message.reply[:80]})
            return
        if not is_lease(self._secret, chunk.lease, job=chunk.job, node=node):
            log.warning("a node sent a result of a job it was not given", extra={"node": node, "job_id": chunk.job})
            await self._answer(message, ChunkAnswer(verdict="dup", why="this job was not given to this node"))
            return
        expected = self._expected(chunk.job)
        if expected is None or expected.arrived.done():
            await self._answer_late(message, node, chunk, expected)
            return
        if chunk.total > expected.most_bytes or not 0 <= chunk.offset < max(1, chunk.total):
            log.warning("a node sent more than was asked for", extra={"node": node, "job_id": chunk.job})
            await self._answer(message, ChunkAnswer(verdict="refuse", why=f"{chunk.total} bytes are too many"))
            return
        await self._take_in(message, node, chunk, expected)

    async def _answer_late(self, message: Incoming, node: str, chunk: Chunk, expected: Expected | None) -> None:
        """Nobody awaits this chunk (any more)."""
        if expected is not None:
            if expected.arrived.result()[0] == node:
                # Again, from a node that waits for its answer.
                self._spawn(self._answer_when_stored(message, expected))
            else:
                await self._answer(message, ChunkAnswer(verdict="dup", why="another node was faster"))
            return
        is_open = self._is_open(chunk.job)
        if is_open is not False:
            self._offered(chunk.job, node)
            await self._answer(message, ChunkAnswer(verdict="refuse", why="not now: the job waits for its turn"))
        else:
            await self._answer(message, ChunkAnswer(verdict="dup", why="the job has ended"))

    async def _take_in(self, message: Incoming, node: str, chunk: Chunk, expected: Expected) -> None:
        key = chunk.job, node
        inbound = self._inbound.get(key)
        if inbound is None or (inbound.total, inbound.sha256) != (chunk.total, chunk.sha256):
            inbound = self._inbound[key] = _Inbound(total=chunk.total, sha256=chunk.sha256)
        if chunk.offset != len(inbound.data):
            await self._answer(message, ChunkAnswer(verdict="again", offset=len(inbound.data)))
            return
        if len(inbound.data) + len(chunk.data) > chunk.total:
            del self._inbound[key]
            await self._answer(message, ChunkAnswer(verdict="refuse", why="more bytes than announced"))
            return
        inbound.data += chunk.data
        if len(inbound.data) < inbound.total:
            await self._answer(message, ChunkAnswer(verdict="ok"))
            return
        del self._inbound[key]
        self._spawn(self._open(message, node, chunk.lease, expected, inbound))

    async def _open(self, message: Incoming, node: str, lease: str, expected: Expected, inbound: _Inbound) -> None:
        """Everything is here: look at it, hand it over, and answer when it is stored."""
        data = inbound.data
        try:
            outcome = await _off_loop(len(data), lambda: _opened(data, inbound.sha256, expected.drawing))
        except BrokenMessage as exc:
            log.warning("a result was refused", extra={"node": node, "job_id": expected.job, "why": str(exc)[:200]})
            await self._refuse(message, node, lease, expected, str(exc)[:200])
            return
        if isinstance(outcome, Failure) and lease != expected.lease and not expected.arrived.done():
            # Of an attempt that was given up, or cancelled before somebody asked for another try: it says nothing about
            # this one. A picture is the same whoever drew it when.
            is_current = node == expected.node
            answer = ChunkAnswer(verdict="refuse" if is_current else "dup", why="of an older attempt")
            await self._answer(message, answer)
            return
        if not expected.arrived.done():
            expected.arrived.set_result((node, outcome))
        elif expected.arrived.result()[0] != node:
            await self._answer(message, ChunkAnswer(verdict="dup", why="another node was faster"))
            return
        await self._answer_when_stored(message, expected)

    async def _refuse(self, message: Incoming, node: str, lease: str, expected: Expected, why: str) -> None:
        """A result is not what was asked for: it is wanted again, a few times; then the job goes to another node."""
        if lease == expected.lease and not expected.arrived.done():
            expected.n_broken += 1
            if expected.n_broken >= MOST_BROKEN:
                error = BrokenResult(f"node {node} sends results that cannot be used: {why}", hint="see its log")
                expected.arrived.set_result((node, Failure(job_id=expected.job, error=error)))
                await self._answer(message, ChunkAnswer(verdict="dup", why=why))
                return
        await self._answer(message, ChunkAnswer(verdict="again", offset=0, why=why))

    async def _answer_when_stored(self, message: Incoming, expected: Expected) -> None:
        is_stored = await asyncio.shield(expected.stored)
        await self._answer(message, ChunkAnswer(verdict="stored" if is_stored else "dup"))

    async def _answer(self, message: Incoming, answer: ChunkAnswer) -> None:
        await self._bus.publish(message.reply, pack(answer))

    def _spawn(self, work: Awaitable[None]) -> None:
        task: asyncio.Future[None] = asyncio.ensure_future(work)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)


async def _off_loop(n_bytes: int, work: Callable[[], Outcome]) -> Outcome:
    return work() if n_bytes < _LARGE_BYTES else await asyncio.to_thread(work)


def _opened(data: bytes | bytearray, sha256: str, drawing: Drawing) -> Outcome:
    """The outcome in these bytes, if it is what was asked for. Raises BrokenMessage."""
    if sha256_of(data) != sha256:
        raise BrokenMessage("it does not have the hash that was announced")
    outcome = unpack_outcome(bytes(data))
    if outcome.job_id != drawing.job_id:
        raise BrokenMessage(f"it is of job {outcome.job_id[:80]!r}")
    if isinstance(outcome, ImageResult):
        _check(outcome, drawing)
    return outcome


def _check(result: ImageResult, drawing: Drawing) -> None:
    seeds = {drawing.seed + index for index in range(drawing.n_images)}
    size = drawing.resize_to or (drawing.width_px, drawing.height_px)
    n_missing = drawing.n_images - len(result.images) - len(result.withheld)
    if n_missing or not all(image.seed in seeds for image in result.images):
        raise BrokenMessage(f"{len(result.images)} pictures are not the {drawing.n_images} that were asked for")
    smaller = "smaller_picture" in result.rungs and drawing.allow_degraded
    for image in result.images:
        got = (image.picture.width_px, image.picture.height_px)
        if got != size and not smaller:
            raise BrokenMessage(f"a picture is {got[0]}x{got[1]}, not {size[0]}x{size[1]}")
