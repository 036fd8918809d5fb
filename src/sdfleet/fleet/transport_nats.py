"""The fleet's transport on NATS: core messages are the bus, a JetStream work queue the ledger, a KV key the crown.

What was measured about it, and why it is set up like this: docs/decisions/0016-nats-carries-the-fleet.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
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
from sdfleet.fleet.transport import HOLD_S, REIGN_S, Entry, Handler, Incoming, LedgerFull, NoAnswer, Reign

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
RECONNECT_S = 0.25
# A broker that reads its users anew just now turns away whoever is in the middle of saying who it is: seen with three
# nodes that joined at the same moment. One that is really unknown is told so after half a second.
REFUSALS = 3
CLOSE_S = 2.0
# A connection that is silent for two of these is given up.
PING_S = 5
# Of messages that a handler has not taken yet.
PENDING_BYTES = 64 * 2**20
_NO_SPACE_CODES = {10077, 10047, 10023}  # most bytes, insufficient storage, insufficient resources
_WRONG_LAST_SEQUENCE = 10071


class NotLetIn(StoreUnavailable):
    """The broker is there and turns this connection away for who it is."""

    code = "not_let_in"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """How one connection says who it is. seed: its NKey seed. user, password: for a guest who joins."""

    seed: str | None = None
    user: str | None = None
    password: str | None = None

    def __repr__(self) -> str:
        return "Credentials(...)"


async def connect(
    urls: tuple[str, ...],
    *,
    name: str,
    credentials: Credentials | None = None,
    tls: ssl.SSLContext | None = None,
    is_pinned: bool = True,
    inbox: str = "_INBOX",
    within_s: float = 10.0,
) -> NatsBus:
    """A connection that comes back by itself for as long as it is not closed.

    is_pinned: `tls` trusts one router's own certificates; else those of another's broker, which has a name.
    inbox: first part of the subjects on which it is answered. Raises NotLetIn, StoreUnavailable.
    """
    bus = NatsBus(name)
    options: dict[str, Any] = {
        "name": name,
        "inbox_prefix": inbox,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": RECONNECT_S,
        "connect_timeout": 2,
        "ping_interval": PING_S,
        "max_outstanding_pings": 2,
        "error_cb": bus.on_error,
        "disconnected_cb": bus.on_lost,
        "reconnected_cb": bus.on_back,
    }
    if tls is not None and not is_pinned:
        options["tls"] = tls
    elif tls is not None:
        # The certificate is pinned, see trust.py: which address it was reached at says nothing.
        options |= {"tls": tls, "tls_handshake_first": True, "tls_hostname": "sdfleet"}
    if credentials is not None:
        options |= {"nkeys_seed_str": credentials.seed} if credentials.seed else {}
        options |= {"user": credentials.user, "password": credentials.password} if credentials.user else {}
    loop = asyncio.get_running_loop()
    end_s = loop.time() + within_s
    n_refused = 0
    while True:
        client = Client()
        try:
            async with asyncio.timeout_at(end_s):
                # With reconnecting allowed the client would try for ever, also where it is refused for who it is.
                await client.connect(list(urls), **{**options, "allow_reconnect": False})
        except (NatsError, OSError, TimeoutError) as exc:
            await _ended(client)
            n_refused = n_refused + 1 if _is_refusal(exc) or bus.was_refused else 0
            if n_refused >= REFUSALS:
                raise NotLetIn("the fleet's broker does not know this connection's key", retry_after_s=2.0) from exc
            if loop.time() >= end_s:
                why = bus.fault or str(exc) or type(exc).__name__
                raise StoreUnavailable(f"the fleet's broker cannot be reached: {why}", retry_after_s=2.0) from exc
            bus.forgive()
            await asyncio.sleep(RECONNECT_S)
        else:
            client.options["allow_reconnect"] = True
            bus.client = client
            return bus


async def _ended(client: Client) -> None:
    """The client waits for ever for the end of a connection whose TLS was never agreed on."""
    with contextlib.suppress(NatsError, OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await client.close()


def _is_refusal(exc: BaseException) -> bool:
    return "authorization" in str(exc).lower()


class NatsBus:
    """See `transport.Bus`; made by `connect`."""

    client: Client

    def __init__(self, name: str) -> None:
        self._name = name
        self._listeners: list[Callable[[bool], None]] = []
        self._was_refused = False
        # What the connection met last, for whoever could not be connected.
        self.fault = ""

    @property
    def is_connected(self) -> bool:
        return self.client.is_connected

    @property
    def was_refused(self) -> bool:
        """Whether the broker turned this connection away for who it is: its key was revoked."""
        return self._was_refused

    def on_connection(self, call: Callable[[bool], None]) -> None:
        self._listeners.append(call)

    async def publish(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        if self.client.is_closed:
            raise StoreUnavailable("the connection to the broker was closed")
        if not self.client.is_connected:
            return  # the client would keep it and say it late; what is said here is worth something only now
        try:
            await self.client.publish(subject, data, reply=reply, headers=dict(headers) if headers else None)
        except NatsError as exc:
            raise StoreUnavailable(f"the broker did not take a message: {exc}") from exc

    async def subscribe(self, subject: str, handler: Handler) -> _Heard:
        async def take(message: Msg) -> None:
            if not message.data and "Status" in (message.headers or {}):
                return  # the server's own word: nobody listened where this would have been answered
            try:
                await handler(_incoming(message))
            except Exception:  # one message fails, the others go on
                log.exception("a message met a fault of ours", extra={"subject": message.subject})

        try:
            heard = await self.client.subscribe(subject, cb=take, pending_bytes_limit=PENDING_BYTES)
        except NatsError as exc:
            raise StoreUnavailable(f"the broker does not let us listen: {exc}") from exc
        return _Heard(heard)

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Incoming:
        if not self.is_connected:
            raise NoAnswer("the broker cannot be reached")
        try:
            # The annotation of `timeout` is of whole seconds; it takes parts of them.
            answer = await self.client.request(
                subject, data, timeout=cast("int", timeout_s), headers=dict(headers) if headers else None
            )
        except NoRespondersError as exc:
            raise NoAnswer(f"nobody listens on {subject}") from exc
        except (NatsError, TimeoutError) as exc:
            raise NoAnswer(f"nobody answered on {subject} within {timeout_s} s") from exc
        return _incoming(answer)

    async def flush(self) -> None:
        try:
            # The client writes a ping before what still waits to be written, so the first answer promises nothing of
            # it; but by then that is written, and the second ping comes after it.
            for _ in range(2):
                await self.client.flush(timeout=2)
        except (NatsError, TimeoutError, OSError) as exc:
            raise StoreUnavailable(f"the broker cannot be reached: {str(exc) or type(exc).__name__}") from exc

    async def close(self) -> None:
        await _ended(self.client)

    async def on_error(self, exc: Exception) -> None:
        """Called by the client library."""
        self._was_refused = self._was_refused or _is_refusal(exc)
        fault = str(exc)[:200] or type(exc).__name__
        is_known, self.fault = fault == self.fault, fault
        if not is_known:  # a broker that is away for an hour is tried four times a second
            log.warning("the connection to the broker has a fault", extra={"connection": self._name, "why": fault})
        if self._was_refused:
            self._tell()

    def forgive(self) -> None:
        """It is tried once more."""
        self._was_refused = False

    async def on_lost(self) -> None:
        """Called by the client library."""
        self._tell()

    async def on_back(self) -> None:
        """Called by the client library."""
        self._was_refused = False
        self.fault = ""
        self._tell()

    def _tell(self) -> None:
        for call in self._listeners:
            call(self.client.is_connected)


def _incoming(message: Msg) -> Incoming:
    return Incoming(
        subject=message.subject, data=message.data, headers=message.headers or {}, reply=message.reply or ""
    )


class _Heard:
    def __init__(self, subscription: NatsSubscription) -> None:
        self._subscription: NatsSubscription | None = subscription

    async def close(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()


class NatsLedger:
    """See `transport.Ledger`; made by `open_ledger`. Urgent and other jobs are two consumers of one stream."""

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
def _away() -> Any:
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
