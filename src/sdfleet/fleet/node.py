"""One device of the fleet: obeys its router, draws with the runtime underneath, keeps what it drew until that has it.

    run       -> ok, and a task: input pictures fetched, drawn, spooled, `computed` said, sent in chunks, forgotten
    cancel    -> the drawing stops after its step, and its failure is sent as its outcome
    silence   -> goes on: what is drawn is sent when the router is back

A node never listens on a port, and does nothing that is not signed with its own secret and of the newest epoch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NoReturn

import psutil

from sdfleet import __version__
from sdfleet.domain import ImageResult, JobId, Progress
from sdfleet.errors import DeadlineExceeded, SdfleetError, StoreUnavailable
from sdfleet.fleet.fetching import with_pictures
from sdfleet.fleet.messages import (
    HEARTBEAT_S,
    AdapterHere,
    Cancel,
    Failure,
    Heartbeat,
    Held,
    Hello,
    JobNews,
    ModelHere,
    Order,
    OrderAnswer,
    Outcome,
    Run,
    RunAnswer,
    RunningJob,
    SayHello,
    Verdict,
    Watch,
)
from sdfleet.fleet.packing import CHUNK_BYTES, BrokenMessage, pack, unpack
from sdfleet.fleet.shipping import Shipping
from sdfleet.fleet.signing import SIGNATURE, is_signed
from sdfleet.fleet.speaking import Speaker
from sdfleet.fleet.spool import Spool, Spooled
from sdfleet.fleet.stock import Stock, slots_of
from sdfleet.fleet.subjects import down, up
from sdfleet.fleet.task import Task, packed_or_failed
from sdfleet.fleet.transport import Bus, Incoming
from sdfleet.language.asking import LanguageModel
from sdfleet.language.shelf import Shelf
from sdfleet.runtime import Runtime

log = logging.getLogger(__name__)

# Progress of one job is told so often at most; the newest step counts.
NEWS_EVERY_S = 0.25
# What changes is told so soon, many changes at a time, and after what made them: a heartbeat takes a few ms of a slow
# machine, which the job that was just given would wait for.
BEAT_SOON_S = 0.05
# How often a changed set of models is looked for.
MODELS_EVERY_S = 5.0
_AGAIN_S = 1.0
# Spooled jobs that one heartbeat names; those that are not come when these have been fetched.
MOST_NAMED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """Who a node is. node: its id in the fleet. secret: what its router signs with.

    slots: pictures drawn at once; None: as many as pay, by what was measured (`slots_of`). device: a name for people.
    facts: hardware as /fleet/status shows it. memory_bytes: of the device; 0: this machine's.
    """

    node: str
    name: str
    secret: bytes = field(repr=False)
    slots: int | None = None
    device: str = ""
    memory_bytes: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)


class Node:
    """See the file's first lines. `run` until it is cancelled; `close` beforehand lets running jobs end.

    stock: the models of this machine. speaker: its language models, where it has any.
    """

    def __init__(
        self,
        options: NodeOptions,
        *,
        control: Bus,
        bulk: Bus,
        runtime: Runtime,
        spool: Spool,
        stock: Stock,
        speaker: Speaker | None = None,
    ) -> None:
        self.options = options
        self.boot = secrets.token_hex(8)
        self._control = control
        self._bulk = bulk
        self._runtime = runtime
        self._spool = spool
        self._stock = stock
        self._speaker = speaker or Speaker(options.node, control=control, bulk=bulk, language=Shelf())
        self._shipping = Shipping(options.node, bus=bulk, spool=spool, on_change=self._changed)
        self._jobs: dict[JobId, Task] = {}
        self._epoch = 0
        self._seq = 0
        self._hello = 1
        self._models: tuple[ModelHere, ...] = ()
        self._adapters: tuple[AdapterHere, ...] = ()
        self._language: tuple[LanguageModel, ...] = ()
        self._beat = asyncio.Event()
        self._moved = asyncio.Event()
        self._has_news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        # Results on their way to the disk.
        self._keeping: set[asyncio.Future[None]] = set()
        self._orders: dict[str, asyncio.Task[None]] = {}
        self.is_leaving = False

    # ----------------------------------------------------------------------------------------------- life of the node

    async def run(self) -> NoReturn:
        """Serve until cancelled. Jobs that are being drawn then are dropped; what is spooled stays."""
        self._models, self._adapters = await self._stock.models(), await self._stock.adapters()
        self._language = self._speaker.models()
        self._control.on_connection(self._on_connection)
        heard = [
            await self._control.subscribe(down(self.options.node, what), self._guarded(handler))
            for what, handler in (
                ("run", self._on_run),
                ("cancel", self._on_cancel),
                ("watch", self._on_watch),
                ("order", self._on_order),
                ("hello", self._on_hello),
                *self._speaker.begin(changed=self._changed, is_old=self._is_old),
            )
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._say_hello(), name="hello")
                tasks.create_task(self._heartbeats(), name="heartbeats")
                tasks.create_task(self._tell_news(), name="news")
                tasks.create_task(self._follow_models(), name="models")
                tasks.create_task(self._shipping.run(), name="shipping")
                await asyncio.Event().wait()
        finally:
            await self._speaker.close()
            for task in list(self._tasks):
                task.cancel()
            if unended := {*self._tasks, *self._keeping}:
                await asyncio.wait(unended)
            for ear in heard:
                await ear.close()
        raise AssertionError

    async def leave(self, *, within_s: float) -> None:
        """Take no more jobs, and return when those here are drawn and sent, or after `within_s`."""
        self.is_leaving = True
        self._changed()
        try:
            async with asyncio.timeout(within_s):
                while self._jobs or self._spool.all() or self._speaker.n_running:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            log.warning("the node leaves jobs behind", extra={"n_jobs": len(self._jobs)})

    @property
    def n_drawing(self) -> int:
        """Pictures that take slots now."""
        return sum(job.n_pictures for job in self._jobs.values())

    @property
    def slots(self) -> int:
        """Pictures that are drawn at once."""
        return slots_of(self._stock.curves()) if self.options.slots is None else self.options.slots

    # ------------------------------------------------------------------------------------------------- what is told it

    def _guarded(self, handler: Callable[[Incoming], Awaitable[None]]) -> Callable[[Incoming], Awaitable[None]]:
        """Only what the router said, and said to this node."""

        async def heed(message: Incoming) -> None:
            signature = message.headers.get(SIGNATURE, "")
            if not is_signed(self.options.secret, message.subject, message.data, signature):
                log.warning("a message that the router did not sign was not heeded", extra={"subject": message.subject})
                return
            try:
                await handler(message)
            except BrokenMessage as exc:
                log.warning("a message makes no sense", extra={"subject": message.subject, "why": str(exc)[:200]})

        return heed

    def _is_old(self, epoch: int) -> bool:
        """Whether a router that reigns no more says this."""
        if epoch < self._epoch:
            log.warning("an order of an old router was refused", extra={"epoch": epoch, "newest": self._epoch})
            return True
        self._epoch = epoch
        return False

    async def _on_run(self, message: Incoming) -> None:
        run = unpack(Run, message.data)
        if self._is_old(run.epoch):
            return
        verdict, answer = self._taken(run)
        if verdict == "ok":
            self._begin(run)
        await self._publish(message.reply, answer)

    def _taken(self, run: Run) -> tuple[Verdict, RunAnswer]:
        def answer(verdict: Verdict, **more: object) -> tuple[Verdict, RunAnswer]:
            return verdict, RunAnswer(job=run.job, lease=run.lease, verdict=verdict, **more)  # type: ignore[arg-type]

        job = self._jobs.get(run.job)
        if job is not None:
            # Given here again, by a router that had believed us dead.
            job.run = replace(job.run, lease=run.lease)
            self._spool.renew(run.job, run.lease)
            return answer("have")
        spooled = self._spool.get(run.job)
        if spooled is not None and spooled.is_failure and spooled.lease != run.lease:
            # Another try is wanted: the failure of the last one would be counted for it. One unlink is no wait.
            self._spool.drop(run.job)
        elif spooled is not None:
            self._spool.renew(run.job, run.lease)
            self._shipping.nudge(run.job)
            return answer("have")
        n_free = self.slots - self.n_drawing
        if self.is_leaving or (self._jobs and run.request.n_images > n_free):
            etas = [job.eta_s for job in self._jobs.values() if job.eta_s is not None]
            return answer("busy", free_in_s=min(etas, default=None))
        return answer("ok")

    async def _on_cancel(self, message: Incoming) -> None:
        cancel = unpack(Cancel, message.data)
        if self._is_old(cancel.epoch):
            return
        job = self._jobs.get(cancel.job)
        if job is not None:
            job.stop.set()
            if job.is_drawing:
                await self._runtime.cancel(cancel.job)
            return
        if await asyncio.to_thread(self._spool.drop, cancel.job):
            self._changed()
        dropped = JobNews(job=cancel.job, lease=cancel.lease, seq=0, phase="dropped")
        await self._publish(up(self.options.node, f"ev.{cancel.job}"), dropped)

    async def _on_watch(self, message: Incoming) -> None:
        watch = unpack(Watch, message.data)
        job = self._jobs.get(watch.job)
        if self._is_old(watch.epoch) or job is None:
            return
        job.run = replace(job.run, wants_previews=watch.previews)
        await self._runtime.watch(watch.job, previews=watch.previews)

    async def _on_order(self, message: Incoming) -> None:
        order = unpack(Order, message.data)
        if self._is_old(order.epoch):
            return
        if order.order == "stop":
            if (begun := self._orders.get(order.id)) is not None:
                begun.cancel()
            return
        begun = self._orders[order.id] = self._spawn(self._follow(order, message.reply), name=f"order {order.order}")
        begun.add_done_callback(lambda _: self._orders.pop(order.id, None))

    async def _on_hello(self, message: Incoming) -> None:
        if not self._is_old(unpack(SayHello, message.data).epoch):
            await self._say_hello()

    async def _follow(self, order: Order, reply: str) -> None:
        async def tell(facts: Mapping[str, object]) -> None:
            await self._publish(reply, OrderAnswer(id=order.id, is_last=False, facts=facts))

        try:
            answer = OrderAnswer(id=order.id, facts=await self._stock.obey(order, tell))
        except SdfleetError as exc:
            answer = OrderAnswer(id=order.id, error=exc.to_wire())
        await self._publish(reply, answer)
        await self._look_at_models()
        self._changed()

    # ---------------------------------------------------------------------------------------------- a job, here, whole

    def _begin(self, run: Run) -> None:
        job = Task(run)
        self._jobs[run.job] = job
        job.task = self._spawn(self._work(job), name=f"job {run.job}")
        self._changed()

    async def _work(self, job: Task) -> None:
        """A job from its acceptance to its place in the spool; whatever happens, it has an outcome."""
        outcome: Outcome
        try:
            if self._keeping:  # who is killed loses one picture, not the one before it too
                await asyncio.wait(self._keeping)
            outcome = await self._drawn(job)
        except SdfleetError as exc:
            outcome = Failure(job_id=job.run.job, error=exc)
        except asyncio.CancelledError:
            self._jobs.pop(job.run.job, None)
            raise  # the node ends; the router sees that its boot is over
        except Exception as exc:  # one job fails with its cause, the others go on
            log.exception("a job met a fault of ours", extra={"job_id": job.run.job})
            fault = SdfleetError(f"{type(exc).__name__} in sdfleet itself, on {self.options.name}", hint="see its log")
            outcome = Failure(job_id=job.run.job, error=fault)
        try:
            packed = await packed_or_failed(outcome)
            spooled = self._spool.put(job.run.job, job.run.lease, packed, is_failure=isinstance(outcome, Failure))
            self._shipping.nudge(job.run.job)
            keeping = asyncio.ensure_future(asyncio.to_thread(self._spool.keep, spooled))
            self._keeping.add(keeping)
            keeping.add_done_callback(self._keeping.discard)
            await self._room_beside(spooled)
        finally:
            # The slot is free when the computing has ended, whenever the last byte has left the house.
            self._jobs.pop(job.run.job, None)
        if len(packed) > CHUNK_BYTES:  # a smaller one is there as soon as its news
            await self._say(job, JobNews(job=job.run.job, lease=job.run.lease, seq=self._next(job), phase="computed"))
        self._changed()

    async def _drawn(self, job: Task) -> ImageResult:
        run = job.run
        try:
            async with asyncio.timeout(run.budget_s):
                request = await with_pictures(job, node=self.options.node, bus=self._bulk)
                prepared = await self._runtime.prepare(request, job_id=run.job)
                job.check()
                job.is_drawing = True
                drawing = replace(prepared.drawing, wants_previews=job.run.wants_previews)
                return await self._runtime.draw(
                    replace(prepared, drawing=drawing), on_progress=lambda step: self._note(job, step)
                )
        except TimeoutError as exc:
            raise DeadlineExceeded(f"job {run.job} was not done in the {run.budget_s:.0f} s it had") from exc

    async def _room_beside(self, spooled: Spooled) -> None:
        """Return when this outcome leaves room for others in memory; a full disk may keep its slot taken for long."""
        if not self._spool.has_room and self._keeping:
            await asyncio.wait(self._keeping)  # one outcome must not be written by two at once
        while not self._spool.has_room and self._spool.is_in_memory(spooled):
            log.warning("finished jobs fill the disk and the memory: no more is drawn until some have left")
            await asyncio.sleep(_AGAIN_S)
            await asyncio.to_thread(self._spool.keep, spooled)

    # -------------------------------------------------------------------------------------------------- what it tells

    def _note(self, job: Task, progress: Progress) -> None:
        """A step was made. Called between two steps: only notes it."""
        job.parts[progress.image_index] = progress.step / max(1, progress.n_steps)
        job.eta_s = progress.eta_s
        last = job.news.pop(progress.image_index, None)
        job.news[progress.image_index] = JobNews(
            job=job.run.job, lease=job.run.lease, seq=self._next(job), phase="step", image_index=progress.image_index,
            step=progress.step, n_steps=progress.n_steps, eta_s=progress.eta_s,
            preview=progress.preview or (None if last is None else last.preview),
        )  # fmt: skip
        self._has_news.set()

    async def _tell_news(self) -> NoReturn:
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            for job in list(self._jobs.values()):
                news, job.news = job.news, {}
                for one in news.values():
                    await self._say(job, one)
            await asyncio.sleep(NEWS_EVERY_S)

    async def _say(self, job: Task, news: JobNews) -> None:
        subject = up(self.options.node, f"ev.{job.run.job}")
        if news.preview is not None and len(news.preview.data) > CHUNK_BYTES:
            news = replace(news, preview=None)
        await self._publish(subject, news)

    async def _publish(self, subject: str, message: object) -> None:
        """Say something to the router; what cannot be said is said again by the next heartbeat."""
        try:
            await self._control.publish(subject, pack(message))
        except (StoreUnavailable, BrokenMessage) as exc:
            log.warning("the router could not be told", extra={"subject": subject, "why": str(exc)[:200]})

    def _next(self, job: Task) -> int:
        job.seq += 1
        return job.seq

    async def _heartbeats(self) -> NoReturn:
        while True:
            self._beat.clear()
            await self._publish(up(self.options.node, "hb"), self._heartbeat())
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S - BEAT_SOON_S):
                    await self._beat.wait()
            await asyncio.sleep(BEAT_SOON_S)

    def _heartbeat(self) -> Heartbeat:
        self._seq += 1
        standing = self._runtime.capabilities()
        loaded, pinned = self._stock.on_device()
        speaker = self._speaker
        memory = self._stock.memory(
            self.options.memory_bytes, beside_bytes=speaker.taken_bytes(), coming_bytes=speaker.coming_bytes()
        )
        return Heartbeat(
            boot=self.boot,
            seq=self._seq,
            hello=self._hello,
            slots=self.slots,
            free=max(0, self.slots - self.n_drawing),
            running=tuple(
                RunningJob(
                    job=job_id, lease=job.run.lease, n_pictures=job.n_pictures, eta_s=job.eta_s,
                    part=sum(job.parts.values()) / job.n_pictures,
                )
                for job_id, job in self._jobs.items()
            ),
            spool=tuple(Held(job=each.job, lease=each.lease) for each in self._spool.all()[:MOST_NAMED]),
            loaded=loaded,
            pinned=pinned,
            memory_free_bytes=memory.free_bytes,
            memory_total_bytes=memory.total_bytes,
            cpu_percent=psutil.cpu_percent(),
            curves=self._stock.curves(),
            state=standing.state,
            reason=standing.reason,
            is_leaving=self.is_leaving,
            language=speaker.standing(),
        )  # fmt: skip

    async def _say_hello(self) -> None:
        hello = Hello(
            boot=self.boot,
            hello=self._hello,
            name=self.options.name,
            version=__version__,
            device=self.options.device,
            slots=self.slots,
            models=self._models,
            adapters=self._adapters,
            memory_bytes=self._stock.memory(self.options.memory_bytes).total_bytes,
            facts=self.options.facts,
            language=self._language,
        )
        await self._publish(up(self.options.node, "hello"), hello)

    async def _follow_models(self) -> NoReturn:
        while True:
            await asyncio.sleep(MODELS_EVERY_S)
            await self._look_at_models()

    async def _look_at_models(self) -> None:
        models, adapters = await self._stock.models(), await self._stock.adapters()
        spoken = self._speaker.models()
        if (models, adapters, spoken) != (self._models, self._adapters, self._language):
            self._models, self._adapters, self._language = models, adapters, spoken
            self._hello += 1
            await self._say_hello()

    def _changed(self) -> None:
        """Something that the next heartbeat should say soon."""
        self._beat.set()
        self._moved.set()

    def _on_connection(self, is_connected: bool) -> None:  # noqa: FBT001 - the bus calls it with one argument
        if is_connected:
            self._spawn(self._say_hello(), name="hello again")
            self._changed()

    def _spawn(self, work: Awaitable[None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("a task of the node met a fault of ours", exc_info=fault)
