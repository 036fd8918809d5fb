"""The fleet's transport on NATS: core messages are the bus, a JetStream work queue the ledger, a KV key the crown.

What was measured about it, and why it is set up like this: docs/decisions/0016-nats-carries-the-fleet.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, BadRequestError, KeyNotFoundError, KeyWrongLastSequenceError, NotFoundError
from nats.js.kv import KeyValue

from sdfleet.domain import JobId
from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.bus_nats import RECONNECT_S, NatsBus
from sdfleet.fleet.transport import HOLD_S, REIGN_S, Entry, LedgerFull, Reign

log = logging.getLogger(__name__)

STREAM = "JOBS"
SUBJECTS = "fleet.q"
BUCKET = "ctl"
LEADER = "leader"
LEDGER_BYTES = 2 * 2**30
# Input pictures are not in it: they travel in chunks.
MAX_ENTRY_BYTES = 2**20
DUPLICATE_WINDOW_S = 3600.0
# Most jobs that one router holds of each kind; the others wait in the stream.
MOST_HELD = 512
# A fetch that waits is not asked for again after a broker's restart, so none waits for longer.
FETCH_S = 1.0
# A write that is synced to disk takes 1 to 20 ms; with a broker that is being started again, a second.
WRITE_S = 3.0
_NO_SPACE_CODES = {10077, 10047, 10023}  # most bytes, insufficient storage, insufficient resources
_WRONG_LAST_SEQUENCE = 10071


class NatsLedger:
    """See `transport.Ledger`; made by `open_transport`. Urgent and other jobs are two consumers of one stream."""

    def __init__(self, js: JetStreamContext) -> None:
        self._js = js
        self._urgent: asyncio.Queue[Entry] = asyncio.Queue()
        self._others: asyncio.Queue[Entry] = asyncio.Queue()
        self._news = asyncio.Event()
        self._is_asked = asyncio.Event()
        # The urgent ones that lay there are held: until then the others would be handed out before them.
        self._urgent_are_held = asyncio.Event()
        self._pullers: list[asyncio.Task[None]] = []

    async def open(self, *, replicas: int) -> None:
        """Make the stream where it is missing, and begin to hold jobs. Raises StoreUnavailable."""
        wanted = StreamConfig(
            name=STREAM,
            subjects=[f"{SUBJECTS}.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_bytes=LEDGER_BYTES,
            max_msg_size=MAX_ENTRY_BYTES,
            duplicate_window=DUPLICATE_WINDOW_S,
            num_replicas=replicas,
        )
        with _away():
            try:
                await self._js.add_stream(wanted)
            except BadRequestError:
                await self._js.update_stream(wanted)
            for kind in ("hi", "lo"):
                await self._js.add_consumer(STREAM, _consumer(kind))
        for kind, queue in (("hi", self._urgent), ("lo", self._others)):
            self._pullers.append(asyncio.create_task(self._pull(kind, queue), name=f"ledger {kind}"))

    async def close(self) -> None:
        """Hold no more."""
        for task in self._pullers:
            task.cancel()
        if self._pullers:
            await asyncio.wait(self._pullers)

    async def enter(self, job: JobId, body: bytes, *, turn: int = 0, is_urgent: bool = False) -> None:
        if len(body) > MAX_ENTRY_BYTES - 1024:
            raise StoreUnavailable(f"a job of {len(body)} bytes is too large for the ledger")
        subject = f"{SUBJECTS}.{'hi' if is_urgent else 'lo'}.{job}"
        # The second header: only where no entry of this job is there. A router that starts enters its jobs again.
        headers = {"Nats-Msg-Id": f"{job}.{turn}", "Nats-Expected-Last-Subject-Sequence": "0"}
        with _away():
            try:
                await self._js.publish(subject, body, timeout=WRITE_S, stream=STREAM, headers=headers)
            except APIError as exc:
                if exc.err_code != _WRONG_LAST_SEQUENCE:
                    raise

    async def next(self, *, timeout_s: float) -> Entry | None:
        self._is_asked.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    for queue in (self._urgent, self._others):
                        if not queue.empty():
                            return queue.get_nowait()
                    self._news.clear()
                    await self._news.wait()
        return None

    async def extend(self, entry: Entry) -> None:
        with _away():
            await _message(entry).in_progress()

    async def strike(self, entry: Entry) -> None:
        with _away():
            await _message(entry).ack_sync(timeout=WRITE_S)

    async def put_back(self, entry: Entry) -> None:
        with _away():
            await _message(entry).nak()

    async def _pull(self, kind: str, queue: asyncio.Queue[Entry]) -> None:
        """Take what comes, for as long as the process lives; a broker that is away comes back."""
        source: JetStreamContext.PullSubscription | None = None
        # A router that stands by must not hold what the one that reigns has entered.
        await self._is_asked.wait()
        while True:
            try:
                if source is None:
                    await self._js.add_consumer(STREAM, _consumer(kind))
                    source = await self._js.pull_subscribe_bind(consumer=_consumer_name(kind), stream=STREAM)
                    if queue is self._others:
                        await self._urgent_are_held.wait()
                    elif not (await source.consumer_info()).num_pending:
                        self._urgent_are_held.set()
                for message in await source.fetch(batch=64, timeout=FETCH_S):
                    queue.put_nowait(_entry(message))
                if queue is self._urgent:
                    self._urgent_are_held.set()
                self._news.set()
            except TimeoutError:
                continue
            except (NatsError, OSError) as exc:
                log.info("the ledger cannot be read now", extra={"why": str(exc)[:200] or type(exc).__name__})
                if source is not None:
                    with contextlib.suppress(NatsError, OSError):
                        await source.unsubscribe()
                    source = None
                if queue is self._urgent:
                    self._urgent_are_held.clear()
                await asyncio.sleep(RECONNECT_S)


def _consumer_name(kind: str) -> str:
    return f"router_{kind}"


def _consumer(kind: str) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=_consumer_name(kind),
        filter_subject=f"{SUBJECTS}.{kind}.>",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=HOLD_S,
        # Every router that ends adds a delivery to each job it held: a limit would give up innocent ones.
        max_deliver=-1,
        max_ack_pending=MOST_HELD,
    )


def _entry(message: Msg) -> Entry:
    job = JobId(message.subject.rsplit(".", 1)[-1])
    return Entry(job=job, body=message.data, n_deliveries=message.metadata.num_delivered or 1, token=message)


def _message(entry: Entry) -> Msg:
    return cast("Msg", entry.token)


@contextlib.contextmanager
def _away() -> Iterator[None]:
    """What a broker that is away or full raises, as ours."""
    try:
        yield
    except APIError as exc:
        if exc.err_code in _NO_SPACE_CODES:
            raise LedgerFull("the ledger of accepted jobs is full", retry_after_s=30.0) from exc
        raise StoreUnavailable(f"the broker refused: {exc.description or exc}", retry_after_s=2.0) from exc
    except (NatsError, OSError, TimeoutError) as exc:
        raise StoreUnavailable(
            f"the fleet's broker is away: {str(exc)[:200] or type(exc).__name__}", retry_after_s=2.0
        ) from exc


class NatsCrown:
    """See `transport.Crown`: one key that the broker forgets after `REIGN_S`; its revisions only grow."""

    def __init__(self, js: JetStreamContext) -> None:
        self._js = js
        self._bucket: KeyValue | None = None
        self._revision = 0

    async def take(self, router: str, *, above: int = 0) -> Reign | None:
        with _away():
            bucket = await self._opened()
            try:
                self._revision = await bucket.create(LEADER, router.encode())
            except KeyWrongLastSequenceError:
                revision = await self._revision_of(bucket, router)
                if revision is None:
                    return None
                self._revision = revision
        return Reign(router=router, epoch=max(self._revision, above + 1))

    async def keep(self, reign: Reign) -> bool:
        with _away():
            bucket = await self._opened()
            try:
                self._revision = await bucket.update(LEADER, reign.router.encode(), last=self._revision)
            except KeyWrongLastSequenceError:
                return False
        return True

    async def resign(self, reign: Reign) -> None:
        with contextlib.suppress(StoreUnavailable), _away():
            bucket = await self._opened()
            with contextlib.suppress(KeyWrongLastSequenceError):
                await bucket.delete(LEADER, last=self._revision)

    @staticmethod
    async def _revision_of(bucket: KeyValue, router: str) -> int | None:
        """The next revision of the key, where this router's own last life has it."""
        try:
            held = await bucket.get(LEADER)
            if held.value != router.encode():
                return None
            return await bucket.update(LEADER, router.encode(), last=held.revision)
        except (KeyNotFoundError, KeyWrongLastSequenceError):
            return None  # it runs out just now, or another took it

    async def _opened(self) -> KeyValue:
        if self._bucket is None:
            try:
                self._bucket = await self._js.key_value(BUCKET)
            except NotFoundError:
                config = KeyValueConfig(bucket=BUCKET, ttl=REIGN_S, storage=StorageType.FILE)
                self._bucket = await self._js.create_key_value(config)
        return self._bucket


@dataclass(slots=True)
class NatsTransport:
    """See `transport.Transport`; made by `open_transport`."""

    bus: NatsBus
    ledger: NatsLedger
    crown: NatsCrown

    async def close(self) -> None:
        await self.ledger.close()
        await self.bus.close()


async def open_transport(bus: NatsBus, *, replicas: int = 1) -> NatsTransport:
    """The ledger and the crown beside a router's connection. Raises StoreUnavailable."""
    js = bus.client.jetstream(timeout=WRITE_S)
    ledger = NatsLedger(js)
    await ledger.open(replicas=replicas)
    return NatsTransport(bus=bus, ledger=ledger, crown=NatsCrown(js))
