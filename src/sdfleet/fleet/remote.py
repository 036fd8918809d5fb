"""The router's backend: every drawing goes to a node, and comes back once, whatever is killed on the way.

    chooser.py   which job goes to which node now          carrier.py    one job, from `run` to its outcome
    listening.py what nodes say                            receiving.py  what they have drawn, chunk by chunk
    throne.py    whether this router gives out work        underway.py   the jobs between the desk and the nodes

Here these are joined, behind the faces that the runtime, the chooser and the composer see.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import replace
from pathlib import PurePath
from typing import NoReturn

from sdfleet.backends.base import Capabilities, OnProgress
from sdfleet.domain import Drawing, ImageResult, JobId
from sdfleet.errors import JobCancelled, NotReady
from sdfleet.fleet.carrier import Carrier
from sdfleet.fleet.cost import Predictor
from sdfleet.fleet.decisions import Dispatch, Why
from sdfleet.fleet.listening import Listening
from sdfleet.fleet.members import Members, Settled
from sdfleet.fleet.messages import DEAD_S, HEARTBEAT_S, SayHello, Watch
from sdfleet.fleet.placement import Placement
from sdfleet.fleet.receiving import Expected, Receiving
from sdfleet.fleet.state import Device, DeviceId, NodeId, RunningJob, WaitingJob
from sdfleet.fleet.throne import Throne
from sdfleet.fleet.transport import HOLD_S, Transport
from sdfleet.fleet.underway import Assigned, UnderWay
from sdfleet.fleet.voice import Voice
from sdfleet.runtime import Prepared

log = logging.getLogger(__name__)

REVIEW_S = 0.5
# No review for so long: this process did not run at all meanwhile.
AWAY_S = 3.0
# Before the first dispatch: nodes that hold jobs of an earlier life of this router say so in their heartbeats.
SETTLE_S = 2 * HEARTBEAT_S
N_WHYS = 2000
# Jobs that have ended and are still known to have; of interest for the first half minute of a reign.
N_OVER = 2000


class FleetBackend:
    """See `Backend` for the face, and the file's first lines. Belongs to one event loop.

    secret: what leases are made with; the same after a restart. router: this router's name, for the crown.
    epoch: the highest one that this router remembers; note_epoch: called with the new one, to be remembered.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        secret: bytes,
        router: str,
        predictor: Predictor | None = None,
        epoch: int = 0,
        note_epoch: Callable[[int], None] | None = None,
    ) -> None:
        self.predictor = Predictor() if predictor is None else predictor
        self.placement = Placement(self.predictor)
        self.members = Members(clock=self.now_s, changed=self._member_changed)
        # Whether a job has not ended; given by whoever keeps the jobs.
        self.knows_open: Callable[[JobId], bool] = lambda _: False
        # Whether nodes that belong to the fleet have not been heard yet in this life. May be read in any thread.
        self.gathers = True
        self._transport = transport
        self._throne = Throne(transport.crown, router=router, epoch=epoch, note_epoch=note_epoch or (lambda _: None))
        self._under_way = UnderWay()
        self._voice = Voice(transport.bus, self.members)
        self._carrier = Carrier(
            self._under_way, members=self.members, voice=self._voice, throne=self._throne, predictor=self.predictor,
            secret=secret, wake=self._wake, free=self._free,
        )  # fmt: skip
        self._listening = Listening(
            transport.bus, members=self.members, under_way=self._under_way, voice=self._voice, throne=self._throne,
            secret=secret, is_open=self._is_open, offered=self._offer, free=self._free, moved=self._member_changed,
        )  # fmt: skip
        self._receiving = Receiving(
            transport.bus, secret=secret, reigns=lambda: self.is_reigning,
            is_member=lambda node: self.members.get(node) is not None, expected=self._under_way.expected.get,
            is_open=self._is_open, offered=self._offer,
        )  # fmt: skip
        # Who is on the board, and as what it was shown there last; None: it has been changed there since.
        self._devices: dict[str, Device | None] = {}
        self._whys: OrderedDict[JobId, Why] = OrderedDict()
        self._over: OrderedDict[JobId, None] = OrderedDict()
        self._wakes: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._knows_jobs = False
        self._keeps_all = False
        self._is_closed = False

    def now_s(self) -> float:
        """The router's clock: the event loop's; may be asked in any thread once this is open."""
        return (self._loop or asyncio.get_running_loop()).time()

    # ------------------------------------------------------------------------------------------------------ its life

    async def open(self) -> None:
        """Listen to the nodes and reach for the crown. Raises StoreUnavailable."""
        self._loop = asyncio.get_running_loop()
        self._transport.bus.on_connection(self._on_connection)
        await self._listening.open()
        await self._transport.bus.subscribe("fleet.up.*.res", self._receiving.take)
        self._spawn(self._throne.run(self._begin_reign), name="crown")
        self._spawn(self._review(), name="review nodes")

    def admit(self, settled: Iterable[Settled]) -> None:
        """Who may take part from now on. Jobs at a node that may not any more go elsewhere."""
        for node in self.members.admit(settled):
            self._lose_all(node, "its right to take part was revoked")
            self.predictor.forget_device(DeviceId(node))
        if any(member.hello is None for member in self.members.all()):
            self._spawn(self._ask_who_is_there(), name="ask who is there")

    def closes(self) -> None:
        """The end is near: what arrives from now on and is not stored is kept by its node for the next life."""
        self._keeps_all = True

    async def close(self) -> None:
        """Stop listening. What the nodes draw they go on with, and keep for the next life of this router."""
        if self._is_closed:
            return
        self._keeps_all = self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._receiving.close()
        await self._throne.resign()
        await self._transport.close()

    async def _begin_reign(self) -> None:
        await self._ask_who_is_there(all_of_them=True)
        asyncio.get_running_loop().call_later(SETTLE_S, self._wake)
        self._wake()

    async def _review(self) -> NoReturn:
        while True:
            looked_s = self.now_s()
            await asyncio.sleep(REVIEW_S)
            if self.now_s() - looked_s > AWAY_S:
                # This process was stopped, by a laptop's lid, say: the silence was ours.
                self.members.was_away()
            self.gathers = self.gathers and self._waits_for_nodes()
            for node in self.members.review():
                self._lose_all(node, "it was not heard for 15 s")
            self._carrier.review()
            if self._knows_jobs and not self._keeps_all:
                # Ended by somebody else: another process that uses the store, most of all.
                for job in [job for job in self._under_way.idle() if not self.knows_open(job)]:
                    self.ended(job, is_stored=False)
                for job in [job for job in self._under_way.offers if self._is_open(job) is False]:
                    del self._under_way.offers[job]

    def _waits_for_nodes(self) -> bool:
        if not self.is_reigning:
            return True
        is_early = self.now_s() - self._throne.since_s < DEAD_S
        return is_early and any(member.hello is None for member in self.members.all())

    def _on_connection(self, is_connected: bool) -> None:  # noqa: FBT001 - the bus calls it with one argument
        self.members.hear_nothing(is_deaf=not is_connected)

    # ------------------------------------------------------------------------------------------------- what it is now

    @property
    def is_reigning(self) -> bool:
        """Whether this router gives out work; another may."""
        return self._throne.is_held and not self._is_closed

    @property
    def epoch(self) -> int:
        """The highest one that this router knows."""
        return self._throne.epoch

    async def reigned(self) -> None:
        """Return when this router gives out work. Until then neither its desk nor its books may be opened."""
        await self._throne.reigned()

    async def dethroned(self) -> None:
        """Return when another router has taken this one's place: whoever runs it ends it."""
        await self._throne.dethroned()

    @property
    def is_settled(self) -> bool:
        """Whether all nodes had the time to say what they hold."""
        if not self.is_reigning:
            return False
        waited = self.now_s() - self._throne.since_s >= SETTLE_S
        return waited or all(member.heartbeat is not None for member in self.members.all())

    def node_of(self, job: JobId) -> str:
        """The node that has a job now; empty where none has."""
        errand = self._under_way.errands.get(job)
        return "" if errand is None else errand.node

    def why(self, job: JobId) -> Why | None:
        """Why the job went where it went."""
        return self._whys.get(job)

    async def tell(self, node: str, what: str, message: object, *, reply: str = "") -> None:
        """Say something to a node, signed. reply: in the node's own space, where it is to answer."""
        await self._voice.tell(node, what, message, reply=reply)

    # -------------------------------------------------------------------------------------------- the backend's face

    def capabilities(self) -> Capabilities:
        now_s = self.now_s()
        online = [member for member in self.members.all() if member.standing(now_s) == "online"]
        loaded = {model for member in online if member.heartbeat is not None for model in member.heartbeat.loaded}
        reason = "" if online else "no node is here: see `sdfleet node --join`"
        return Capabilities(
            name="fleet",
            state="closed" if self._is_closed else "ready" if online else "unavailable",
            reason=reason if self.is_reigning else "another router reigns",
            has_previews=True,
            n_running=len(self._under_way.errands),
            facts={"nodes": len(online), "checkpoints": sorted(loaded)},
        )

    async def start(self) -> None:
        """Nothing: nodes load what they are given to draw."""

    def expect(self, prepared: Prepared) -> None:
        """The request behind the drawing that `generate` is about to be given."""
        self._under_way.prepared[prepared.drawing.job_id] = prepared

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        job = drawing.job_id
        prepared = replace(self._under_way.prepared.pop(job), drawing=drawing)
        old = self._under_way.expected.pop(job, None)
        if old is not None:
            _settle(old, is_stored=False)
        expected = self._under_way.expected[job] = Expected.of(drawing)
        try:
            return await self._carrier.carry(prepared, expected, on_progress)
        except BaseException:
            # With pictures it is `ended` that lets go, once they are stored.
            self._let_go(job)
            raise
        finally:
            self._under_way.not_on.pop(job, None)
            self._receiving.forget(job)

    def ended(self, job: JobId, *, is_stored: bool) -> None:
        """The job has ended in the store, with the pictures that `generate` gave (or not)."""
        expected, assigned = self._under_way.expected.get(job), self._under_way.assigned.get(job)
        if expected is not None:
            _settle(expected, is_stored=is_stored)
        self._under_way.forget(job)
        self.placement.forget(job)
        self._over[job] = None
        while len(self._over) > N_OVER:
            self._over.popitem(last=False)
        if assigned is not None:
            self._free(assigned.node, job)

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        errand = self._under_way.errands.get(job_id)
        if errand is not None:
            errand.wants_previews = previews
            await self.tell(errand.node, "watch", Watch(job=job_id, previews=previews, epoch=self.epoch))

    async def cancel(self, job_id: JobId) -> None:
        homeless = self._under_way.homeless.pop(job_id, None)
        if homeless is not None and not homeless.home.done():
            homeless.home.set_exception(JobCancelled(f"job {job_id} was cancelled"))
        errand = self._under_way.errands.get(job_id)
        if errand is not None and not errand.is_cancelled:
            errand.is_cancelled = True
            self._spawn(self._carrier.cancelled(errand), name=f"cancel {job_id}")

    async def load(self, drawing: Drawing) -> None:
        raise NotReady("models are loaded at the nodes by the jobs that need them", retry_after_s=1.0)

    async def unload(self, checkpoint: str) -> None:
        raise NotReady(f"{PurePath(checkpoint).name} is with the nodes: unload it there", retry_after_s=1.0)

    async def pin(self, checkpoints: Collection[str]) -> None:
        raise NotReady("models are pinned at a node: sdfleet fleet pin", retry_after_s=1.0)

    # ------------------------------------------------------------------------------------------- for the job's chooser

    def jobs_are_known(self) -> None:
        """The desk has taken up the jobs of earlier lives: what `knows_open` does not know has ended."""
        self._knows_jobs = True

    def on_change(self, wake: Callable[[], None]) -> None:
        """Call this whenever another job may begin."""
        self._wakes.append(wake)

    def homeless(self) -> tuple[WaitingJob, ...]:
        """Jobs that were begun and need another node, before all that wait."""
        return tuple(each.job for each in self._under_way.homeless.values() if not each.home.done())

    def not_on(self, job: JobId) -> frozenset[NodeId]:
        """Nodes that will not draw a job."""
        return frozenset(NodeId(node) for node in self._under_way.not_on.get(job, ()))

    def offers(self) -> dict[JobId, str]:
        """Jobs that a node draws or has drawn, for which this router has no errand (it was started again)."""
        return self._under_way.offers

    def may_come(self, job: JobId) -> bool:
        """Whether a job that is offered and not in line may come there: from an earlier router's ledger, in time."""
        under_way = self._under_way
        return job not in under_way.errands and job not in under_way.assigned and self._is_open(job) is not False

    def assign(self, job: WaitingJob, node: str, *, left_s: float | None = None) -> None:
        """The job goes to this node, which has it already. left_s: see `take`."""
        self._under_way.offers.pop(job.job_id, None)
        self._assigned(job.job_id, node, left_s)
        member = self.members.get(node)
        beat = None if member is None else member.heartbeat
        running = next((one for one in beat.running if one.job == job.job_id), None) if beat is not None else None
        if member is not None and running is not None:
            left = job.picture_units * (1.0 - min(1.0, max(0.0, running.part)))
            given = RunningJob(
                job_id=job.job_id, model=job.model, megapixels=job.megapixels, n_pictures=job.n_pictures,
                picture_units_left=left, as_of_s=self.now_s(),
            )  # fmt: skip
            member.found = tuple(one for one in member.found if one.job_id != job.job_id)
            member.give(given, now_s=self.now_s())
            self._member_changed(node)

    def take(self, dispatch: Dispatch, *, left_s: float | None = None) -> bool:
        """Send this one. True if it was homeless: it goes by itself. Otherwise its `generate` follows.

        left_s: seconds after which nobody wants it any more.
        """
        node = str(dispatch.node_id)
        self._note_why(dispatch.why)
        member = self.members.get(node)
        if member is not None:
            member.give(dispatch.running, now_s=self.now_s())
            # The board has put the job there itself.
            self._devices[node] = None
        homeless = self._under_way.homeless.get(dispatch.job_id)
        if homeless is None:
            self._assigned(dispatch.job_id, node, left_s)
            return False
        homeless.moves_to(node)
        return True

    def untake(self, dispatch: Dispatch) -> None:
        """It is not sent after all: nobody wants it any more."""
        self._under_way.assigned.pop(dispatch.job_id, None)
        self._free(str(dispatch.node_id), dispatch.job_id)

    def _assigned(self, job: JobId, node: str, left_s: float | None) -> None:
        until_s = None if left_s is None else self.now_s() + left_s
        self._under_way.assigned[job] = Assigned(node=node, until_s=until_s)

    def _note_why(self, why: Why) -> None:
        self._whys[why.job_id] = why
        self._whys.move_to_end(why.job_id)
        while len(self._whys) > N_WHYS:
            self._whys.popitem(last=False)
        log.info("placed", extra={"job_id": why.job_id, "node": why.chosen, "why": why.text})

    # --------------------------------------------------------------------------------------------------- small things

    def _let_go(self, job: JobId) -> None:
        """What still comes of this drawing nobody wants; unless this router closes, for whose next life it is kept."""
        if self._keeps_all:
            return
        expected = self._under_way.expected.get(job)
        if expected is None:
            return
        if expected.arrived.done():
            _settle(expected, is_stored=False)
        elif expected.node:
            self._spawn(self._carrier.let_go(expected), name=f"let go of {job}")

    def _offer(self, job: JobId, node: str) -> None:
        under_way = self._under_way
        if job not in under_way.errands and job not in under_way.assigned and under_way.offers.get(job) != node:
            under_way.offers[job] = node
            self._wake()

    def _is_open(self, job: JobId) -> bool | None:
        if not self._knows_jobs:
            return None
        if self.knows_open(job):
            return True
        # What the router before this one held in the ledger comes to this one only when that time is over.
        is_early = self.now_s() - self._throne.since_s < HOLD_S + SETTLE_S
        return None if is_early and job not in self._over else False

    async def _ask_who_is_there(self, *, all_of_them: bool = False) -> None:
        for member in self.members.all():
            if self._throne.is_held and (all_of_them or member.hello is None):
                await self.tell(member.node, "hello", SayHello(epoch=self.epoch))

    def _lose_all(self, node: str, why: str) -> None:
        for errand in self._under_way.at(node):
            errand.lose(why)
        self._under_way.withdraw(node)

    def _free(self, node: str, job: JobId) -> None:
        """The job takes no room there any more."""
        member = self.members.get(node)
        if member is not None and member.free(job, now_s=self.now_s()):
            self._member_changed(node)

    def _member_changed(self, node: str) -> None:
        """Let placement see a node as it is now, if that is not how it saw it before."""
        member = self.members.get(node)
        device = None if member is None else member.device(self.now_s())
        if device is None and node not in self._devices:
            return
        if device is not None and device == self._devices.get(node):
            return
        if device is None:
            del self._devices[node]
            self.placement.remove(DeviceId(node))
        else:
            self._devices[node] = device
            models = device.on_disk
            for curve in () if member is None or member.heartbeat is None else member.heartbeat.curves:
                if curve.model in models:
                    seconds = {n: s for n, s in enumerate(curve.rows_s[:64], start=1) if s > 0}
                    self.predictor.note_curve(DeviceId(node), curve.model, seconds)
            self.placement.upsert(device)
        self._wake()

    def _wake(self) -> None:
        for wake in self._wakes:
            wake()

    def _spawn(self, work: Awaitable[None], *, name: str) -> None:
        task: asyncio.Future[None] = asyncio.ensure_future(work)
        if isinstance(task, asyncio.Task):
            task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("a task of the router met a fault of ours", exc_info=fault)


def _settle(expected: Expected, *, is_stored: bool) -> None:
    if not expected.stored.done():
        expected.stored.set_result(is_stored)
