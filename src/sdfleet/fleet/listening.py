"""What the router hears of its nodes: who they are, how they stand, how their jobs go, what they need.

A node may say anything. Only those who may take part are heeded, what makes no sense is noted and left, and nothing
that a node says costs more than the node has jobs.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from sdfleet.domain import JobId, Picture
from sdfleet.errors import JobCancelled
from sdfleet.fleet.errand import Errand
from sdfleet.fleet.members import Member, Members, with_progress
from sdfleet.fleet.messages import BlobPart, Cancel, Failure, Heartbeat, Hello, JobNews, RunAnswer, SayHello, WantBlob
from sdfleet.fleet.packing import CHUNK_BYTES, BrokenMessage, pack, unpack
from sdfleet.fleet.signing import is_lease
from sdfleet.fleet.state import RunningJob
from sdfleet.fleet.subjects import inbox_of, node_of
from sdfleet.fleet.throne import Throne
from sdfleet.fleet.transport import Bus, Incoming
from sdfleet.fleet.underway import UnderWay
from sdfleet.fleet.voice import Voice

log = logging.getLogger(__name__)

# The job was taken and is named by no heartbeat: the node has lost it, and is asked again.
MISSING_BEATS = 4
# Jobs of one heartbeat that are told to be of no use; the next heartbeat names the others again.
MOST_CANCELLED = 32


class Listening:
    """See the file's first lines. secret: what leases are made with.

    is_open: whether a job has not ended; None while that is not known. offered: called with a job of no errand that has
    not ended, as far as is known, and the node that has it. free: called when a job takes no room at a node any more.
    moved: called with a node whose heartbeat was taken in.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        members: Members,
        under_way: UnderWay,
        voice: Voice,
        throne: Throne,
        secret: bytes,
        is_open: Callable[[JobId], bool | None],
        offered: Callable[[JobId, str], None],
        free: Callable[[str, JobId], None],
        moved: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._members = members
        self._under_way = under_way
        self._voice = voice
        self._throne = throne
        self._secret = secret
        self._is_open = is_open
        self._offered = offered
        self._free = free
        self._moved = moved

    async def open(self) -> None:
        """Begin to listen. Raises StoreUnavailable."""
        for what, handler in (
            ("hb", self._on_heartbeat),
            ("hello", self._on_hello),
            ("ev.*", self._on_news),
            ("ans.*", self._on_answer),
            ("blob", self._on_blob),
        ):
            await self._bus.subscribe(f"fleet.up.*.{what}", self._guarded(handler))

    def _guarded(self, handler: Callable[[str, Incoming], Awaitable[None]]) -> Callable[[Incoming], Awaitable[None]]:
        """Only from those who may take part; what makes no sense is noted and left."""

        async def heed(message: Incoming) -> None:
            try:
                node = node_of(message.subject)
                if self._members.get(node) is not None:
                    await handler(node, message)
            except BrokenMessage as exc:
                log.warning("a message makes no sense", extra={"subject": message.subject, "why": str(exc)[:200]})

        return heed

    async def _on_hello(self, node: str, message: Incoming) -> None:
        self._members.take_hello(node, unpack(Hello, message.data))

    async def _on_heartbeat(self, node: str, message: Incoming) -> None:
        beat = unpack(Heartbeat, message.data)
        if not self._members.take_heartbeat(node, beat) and self._throne.is_held:
            await self._voice.tell(node, "hello", SayHello(epoch=self._throne.epoch))
        member = self._members.get(node)
        if member is None or member.heartbeat is not beat:
            return
        self._follow_progress(member, beat)
        for errand in self._under_way.at(node):
            self._compare(errand, member, beat)
        useless = [job for job in member.held() if not self._has_use(node, job)]
        for job in useless[:MOST_CANCELLED]:
            # The lease matters to nobody any more.
            await self._voice.tell(node, "cancel", Cancel(job=job, lease="", epoch=self._throne.epoch))
        self._moved(node)

    def _follow_progress(self, member: Member, beat: Heartbeat) -> None:
        now_s, found = self._members.now_s(), []
        for running in beat.running:
            part_left = 1.0 - min(1.0, max(0.0, running.part))
            sent, errand = member.sent.get(running.job), self._under_way.errands.get(running.job)
            if sent is not None and errand is not None:
                units = sent.megapixels * errand.prepared.drawing.steps
                member.sent[running.job] = with_progress(sent, part_left=part_left, units=units, now_s=now_s)
            elif sent is None and (errand is None or errand.node != member.node or not errand.is_computed):
                # It was not sent there by this router now, but it takes a place.
                one = RunningJob(
                    job_id=running.job, model=next(iter(beat.loaded), ""), megapixels=0.0,
                    n_pictures=max(1, running.n_pictures), picture_units_left=0.0, as_of_s=now_s,
                )  # fmt: skip
                found.append(one)
        member.found = tuple(found)

    def _compare(self, errand: Errand, member: Member, beat: Heartbeat) -> None:
        """What a node's heartbeat says of a job that it was given."""
        if not errand.is_taken or errand.is_lost:
            return
        if errand.boot and beat.boot != errand.boot:
            if member.has(errand.job):
                errand.ask_again()
            else:
                errand.lose("its process was started again")
            return
        errand.boot = beat.boot
        if not errand.is_computed and any(each.job == errand.job for each in beat.spool):
            self._computed(errand)  # the news of it was lost
        errand.n_missing = 0 if member.has(errand.job) else errand.n_missing + 1
        if errand.n_missing >= MISSING_BEATS and not errand.expected.arrived.done():
            errand.ask_again()

    def _has_use(self, node: str, job: JobId) -> bool:
        """A job that a node has: awaited, offered to the line, or of no use to anybody (False)."""
        under_way = self._under_way
        homeless = under_way.homeless.get(job)
        if homeless is not None:
            # Its node was thought lost, and has it.
            if node not in under_way.not_on.get(job, {}):
                homeless.moves_to(node)
            return True
        if job in under_way.errands or job in under_way.expected or job in under_way.assigned:
            return True
        is_open = self._is_open(job)
        if is_open is not False:
            # Not known yet is no reason to have it drawn elsewhere when it comes.
            self._offered(job, node)
        return is_open is not False or not self._throne.is_held

    async def _on_news(self, node: str, message: Incoming) -> None:
        news = unpack(JobNews, message.data)
        errand = self._under_way.errands.get(news.job)
        if errand is None or errand.node != node or news.lease != errand.lease:
            return
        match news.phase:
            case "step":
                errand.take(news)
            case "computed":
                self._computed(errand)
            case "dropped":
                arrived = errand.expected.arrived
                if errand.is_cancelled and not arrived.done():
                    error = JobCancelled(f"job {news.job} was cancelled")
                    arrived.set_result((node, Failure(job_id=news.job, error=error)))

    def _computed(self, errand: Errand) -> None:
        """The device has room again, whenever the pictures have been sent."""
        errand.is_computed = True
        self._free(errand.node, errand.job)

    async def _on_answer(self, node: str, message: Incoming) -> None:
        answer = unpack(RunAnswer, message.data)
        errand = self._under_way.errands.get(answer.job)
        if errand is not None and errand.node == node and errand.lease == answer.lease:
            errand.answered(answer)

    async def _on_blob(self, node: str, message: Incoming) -> None:
        """A node wants pixels of an input picture of a job that it was given."""
        if not self._throne.is_held:
            return
        if not message.reply.startswith(f"{inbox_of(node)}."):
            log.warning("a node asked to be answered elsewhere", extra={"node": node, "reply": message.reply[:80]})
            return
        want = unpack(WantBlob, message.data)
        part = BlobPart(why="this job was not given to this node, or has ended")
        errand = self._under_way.errands.get(want.job)
        if errand is not None and is_lease(self._secret, want.lease, job=want.job, node=node):
            picture = _input_of(errand, want.sha256)
            if picture is not None and 0 <= want.offset < len(picture.data):
                part = BlobPart(data=picture.data[want.offset : want.offset + CHUNK_BYTES])
        await self._bus.publish(message.reply, pack(part))


def _input_of(errand: Errand, sha256: str) -> Picture | None:
    request, blobs = errand.prepared.request, errand.expected.blobs
    if blobs is None:
        return None
    pairs = zip((request.image, request.mask), blobs, strict=True)
    return next((picture for picture, blob in pairs if blob is not None and blob.sha256 == sha256), None)
