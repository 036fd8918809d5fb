"""A router's face for text, embeddings and speech: every request goes to one node, its answer comes back numbered.

    chosen (speakers.py) -> told -> heard within 2 s -> the first bytes -> the others, within credit -> the end

Until the first byte another node is asked where the first is silent for 5 s, is lost, or says that it cannot. After it
whatever goes wrong ends the answer with an error. Whoever reads no more is told to the node, and its engine stops.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from sdfleet.errors import Busy, ModelNotFound, NotReady, SdfleetError, StoreUnavailable, UpstreamFailed, from_wire
from sdfleet.fleet.language_messages import (
    CREDIT_STEP_BYTES,
    HEARD_WITHIN_S,
    PIECE_BYTES,
    SILENT_S,
    WINDOW_BYTES,
    Credit,
    Hush,
    Said,
    Talk,
    WantRest,
    pack_ask,
    subject_of,
    unpack_said,
)
from sdfleet.fleet.members import Member
from sdfleet.fleet.messages import BlobPart
from sdfleet.fleet.packing import BrokenMessage, pack, unpack
from sdfleet.fleet.remote import FleetBackend
from sdfleet.fleet.speakers import Candidate, choose
from sdfleet.fleet.subjects import inbox_of, node_of
from sdfleet.fleet.transport import Bus, Incoming
from sdfleet.language.asking import Answer, Ask, LanguageModel, not_found, same_name, with_first

log = logging.getLogger(__name__)

# What one message to a node carries of a request; the rest is fetched.
FIRST_BYTES = 2**17
REST_BYTES = 2**18
# A time-out that is found with the event loop itself late: what came meanwhile is looked at first.
_GRACE_S = 0.1
# Of each new measurement of a turn in their mean.
_NEW_SHARE = 0.2
N_TURNS = 4096


@dataclass(slots=True, eq=False)
class _Hearing:
    """An answer as it comes in. n_read: bytes that its reader has taken. told_to: the credit that was given.

    is_silent: its node did not say a word in time, and may go on with it.
    """

    req: str
    node: str
    request: bytes = field(repr=False)
    chunks: list[bytes] = field(default_factory=list)
    seq: int = 0
    n_heard: int = 0
    n_read: int = 0
    told_to: int = WINDOW_BYTES
    is_ended: bool = False
    is_silent: bool = False
    fault: SdfleetError | None = None
    model: LanguageModel | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, said: Said) -> None:
        """The next part. What cannot be the next ends the answer."""
        if self.is_ended:
            return
        self.news.set()
        if said.seq != self.seq:
            self.end(UpstreamFailed(f"a part of the answer was lost on its way from node {self.node}"))
            return
        self.seq += 1
        self.n_heard += len(said.data)
        if self.n_heard > self.told_to:
            self.end(UpstreamFailed(f"node {self.node} sent more than it was asked for"))
            return
        if said.data:
            self.chunks.append(said.data)
        self.model = said.model or self.model
        if said.is_end:
            self.end(None if said.error is None else _error(said.error))

    def end(self, fault: SdfleetError | None) -> None:
        """Nothing follows."""
        self.is_ended, self.fault = True, fault
        self.news.set()


class FleetLanguage:
    """See `Language`, and the file's first lines."""

    def __init__(self, backend: FleetBackend, bus: Bus) -> None:
        self._backend = backend
        self._bus = bus
        self._hearings: dict[str, _Hearing] = {}
        self._n_running: dict[tuple[str, str], int] = {}
        self._turns: OrderedDict[tuple[str, str], float] = OrderedDict()

    async def open(self) -> None:
        """Begin to listen. Raises StoreUnavailable."""
        await self._bus.subscribe("fleet.up.*.tok.*", self._on_said)
        await self._bus.subscribe("fleet.up.*.want", self._on_want)

    # ------------------------------------------------------------------------------------------------- what there is

    def models(self) -> tuple[LanguageModel, ...]:
        found: dict[str, LanguageModel] = {}
        for member in self._online():
            warm = _warm(member)
            for model in () if member.hello is None else member.hello.language:
                known = found.setdefault(model.name, replace(model, is_warm=model.name in warm))
                if model.name in warm and not known.is_warm:
                    found[model.name] = replace(known, is_warm=True)
        return tuple(found.values())

    def find(self, name: str) -> LanguageModel | None:
        models = self.models()
        exact = next((model for model in models if model.name == name), None)
        return exact or next((model for model in models if same_name(name, model.name)), None)

    def running(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for (_, name), n in self._n_running.items():
            found[name] = found.get(name, 0) + n
        return found

    def nodes_with(self, name: str) -> tuple[str, ...]:
        return tuple(member.node for member in self._online() if _model_of(member, name) is not None)

    def pullers(self) -> tuple[str, ...]:
        return tuple(
            member.node
            for member in self._online()
            if member.hello is not None and any(model.engine == "ollama" for model in member.hello.language)
        )

    # ------------------------------------------------------------------------------------------------------ an answer

    @asynccontextmanager
    async def ask(self, ask: Ask) -> AsyncIterator[Answer]:
        if not self._backend.is_reigning:
            raise NotReady("another router gives out work", retry_after_s=2.0)
        if not self._bus.is_connected:
            raise StoreUnavailable("the fleet's broker cannot be reached", retry_after_s=2.0)
        request = await _packed(ask)
        tried: set[str] = set()
        fault: SdfleetError = not_found(ask.model)
        if self._backend.gathers and self.find(ask.model) is None:
            fault = NotReady("not every node has been heard since this router began", retry_after_s=2.0)
        while (found := self._chosen(ask, tried)) is not None:
            node, model = found
            hearing = _Hearing(req=secrets.token_hex(12), node=node, request=request)
            async with self._heard(hearing, ask, model), aclosing(self._pieces(hearing, ask)) as pieces:
                try:
                    first = await anext(pieces, None)
                except (UpstreamFailed, Busy, ModelNotFound) as exc:
                    fault = exc
                    first = None
                else:
                    fault = UpstreamFailed(f"node {node} answered with nothing")
                if first is None:
                    tried.add(node)
                    log.info("a node did not answer", extra={"node": node, "model": model.name, "why": fault.code})
                    continue
                async with aclosing(with_first(first, pieces)) as all_pieces:
                    yield Answer(node=node, model=hearing.model or model, pieces=all_pieces, n_retries=len(tried))
                return
        raise fault

    @asynccontextmanager
    async def _heard(self, hearing: _Hearing, ask: Ask, model: LanguageModel) -> AsyncIterator[None]:
        """While inside, the node works on the answer; a node that has not ended then is told to stop."""
        key = hearing.node, model.name
        began_s = self._backend.now_s()
        self._hearings[hearing.req] = hearing
        self._n_running[key] = self._n_running.get(key, 0) + 1
        try:
            data = hearing.request[:FIRST_BYTES]
            talk = Talk(req=hearing.req, epoch=self._backend.epoch, n_bytes=len(hearing.request), data=data)
            await self._backend.tell(hearing.node, subject_of(ask.door), talk)
            yield
            if hearing.is_ended and hearing.fault is None:
                self._note_turn(key, self._backend.now_s() - began_s)
        finally:
            del self._hearings[hearing.req]
            self._n_running[key] -= 1
            if not self._n_running[key]:
                del self._n_running[key]
            if not hearing.is_ended or hearing.is_silent:
                await self._hush(hearing.node, hearing.req)

    async def _pieces(self, hearing: _Hearing, ask: Ask) -> AsyncGenerator[bytes]:
        """The pieces of an answer: its lines where it streams, else its bytes as they come."""
        left = b""
        async with aclosing(self._bytes(hearing)) as chunks:
            async for chunk in chunks:
                if not ask.is_stream:
                    yield chunk
                    continue
                *whole, left = (left + chunk).split(b"\n")
                for piece in whole:
                    yield piece
        if left:
            raise UpstreamFailed(f"node {hearing.node} broke off in the middle of its answer")

    async def _bytes(self, hearing: _Hearing) -> AsyncGenerator[bytes]:
        """What comes in, in order, as fast as it is read here. Raises what the node met, or that it is silent."""
        is_heard = False
        while True:
            while hearing.chunks:
                chunk = hearing.chunks.pop(0)
                yield chunk
                hearing.n_read += len(chunk)
                if hearing.n_read + WINDOW_BYTES - hearing.told_to >= CREDIT_STEP_BYTES:
                    await self._credit(hearing)
            if hearing.is_ended:
                if hearing.fault is not None:
                    raise hearing.fault
                return
            hearing.news.clear()
            if not await _within(hearing.news, SILENT_S if is_heard else HEARD_WITHIN_S):
                hearing.is_silent = True
                hearing.end(UpstreamFailed(f"node {hearing.node} is silent", hint="is it on, and on the network?"))
            is_heard = True

    async def _credit(self, hearing: _Hearing) -> None:
        hearing.told_to = hearing.n_read + WINDOW_BYTES
        credit = Credit(req=hearing.req, epoch=self._backend.epoch, to_byte=hearing.told_to)
        await self._backend.tell(hearing.node, "credit", credit)

    async def _hush(self, node: str, req: str) -> None:
        await self._backend.tell(node, "hush", Hush(req=req, epoch=self._backend.epoch))

    # ------------------------------------------------------------------------------------------------ what nodes say

    async def _on_said(self, message: Incoming) -> None:
        try:
            req = message.subject.rpartition(".")[2]
            node, said = node_of(message.subject), unpack_said(req, message.data)
        except BrokenMessage as exc:
            log.warning("a message makes no sense", extra={"subject": message.subject[:80], "why": str(exc)[:200]})
            return
        hearing = self._hearings.get(said.req)
        if hearing is None or hearing.node != node:
            if not said.is_end and self._backend.is_reigning:
                await self._hush(node, said.req)
            return
        hearing.take(said)
        if said.is_asking:
            await self._credit(hearing)

    async def _on_want(self, message: Incoming) -> None:
        try:
            node, want = node_of(message.subject), unpack(WantRest, message.data)
        except BrokenMessage as exc:
            log.warning("a message makes no sense", extra={"subject": message.subject[:80], "why": str(exc)[:200]})
            return
        if not message.reply.startswith(f"{inbox_of(node)}."):
            log.warning("a node asked to be answered elsewhere", extra={"node": node, "reply": message.reply[:80]})
            return
        hearing = self._hearings.get(want.req)
        part = BlobPart(why="nobody waits for this answer any more")
        if hearing is not None and hearing.node == node and 0 <= want.offset < len(hearing.request):
            part = BlobPart(data=hearing.request[want.offset : want.offset + REST_BYTES])
            hearing.news.set()
        await self._bus.publish(message.reply, pack(part))

    # -------------------------------------------------------------------------------------------------- who is asked

    def _online(self) -> list[Member]:
        now_s = self._backend.now_s()
        return [one for one in self._backend.members.all() if one.standing(now_s) == "online"]

    def _chosen(self, ask: Ask, tried: set[str]) -> tuple[str, LanguageModel] | None:
        """The node to ask next, and the model it has of that name."""
        found: dict[str, LanguageModel] = {}
        pullers = self.pullers()
        candidates = []
        for member in self._online():
            model = _model_of(member, ask.model)
            if ask.door == "/api/pull" and (member.node == ask.node or (not ask.node and member.node in pullers)):
                model = LanguageModel(name=ask.model, engine="ollama", capabilities=())
            beat = member.heartbeat
            is_leaving = member.settled.is_draining or (beat is not None and beat.is_leaving)
            if model is None or member.node in tried or is_leaving or ask.node not in {"", member.node}:
                continue
            found[member.node] = model
            candidates.append(self._candidate(member, model))
        chosen = choose(candidates)
        return None if chosen is None else (chosen.node, found[chosen.node])

    def _candidate(self, member: Member, model: LanguageModel) -> Candidate:
        beat = member.heartbeat
        key = member.node, model.name
        return Candidate(
            node=member.node,
            is_warm=model.name in _warm(member),
            slots=model.slots,
            n_running=self._n_running.get(key, 0),
            n_bytes=model.n_bytes,
            free_bytes=None if beat is None else beat.memory_free_bytes,
            is_drawing=bool(member.sent),
            turn_s=self._turns.get(key) or self._turn_elsewhere(model.name),
        )

    def _turn_elsewhere(self, name: str) -> float:
        """The mean turn of a model over the nodes where it was measured; 0 where it was nowhere."""
        known = [seconds for (_, model), seconds in self._turns.items() if model == name]
        return sum(known) / len(known) if known else 0.0

    def _note_turn(self, key: tuple[str, str], seconds: float) -> None:
        before = self._turns.get(key)
        self._turns[key] = seconds if before is None else before + _NEW_SHARE * (seconds - before)
        self._turns.move_to_end(key)
        while len(self._turns) > N_TURNS:
            self._turns.popitem(last=False)


async def _packed(ask: Ask) -> bytes:
    is_large = ask.sound is not None or any(isinstance(value, str | list) for value in ask.body.values())
    return await asyncio.to_thread(pack_ask, ask) if is_large and _weight(ask.body) > PIECE_BYTES else pack_ask(ask)


def _weight(value: object) -> int:
    """About how many characters a JSON value has, without writing it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_weight(each) for each in value.values())
    return sum(_weight(each) for each in value) if isinstance(value, list) else 8


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event came in time."""
    for patience_s in (seconds, _GRACE_S):
        try:
            async with asyncio.timeout(patience_s):
                await event.wait()
        except TimeoutError:
            continue
        return True
    return False


def _error(told: object) -> SdfleetError:
    wire = dict(told) if isinstance(told, dict) else {}
    if set(wire) < {"code", "message", "hint"}:
        return UpstreamFailed("a node said that it failed, and not how")
    return from_wire(wire)


def _warm(member: Member) -> frozenset[str]:
    beat = member.heartbeat
    return frozenset() if beat is None else frozenset(one.model for one in beat.language if one.is_warm)


def _model_of(member: Member, name: str) -> LanguageModel | None:
    models = () if member.hello is None else member.hello.language
    exact = next((model for model in models if model.name == name), None)
    return exact or next((model for model in models if same_name(name, model.name)), None)
