"""A node's part in text, embeddings and speech: it asks its own engines, and tells the router what they say.

chat, embed, stt -> a task: the request's rest is fetched, an engine asked, its pieces sent within the credit
hush, a router that is silent for 15 s -> the task is cancelled, which stops the engine
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sdfleet.errors import NotReady, SdfleetError, StoreUnavailable
from sdfleet.fleet.language_messages import (
    ALIVE_EVERY_S,
    MAX_ASK_BYTES,
    PIECE_BYTES,
    ROUTER_SILENT_S,
    WINDOW_BYTES,
    Credit,
    Hush,
    Said,
    Talk,
    UnknownDoor,
    WantRest,
    pack_said,
    unpack_ask,
)
from sdfleet.fleet.messages import BlobPart
from sdfleet.fleet.packing import BrokenMessage, pack, unpack
from sdfleet.fleet.subjects import up
from sdfleet.fleet.transport import Bus, Incoming, NoAnswer
from sdfleet.language.asking import Ask, LanguageModel, Speaking
from sdfleet.language.shelf import Shelf

log = logging.getLogger(__name__)

FETCH_WITHIN_S = 10.0


@dataclass(slots=True, eq=False)
class _Answering:
    """One answer on its way. waiting: bytes that have not been sent. to_byte: how far they may be sent."""

    req: str
    heard_s: float
    waiting: bytearray = field(default_factory=bytearray)
    to_byte: int = WINDOW_BYTES
    n_sent: int = 0
    seq: int = 0
    asked_s: float = 0.0
    is_whole: bool = False
    error: Mapping[str, str] | None = None
    model: LanguageModel | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Speaker:
    """See the file's first lines."""

    def __init__(self, node: str, *, control: Bus, bulk: Bus, language: Shelf) -> None:
        self._node = node
        self._control = control
        self._bulk = bulk
        self._language = language
        self._changed: Callable[[], None] = lambda: None
        self._is_old: Callable[[int], bool] = lambda _: False
        self._answers: dict[str, _Answering] = {}

    # ------------------------------------------------------------------------------------------------- what is told it

    def begin(
        self, *, changed: Callable[[], None], is_old: Callable[[int], bool]
    ) -> tuple[tuple[str, Callable[[Incoming], Awaitable[None]]], ...]:
        """What a node listens to for this, and who heeds it.

        changed: called when an answer begins or ends. is_old: whether a router of this epoch reigns no more.
        """
        self._changed, self._is_old = changed, is_old
        return (
            ("chat", self._on_talk),
            ("embed", self._on_talk),
            ("stt", self._on_talk),
            ("credit", self._on_credit),
            ("hush", self._on_hush),
        )

    def models(self) -> tuple[LanguageModel, ...]:
        """What this node's engines have, without what changes from one minute to the next."""
        return tuple(replace(model, is_warm=False, expires_at="") for model in self._language.models())

    def standing(self) -> tuple[Speaking, ...]:
        """The models in memory or in use."""
        running = self._language.running()
        return tuple(
            Speaking(model=model.name, is_warm=model.is_warm, n_running=running.get(model.name, 0))
            for model in self._language.models()
            if model.is_warm or running.get(model.name)
        )

    def taken_bytes(self) -> int:
        """Memory that models here hold or, being asked something now, are about to hold."""
        running = self._language.running()
        return sum(m.n_bytes for m in self._language.models() if m.is_warm or m.name in running)

    def coming_bytes(self) -> int:
        """The part of `taken_bytes` that no measurement of free memory shows yet."""
        running = self._language.running()
        return sum(m.n_bytes for m in self._language.models() if not m.is_warm and m.name in running)

    @property
    def n_running(self) -> int:
        """Answers under way."""
        return len(self._answers)

    async def close(self) -> None:
        """Stop every answer."""
        tasks = [one.task for one in self._answers.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _on_talk(self, message: Incoming) -> None:
        talk = unpack(Talk, message.data)
        if self._is_old(talk.epoch) or talk.req in self._answers:
            return
        one = _Answering(req=talk.req, heard_s=self._now_s())
        self._answers[talk.req] = one
        one.task = asyncio.create_task(self._serve(one, talk), name=f"answer {talk.req}")
        one.task.add_done_callback(lambda task: self._done(one, task))
        if len(self._answers) == 1:  # the router itself counts what it has given here; memory it must be told of
            self._changed()

    async def _on_credit(self, message: Incoming) -> None:
        credit = unpack(Credit, message.data)
        one = self._answers.get(credit.req)
        if one is not None and not self._is_old(credit.epoch):
            one.heard_s = self._now_s()
            one.to_byte = max(one.to_byte, credit.to_byte)
            one.moved.set()

    async def _on_hush(self, message: Incoming) -> None:
        hush = unpack(Hush, message.data)
        one = self._answers.get(hush.req)
        if one is not None and one.task is not None and not self._is_old(hush.epoch):
            one.task.cancel()

    # ------------------------------------------------------------------------------------------------ an answer, whole

    async def _serve(self, one: _Answering, talk: Talk) -> None:
        """Send while the engine is asked; the two end together."""
        asking = asyncio.ensure_future(self._ask(one, talk))
        try:
            await self._send(one)
        finally:
            asking.cancel()
            await asyncio.wait({asking})
        if not asking.cancelled():
            asking.result()

    async def _ask(self, one: _Answering, talk: Talk) -> None:
        """Put an engine's pieces where they are sent from, no more than a window of them."""
        try:
            ask = await self._fetched(talk)
            async with self._language.ask(ask) as answer:
                one.model = answer.model
                async for piece in answer.pieces:
                    one.waiting += piece
                    if ask.is_stream:
                        one.waiting += b"\n"
                    one.moved.set()
                    while len(one.waiting) > WINDOW_BYTES:
                        one.drained.clear()
                        await one.drained.wait()
        except SdfleetError as exc:
            one.error = exc.to_wire()
        except UnknownDoor as exc:
            why = f"node {self._node} does not know {exc}: its sdfleet is older than the router's"
            one.error = NotReady(why, hint="upgrade it; see docs/fleet.md", retry_after_s=60.0).to_wire()
        except BrokenMessage as exc:
            one.error = NotReady(f"the request did not arrive whole: {exc}", retry_after_s=1.0).to_wire()
        except asyncio.CancelledError:
            raise
        except BaseException:
            one.error = SdfleetError("a fault of sdfleet itself, on the node", hint="see its log").to_wire()
            raise
        finally:
            one.is_whole = True
            one.moved.set()

    async def _fetched(self, talk: Talk) -> Ask:
        if not 0 < talk.n_bytes <= MAX_ASK_BYTES:
            raise BrokenMessage(f"a request of {talk.n_bytes} bytes")
        data = bytearray(talk.data)
        while len(data) < talk.n_bytes:
            want = WantRest(req=talk.req, offset=len(data))
            try:
                answer = await self._bulk.request(up(self._node, "want"), pack(want), timeout_s=FETCH_WITHIN_S)
            except NoAnswer as exc:
                raise BrokenMessage(str(exc)) from exc
            part = unpack(BlobPart, answer.data)
            if not part.data:
                raise BrokenMessage(part.why or "its rest was not given")
            data += part.data
        if len(data) == len(talk.data):
            return unpack_ask(bytes(data))
        return await asyncio.to_thread(unpack_ask, bytes(data))

    async def _send(self, one: _Answering) -> None:
        """Tell the router what there is, as far as it goes; a sign of life at least every second."""
        await self._say(one)  # it was heard
        while True:
            may_send = min(len(one.waiting), PIECE_BYTES, one.to_byte - one.n_sent)
            if may_send > 0:
                data = bytes(one.waiting[:may_send])
                del one.waiting[:may_send]
                one.n_sent += may_send
                await self._say(one, data)
                one.drained.set()
                continue
            if one.is_whole and not one.waiting:
                await self._say(one, is_end=True)
                return
            one.moved.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(ALIVE_EVERY_S):
                    await one.moved.wait()
                continue
            if self._now_s() - one.heard_s > ROUTER_SILENT_S:
                log.info("the router is silent: an answer is given up", extra={"req": one.req})
                return
            await self._say(one)

    async def _say(self, one: _Answering, data: bytes = b"", *, is_end: bool = False) -> None:
        now_s = self._now_s()
        is_asking = now_s - one.asked_s >= ALIVE_EVERY_S and not is_end
        if is_asking:
            one.asked_s = now_s
        said = Said(
            req=one.req, seq=one.seq, data=data, is_asking=is_asking, is_end=is_end,
            model=one.model if data and one.n_sent == len(data) else None, error=one.error if is_end else None,
        )  # fmt: skip
        one.seq += 1
        with suppress(StoreUnavailable):  # the router sees the gap
            await self._control.publish(up(self._node, f"tok.{one.req}"), pack_said(said))

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _done(self, one: _Answering, task: asyncio.Task[None]) -> None:
        self._answers.pop(one.req, None)
        if not self._answers:
            self._changed()
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("an answer met a fault of ours", exc_info=fault)
