"""One connection to the fleet's broker: the bus, on core NATS, and how it is let in."""

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

from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.transport import Handler, Incoming, NoAnswer, hand_over

log = logging.getLogger(__name__)

RECONNECT_S = 0.25
# A broker that reads its users anew just now turns away whoever is in the middle of saying who it is: seen with three
# nodes that joined at the same moment. One that is really unknown is told so after half a second.
REFUSALS = 3
CLOSE_S = 2.0
# A connection that is silent for two of these is given up.
PING_S = 5
# Of messages that a handler has not taken yet.
PENDING_BYTES = 64 * 2**20


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
        # The certificate is pinned, see certificates.py: which address it was reached at says nothing.
        options |= {"tls": tls, "tls_handshake_first": True, "tls_hostname": "sdfleet"}
    if credentials is not None:
        options |= {"nkeys_seed_str": credentials.seed} if credentials.seed else {}
        options |= {"user": credentials.user, "password": credentials.password} if credentials.user else {}
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_heed)
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


def _heed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """As the loop does by itself, but for a broker that goes in the middle of TLS's first words.

    uvloop then meets its own closed transport in a callback; the client hears of the lost connection and tries again.
    """
    exc = context.get("exception")
    if isinstance(exc, RuntimeError) and "the handler is closed" in str(exc):
        log.info("the broker went while a connection to it began", extra={"why": str(exc)[:200]})
        return
    loop.default_exception_handler(context)


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
            await hand_over(_incoming(message), handler)

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
