"""Carries one job to its end: given to a node, and to the next one when that is lost, refuses or cannot.

    assigned -> `run` said every second until it is answered -> drawn there -> outcome
                lost, busy, refused, engine died -> homeless -> the chooser's next node, or the one that has it already

What is not known is not lost: a node that does not answer is asked again, with the same lease. Only another process
under its name, or 15 s of silence, sends the job to the next one. It is the same picture there: the seed is the job's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from sdfleet.backends.base import OnProgress
from sdfleet.domain import ImageResult, JobId, Picture
from sdfleet.errors import (
    Busy,
    CheckpointError,
    EngineDied,
    JobCancelled,
    NotReady,
    OutOfMemory,
    SdfleetError,
    UnknownName,
    from_wire,
)
from sdfleet.fleet.cost import Predictor
from sdfleet.fleet.errand import Errand
from sdfleet.fleet.members import Members
from sdfleet.fleet.messages import Cancel, Failure, Outcome, PictureBlob, Run, RunAnswer
from sdfleet.fleet.receiving import BrokenResult, Expected
from sdfleet.fleet.shipping import sha256_of
from sdfleet.fleet.signing import lease_for
from sdfleet.fleet.state import DeviceId, NodeId, WaitingJob
from sdfleet.fleet.subjects import up
from sdfleet.fleet.throne import Throne
from sdfleet.fleet.underway import Homeless, UnderWay
from sdfleet.fleet.voice import Voice
from sdfleet.runtime import Prepared

log = logging.getLogger(__name__)

ANSWER_S = 1.0
# Tries of a job that ends engines, each at another node where there is one; and of one whose nodes vanish.
MAX_DEATHS = 3
MAX_LOSSES = 8
# So long is a node that says it is busy left alone, unless it says more exactly.
BUSY_S = 0.25
CANCEL_PATIENCE_S = 5.0
# What says something about a node and not about the job: another may do better.
_OF_THE_NODE = (EngineDied, OutOfMemory, CheckpointError, UnknownName, Busy, BrokenResult)


class FailedOnNodes(SdfleetError):
    """Every try of a job ended its node's engine, or its node."""

    code = "failed_on_nodes"
    http_status = 503


@dataclass(frozen=True, slots=True)
class _Lost:
    """The node will not bring the job to its end."""

    why: str


@dataclass(frozen=True, slots=True)
class _Busy:
    """The node has no room; it may have in a moment."""

    free_in_s: float


@dataclass(frozen=True, slots=True)
class _Refused:
    """The node will not draw the job at all."""

    error: SdfleetError


@dataclass(frozen=True, slots=True)
class _Came:
    """The outcome, and the node it is from."""

    node: str
    outcome: Outcome


_End = _Lost | _Busy | _Refused | _Came


