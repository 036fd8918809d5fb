"""What a person can see of a fleet and do to it: the face that the API and its commands use.

Decisions about nodes (draining, pins, limits, who belongs to the fleet) are the roster's and outlive restarts; what is
to happen at once at a node is an order, which that node answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import replace

from sdfleet.catalog.hubs.hub import Source
from sdfleet.domain import Job, JobId
from sdfleet.errors import NotReady, from_wire
from sdfleet.fleet.chooser import in_line
from sdfleet.fleet.decisions import Why
from sdfleet.fleet.join_code import JoinCode
from sdfleet.fleet.members import Member
from sdfleet.fleet.messages import Order, OrderAnswer, Orders
from sdfleet.fleet.packing import BrokenMessage, unpack
from sdfleet.fleet.remote import FleetBackend
from sdfleet.fleet.state import DeviceId, Limits, WaitingJob
from sdfleet.fleet.subjects import node_of, up
from sdfleet.fleet.transport import Bus, Incoming
from sdfleet.fleet.trust import Enrolled, Pending, Roster
from sdfleet.fleet.walk import WALKED_JOBS
from sdfleet.jobs.desk import JobDesk

log = logging.getLogger(__name__)

# How often it is looked whether a node that has an order is still there.
LOOK_EVERY_S = 2.0


class Fleet:
    """See the file's first lines.

    places: where nodes reach the broker, for join codes. has_own_broker: another broker's users are its operator's to
    add. apply: makes what the roster says true, at the broker and for who is given work. live: see `stand`, end:
    `closes`.
    """

    def __init__(
        self,
        backend: FleetBackend,
        *,
        roster: Roster,
        bus: Bus,
        desk: JobDesk,
        places: Callable[[], tuple[str, ...]],
        has_own_broker: bool = True,
        apply: Callable[[], Awaitable[None]],
        live: Callable[[], Awaitable[None]],
        end: Callable[[], None],
    ) -> None:
        self.roster = roster
        self.has_own_broker = has_own_broker
        self._backend = backend
        self._bus = bus
        self._desk = desk
        self._places = places
        self._apply = apply
        self._live = live
        self._end = end
        self._answers: dict[tuple[str, str], asyncio.Queue[OrderAnswer]] = {}

    async def open(self) -> None:
        """Hear how orders are answered. Raises StoreUnavailable."""
        await self._bus.subscribe("fleet.up.*.ord.*", self._on_answer)

    async def stand(self) -> None:
        """Return when the router gives out no more work; raise what it died of."""
        await self._live()

    def closes(self) -> None:
        """The router is about to end: what nodes draw they go on with, and keep for its next life."""
        self._backend.closes()
        self._end()

    # ------------------------------------------------------------------------------------------------------- what is

    @property
    def is_reigning(self) -> bool:
        """Whether this router gives out work; another may, and this one waits."""
        return self._backend.is_reigning

    def now_s(self) -> float:
        """The clock of `Member.heard_s`."""
        return self._backend.now_s()

    def members(self) -> tuple[Member, ...]:
        """Every node that belongs to the fleet, heard of or not."""
        return self._backend.members.all()

    def with_model(self, model: str) -> tuple[str, ...]:
        """The nodes that can draw with it now."""
        return self._backend.members.at(model)

    def node_of(self, job: JobId) -> str:
        """Which node has a job now; empty where none has."""
        return self._backend.node_of(job)

    def why(self, job: Job) -> Why | None:
        """Why the job went where it went, or why it still waits; None for one of another life of this router."""
        if job.state != "queued":
            return self._backend.why(job.id)
        return self._backend.placement.explain(
            self._waiting_of(job), self._jobs_in_line(), n_waiting=self._n_waiting(), now_s=self._backend.now_s()
        )

    def wait_s(self, *, model: str, megapixels: float, steps: int) -> float | None:
        """In how many seconds one such picture, asked for now, would begin; None where no node could draw it."""
        probe = WaitingJob(job_id=JobId("?"), model=model, megapixels=megapixels, steps=steps)
        n_waiting = self._n_waiting()
        walked = min(n_waiting, WALKED_JOBS - 1)
        in_line = itertools.islice(self._jobs_in_line(), walked)
        planned = self._backend.placement.plan(
            itertools.chain(in_line, [probe]), n_waiting=n_waiting + 1, now_s=self._backend.now_s()
        )
        found = next((one for one in planned if one.job_id == probe.job_id), None)
        if found is None or found.finish_s is None or found.device_id is None:
            return None
        draw_s = self._backend.predictor.draw_s(
            found.device_id, probe.model, units=probe.units, n_pictures=probe.n_pictures
        )
        # Beyond what is planned the line goes on as it begins.
        longer = n_waiting / walked if walked else 1.0
        return max(0.0, found.finish_s - draw_s) * longer

    def speed(self, node: str) -> float:
        """How fast a node is beside the others, by all that was measured; 1 where nothing was."""
        return self._backend.predictor.speed(DeviceId(node))

    # ------------------------------------------------------------------------------------------------ who belongs to it

    def code(self) -> JoinCode:
        """A new join code: good once, for a quarter of an hour."""
        return self.roster.make_code(self._places(), is_pinned=self.has_own_broker)

    def pending(self) -> tuple[Pending, ...]:
        """Machines that ask to join, and have shown their code."""
        return tuple(each for each in self.roster.pending() if each.code)

    async def approve(self, which: str) -> tuple[Enrolled, ...]:
        """Let a machine join that asks; named by its code, or as it would be called. Raises UnknownName."""
        made = self.roster.approve(which)
        await self._apply()
        return made

    async def revoke(self, node: str) -> None:
        """Put a node out, at once: its connection is cut, its jobs go elsewhere. Raises UnknownName."""
        self.roster.revoke(node)
        await self._apply()

    # --------------------------------------------------------------------------------------------- what is done to one

    async def drain(self, node: str, *, is_draining: bool = True) -> None:
        """Give it no more jobs, or jobs again. Raises UnknownName."""
        (self.roster.drain if is_draining else self.roster.undrain)(node)
        await self._apply()

    async def limit(self, node: str, *, limits: Limits, max_pictures: int | None) -> None:
        """What may be drawn there, in the place of what was settled before. Raises UnknownName."""
        self.roster.limit(node, limits=limits, max_pictures=max_pictures)
        await self._apply()

    async def pin(self, node: str, model: str, *, is_pinned: bool = True) -> None:
        """Have a model stay in a node's memory, or let it leave again. Raises as `order`; nothing is settled then."""
        if is_pinned:
            await self.order(node, "pin", model)
            self.roster.pin(node, model)
        else:
            self.roster.unpin(node, model)
            await self.order(node, "unpin", model)
        await self._apply()

    async def order(
        self, node: str, order: Orders, model: str, *, source: Source | None = None
    ) -> Mapping[str, object]:
        """Have a node do something with a model; returns when it is done there, which loading takes its time for.

        Raises UnknownName, NotReady (the node is away), and what the node answers.
        """
        facts: Mapping[str, object] = {}
        async with contextlib.aclosing(self._followed(node, order, model, source=source)) as answers:
            async for answer in answers:
                facts = answer.facts
        log.info("a node did as it was told", extra={"node": node, "order": order, "model": model})
        return facts

    async def pull(
        self, node: str, model: str, *, consent: str, source: Source | None = None
    ) -> AsyncGenerator[Mapping[str, object]]:
        """How a node's download goes, to its end; leaving this stops it. consent: the id of the plan, confirmed.

        Raises as `order`.
        """
        async with contextlib.aclosing(self._followed(node, "pull", model, source=source, consent=consent)) as answers:
            async for answer in answers:
                if not answer.is_last:
                    yield answer.facts

    async def _followed(
        self, node: str, order: Orders, model: str, *, source: Source | None, consent: str = ""
    ) -> AsyncGenerator[OrderAnswer]:
        """What a node answers to an order, the last answer being the last. Left before that, the node stops."""
        self.roster.find(node)
        self._check_is_here(node)
        name = secrets.token_hex(8)
        said = Order(id=name, order=order, model=model, epoch=self._backend.epoch, consent=consent, source=source)
        answers: asyncio.Queue[OrderAnswer] = asyncio.Queue()
        self._answers[node, name] = answers
        has_ended = False
        try:
            await self._backend.tell(node, "order", said, reply=up(node, f"ord.{name}"))
            while not has_ended:
                try:
                    async with asyncio.timeout(LOOK_EVERY_S):
                        answer = await answers.get()
                except TimeoutError:
                    self._check_is_here(node)
                    continue
                has_ended = answer.is_last
                if answer.error is not None:
                    raise from_wire(dict(answer.error))
                yield answer
        finally:
            del self._answers[node, name]
            if not has_ended:
                await self._backend.tell(node, "order", replace(said, order="stop"))

    def _check_is_here(self, node: str) -> None:
        member = self._backend.members.get(node)
        if member is None or member.standing(self.now_s()) == "offline":
            raise NotReady(f"node {node} is not here now", retry_after_s=5.0, hint="start it: sdfleet node")

    async def _on_answer(self, message: Incoming) -> None:
        try:
            node, answer = node_of(message.subject), unpack(OrderAnswer, message.data)
        except BrokenMessage as exc:
            log.warning("an answer makes no sense", extra={"subject": message.subject, "why": str(exc)[:200]})
            return
        answers = self._answers.get((node, answer.id))
        if answers is not None:
            answers.put_nowait(answer)

    # ----------------------------------------------------------------------------------------------------- small things

    def _n_waiting(self) -> int:
        return self._desk.load().n_queued + len(self._backend.homeless())

    def _jobs_in_line(self) -> Iterator[WaitingJob]:
        yield from self._backend.homeless()
        now_s = self._desk.now_s()
        for waiting in self._desk.in_line():
            yield in_line(waiting, not_on=self._backend.not_on(waiting.job_id), now_s=now_s)

    def _waiting_of(self, job: Job) -> WaitingJob:
        waited_s = max(0.0, self._desk.now_s() - job.created_s)
        return replace(like(job), waited_s=waited_s, not_on=self._backend.not_on(job.id))


def like(job: Job) -> WaitingJob:
    """A job as placement sees it."""
    asked = job.request
    return WaitingJob(
        job_id=job.id,
        model=asked.model,
        megapixels=(asked.width_px or 0) * (asked.height_px or 0) / 2**20,
        steps=asked.steps or 1,
        n_pictures=asked.n_images,
        priority=job.submission.priority,
        owner=job.submission.caller.owner,
    )