class Carrier:
    """See the file's first lines. secret: what leases are made with. wake: called when another job may begin.

    free: called when a job takes no room at a node any more.
    """

    def __init__(
        self,
        under_way: UnderWay,
        *,
        members: Members,
        voice: Voice,
        throne: Throne,
        predictor: Predictor,
        secret: bytes,
        wake: Callable[[], None],
        free: Callable[[str, JobId], None],
    ) -> None:
        self._under_way = under_way
        self._members = members
        self._voice = voice
        self._throne = throne
        self._predictor = predictor
        self._secret = secret
        self._wake = wake
        self._free = free
        self._n_attempts = 0

    async def carry(self, prepared: Prepared, expected: Expected, on_progress: OnProgress | None) -> ImageResult:
        """The pictures, from whichever node. Raises the job's failure, FailedOnNodes."""
        job = prepared.drawing.job_id
        tried: list[str] = []
        n_losses = 0
        assigned = self._under_way.assigned.pop(job, None)
        until_s = None if assigned is None else assigned.until_s
        node = await self._next_home(prepared) if assigned is None else assigned.node
        while True:
            errand = self._begin(prepared, expected, on_progress, node=node, until_s=until_s)
            try:
                end = await self._ended(errand)
            finally:
                self._under_way.stop(job)
                self._free(node, job)
            if errand.is_cancelled and not isinstance(end, _Came):
                raise JobCancelled(f"job {job} was cancelled")
            match end:
                case _Came(came_from, ImageResult() as result):
                    self._learn(errand, came_from, result)
                    # What its LoRAs and embeddings held the node knows.
                    told = result.drawing
                    drawing = replace(prepared.drawing, loras=told.loras, embeddings=told.embeddings)
                    return replace(result, drawing=drawing, node=came_from)
                case _Came(came_from, Failure(error=error)) if errand.is_cancelled or not _is_of_the_node(error):
                    raise error
                case _Came(came_from, Failure(error=error)):
                    # This node could not; another may. The outcome is void, and a new one is awaited.
                    expected = self._expect_anew(expected)
                    if isinstance(error, EngineDied):
                        tried.append(came_from)
                    if len(tried) >= MAX_DEATHS:
                        raise FailedOnNodes(
                            f"failed after {len(tried)} attempts on {', '.join(tried)}: {error.message}",
                            hint=error.hint,
                        )
                    self._exclude(job, came_from, error)
                    node = await self._next_home(prepared, reason=error)
                case _Refused(error):
                    self._exclude(job, node, error)
                    node = await self._next_home(prepared, reason=error)
                case _Busy(free_in_s):
                    self._members.close_for(node, free_in_s)
                    node = await self._next_home(prepared)
                case _Lost(why):
                    n_losses += 1
                    if n_losses >= MAX_LOSSES:
                        raise FailedOnNodes(f"{n_losses} nodes were lost while they drew it; the last: {node}, {why}")
                    log.warning("the job moves to another node", extra={"job_id": job, "node": node, "why": why})
                    node = await self._next_home(prepared)

    async def cancelled(self, errand: Errand) -> None:
        """Say `cancel` until the node has answered with an outcome, or for a few seconds."""
        arrived = errand.expected.arrived
        loop = asyncio.get_running_loop()
        end_s = loop.time() + CANCEL_PATIENCE_S
        while not (arrived.done() or errand.is_lost) and loop.time() < end_s:
            await self._tell_cancel(errand)
            await asyncio.wait({arrived}, timeout=ANSWER_S)
        if not (arrived.done() or errand.is_lost):
            errand.lose("it did not answer when the job was cancelled")

    async def let_go(self, expected: Expected) -> None:
        """Nobody waits for this job any more: the node that has it may stop."""
        said = Cancel(job=expected.job, lease=expected.lease, epoch=self._throne.epoch)
        await self._voice.tell(expected.node, "cancel", said)

    def review(self) -> None:
        """Look at the clock: errands of silent nodes are lost, and homeless jobs that nobody is left for go back.

        Asked again and again, so that an errand is lost however late its node was found to be silent.
        """
        now_s = asyncio.get_running_loop().time()
        for errand in list(self._under_way.errands.values()):
            if not errand.is_lost and self._members.is_silent(errand.node, since_s=errand.begun_s, now_s=now_s):
                errand.lose("it was not heard for 15 s")
        for each in list(self._under_way.homeless.values()):
            job = each.job
            able = set(self._members.at(job.model))
            if job.not_on and able and not able - {str(node) for node in job.not_on}:
                each.job = replace(job, not_on=frozenset())
                self._wake()

    # ------------------------------------------------------------------------------------------------- one errand

    def _begin(
        self,
        prepared: Prepared,
        expected: Expected,
        on_progress: OnProgress | None,
        *,
        node: str,
        until_s: float | None,
    ) -> Errand:
        job = prepared.drawing.job_id
        self._n_attempts += 1
        attempt = self._throne.epoch * 100_000 + self._n_attempts % 100_000
        lease = lease_for(self._secret, job=job, node=node, attempt=attempt)
        expected.node, expected.lease, expected.n_broken = node, lease, 0
        now_s = asyncio.get_running_loop().time()
        member = self._members.get(node)
        errand = Errand(
            prepared=prepared, expected=expected, on_progress=on_progress, node=node, lease=lease, attempt=attempt,
            begun_s=now_s, until_s=until_s, picture_s=0.0 if member is None else member.picture_s(now_s),
            wants_previews=prepared.drawing.wants_previews,
        )  # fmt: skip
        expected.arrived.add_done_callback(lambda _: errand.changed.set())
        self._under_way.begin(errand)
        return errand

    async def _ended(self, errand: Errand) -> _End:
        """How the errand ends: its outcome arrives, or the job must go elsewhere."""
        loop = asyncio.get_running_loop()
        ask_s = loop.time()
        while True:
            errand.changed.clear()
            if errand.expected.arrived.done():
                return await self._came(errand)
            if errand.is_lost:
                return _Lost(errand.why_lost)
            if errand.answer is not None and (end := self._heeded(errand, errand.answer)) is not None:
                return end
            if not errand.is_taken and loop.time() >= ask_s:
                ask_s = loop.time() + ANSWER_S
                await self._ask(errand)
            with suppress(TimeoutError):
                async with asyncio.timeout(None if errand.is_taken else max(0.0, ask_s - loop.time())):
                    await errand.changed.wait()

    async def _came(self, errand: Errand) -> _Came:
        came_from, outcome = errand.expected.arrived.result()
        if came_from != errand.node:
            await self._tell_cancel(errand)
        return _Came(came_from, outcome)

    def _heeded(self, errand: Errand, answer: RunAnswer) -> _End | None:
        """What the node's answer to `run` means; None: it has the job."""
        errand.answer = None
        match answer.verdict:
            case "ok" | "have":
                errand.is_taken = True
                errand.n_missing = 0
                member = self._members.get(errand.node)
                errand.boot = "" if member is None or member.hello is None else member.hello.boot
                return None
            case "busy":
                return _Busy(min(max(answer.free_in_s or BUSY_S, BUSY_S), ANSWER_S))
            case "refuse":
                told = answer.error
                return _Refused(NotReady("it refuses", retry_after_s=1.0) if told is None else from_wire(dict(told)))

    async def _ask(self, errand: Errand) -> None:
        if self._throne.is_held:
            run = await self._run_of(errand)
            await self._voice.tell(errand.node, "run", run, reply=up(errand.node, f"ans.{errand.job}"))

    async def _run_of(self, errand: Errand) -> Run:
        request = errand.prepared.request
        # What a LoRA's file held is known to the node, which writes it into the picture.
        loras = tuple(use if use.content else replace(use, content=None) for use in request.loras)
        image, mask = await self._blobs_of(errand)
        left_s = None if errand.until_s is None else max(0.0, errand.until_s - asyncio.get_running_loop().time())
        return Run(
            job=errand.job,
            lease=errand.lease,
            attempt=errand.attempt,
            epoch=self._throne.epoch,
            request=replace(request, image=None, mask=None, loras=loras),
            image=image,
            mask=mask,
            wants_previews=errand.wants_previews,
            budget_s=left_s,
        )

    async def _blobs_of(self, errand: Errand) -> tuple[PictureBlob | None, PictureBlob | None]:
        request, expected = errand.prepared.request, errand.expected
        if request.image is None:
            return None, None
        if expected.blobs is None:
            # Once for each job: 50 MB of pixels are hashed in 30 ms.
            expected.blobs = await asyncio.to_thread(lambda: (_blob_of(request.image), _blob_of(request.mask)))
        return expected.blobs

    async def _tell_cancel(self, errand: Errand) -> None:
        said = Cancel(job=errand.job, lease=errand.lease, epoch=self._throne.epoch)
        await self._voice.tell(errand.node, "cancel", said)

    # ------------------------------------------------------------------------------------------------ the next node

    async def _next_home(self, prepared: Prepared, *, reason: SdfleetError | None = None) -> str:
        """The next node for a job that was begun; waits for one as long as it takes.

        Raises `reason` if no node is left that could do better; dead engines are given another try everywhere.
        """
        job, model = prepared.drawing.job_id, prepared.entry.card.name
        able = set(self._members.able(prepared.request))
        excluded = self._under_way.not_on.get(job, {})
        if not able - set(excluded):
            if reason is not None and not isinstance(reason, EngineDied):
                raise reason
            excluded = {}
        lacking = set(self._members.at(model)) - able if able else set()
        waiting = replace(waiting_of(prepared), not_on=frozenset(NodeId(node) for node in {*excluded, *lacking}))
        home: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._under_way.homeless[job] = Homeless(waiting, home)
        self._wake()
        try:
            return await home
        except asyncio.CancelledError:
            if home.done() and not home.cancelled() and home.exception() is None:
                self._free(home.result(), job)  # a place was kept for it already
            raise
        finally:
            self._under_way.homeless.pop(job, None)

    def _exclude(self, job: JobId, node: str, error: SdfleetError) -> None:
        self._under_way.not_on.setdefault(job, {})[node] = error

    def _expect_anew(self, old: Expected) -> Expected:
        if not old.stored.done():
            old.stored.set_result(False)
        new = self._under_way.expected[old.job] = Expected.of(old.drawing)
        new.blobs = old.blobs
        return new

    def _learn(self, errand: Errand, node: str, result: ImageResult) -> None:
        """Take in how long the node took."""
        prepared, timings = errand.prepared, result.timings_s
        drawing, model = prepared.drawing, prepared.entry.card.name
        member = self._members.get(node)
        if member is None or node != errand.node:
            return
        load_s = max(0.0, timings.get("load", 0.0))
        here = member.models().get(model)
        if load_s > 0 and here is not None:
            self._predictor.learn_load(DeviceId(node), model, n_bytes=here.n_bytes, spent_s=load_s)
        now_s = asyncio.get_running_loop().time()
        waiting = waiting_of(prepared)
        passed_s = now_s - errand.begun_s
        mean = (member.picture_s(now_s) - errand.picture_s) / passed_s if passed_s > 0 else 0.0
        self._predictor.learn(
            DeviceId(node), model, units=waiting.units, n_pictures=drawing.n_images,
            spent_s=timings.get("total", 0.0) - load_s, mean_pictures=max(mean, float(drawing.n_images)),
            is_cold=load_s > 0,
        )  # fmt: skip


def waiting_of(prepared: Prepared) -> WaitingJob:
    """A job that was begun, as placement sees it."""
    drawing, request = prepared.drawing, prepared.request
    pixels = (request.width_px or drawing.width_px) * (request.height_px or drawing.height_px)
    return WaitingJob(
        job_id=drawing.job_id, model=prepared.entry.card.name, steps=drawing.steps, n_pictures=drawing.n_images,
        megapixels=pixels / 2**20,
    )  # fmt: skip


def _is_of_the_node(error: SdfleetError) -> bool:
    return isinstance(error, _OF_THE_NODE)


def _blob_of(picture: Picture | None) -> PictureBlob | None:
    if picture is None:
        return None
    return PictureBlob(
        width_px=picture.width_px, height_px=picture.height_px, mode=picture.mode, n_bytes=len(picture.data),
        sha256=sha256_of(picture.data),
    )  # fmt: skip
