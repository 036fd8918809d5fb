"""The seams between the fleet and whatever carries its messages: a bus, a ledger of accepted jobs, a crown.

Two implementations pass one contract suite (tests/fleet/test_transport_contract.py): `transport_memory`, everything in
one process, and `transport_nats`, a NATS server with JetStream.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sdfleet.domain import JobId
from sdfleet.errors import StoreUnavailable

log = logging.getLogger(__name__)


class NoAnswer(Exception):
    """Nobody answered in time, or nobody listens. What was asked may have been done all the same."""


class LedgerFull(StoreUnavailable):
    """The ledger takes no more jobs: its disk share is used up."""

    code = "ledger_full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A message as it arrived. reply: where an answer is awaited; empty where none is."""

    subject: str
    data: bytes = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    reply: str = ""


# Called on the event loop for each message, one after the other for each subscription.
Handler = Callable[[Incoming], Awaitable[None]]


async def hand_over(message: Incoming, handler: Handler) -> None:
    """Let a handler take a message. A fault of the handler is logged and raised to nobody: the next ones still come."""
    try:
        await handler(message)
    except Exception:  # one message fails, the others go on
        log.exception("a message met a fault of ours", extra={"subject": message.subject})


class Subscription(Protocol):
    """What `subscribe` gives back."""

    async def close(self) -> None:
        """Hear no more; may be called twice."""


class Bus(Protocol):
    """At most once, in order for each pair of sender and subject. A connection that is lost comes back by itself."""

    @property
    def is_connected(self) -> bool:
        """Whether what is said now will be carried; messages said while it is not are lost, not kept."""

    def on_connection(self, call: Callable[[bool], None]) -> None:
        """Be told whenever the connection is lost (False) or back (True)."""

    async def publish(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        """Say something to whoever listens; `reply` is where answers are to go. Raises StoreUnavailable."""

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """Hear everything that is said on a subject; `*` stands for one part of it, a last `>` for all that follow.

        What a handler raises is logged and ends only that message. Raises StoreUnavailable.
        """

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Incoming:
        """Say something and give back the first answer, to an inbox of this connection's own. Raises NoAnswer."""

    async def flush(self) -> None:
        """Return when everything said before has reached the broker. Raises StoreUnavailable."""

    async def close(self) -> None:
        """Say goodbye; may be called twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A job in the ledger that this router holds: nobody else is given it while `extend` is called in time.

    body: as it was entered. n_deliveries: 1 at first; every router that ended while it held the job adds one.
    token: names this holding of it, for the ledger.
    """

    job: JobId
    body: bytes = field(repr=False)
    n_deliveries: int = 1
    token: object = None


class Ledger(Protocol):
    """Jobs that were accepted and have not ended, on the broker's disk: the copy outside of the router's own store."""

    async def enter(self, job: JobId, body: bytes, *, turn: int = 0, is_urgent: bool = False) -> None:
        """Write a job down; returns when it is on disk. Changes nothing while the job stands there already.

        Nor does the same id and turn within the hour. turn: another one for a job that had ended and is to be drawn
        again.

        Raises StoreUnavailable (the broker is away: the job counts as not entered), LedgerFull.
        """

    async def next(self, *, timeout_s: float) -> Entry | None:
        """Hold one more job, urgent ones first; None where there is none. Raises StoreUnavailable."""

    async def extend(self, entry: Entry) -> None:
        """Keep holding it: at least every HOLD_S / 3."""

    async def strike(self, entry: Entry) -> None:
        """The job has ended: it leaves the ledger; returns when that is certain. Raises StoreUnavailable."""

    async def put_back(self, entry: Entry) -> None:
        """Somebody else may hold it now."""


# Held jobs whose holder is silent for so long are given to the next router that asks.
HOLD_S = 30.0
EXTEND_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reign:
    """One router's time as the one that gives out work. epoch: higher than that of every reign before it."""

    router: str
    epoch: int


class Crown(Protocol):
    """Which router reigns, with a number that only grows: a node obeys no lower one than it has seen."""

    async def take(self, router: str, *, above: int = 0) -> Reign | None:
        """Begin to reign; None while another does. Raises StoreUnavailable.

        router: no two that run have the same. What an earlier life of this one held is taken over at once.
        above: the highest epoch that this router remembers, for a broker that has lost its disk.
        """

    async def keep(self, reign: Reign) -> bool:
        """Go on for another `REIGN_S`; False: it was lost, stop giving out work at once. Raises StoreUnavailable."""

    async def resign(self, reign: Reign) -> None:
        """Let another begin at once."""


REIGN_S = 10.0
KEEP_EVERY_S = 3.0


class Transport(Protocol):
    """A router's three connections to the broker as one. Nodes have a `Bus` each for control and for bulk alone."""

    @property
    def bus(self) -> Bus:
        """Messages."""

    @property
    def ledger(self) -> Ledger:
        """Accepted jobs."""

    @property
    def crown(self) -> Crown:
        """Who reigns."""

    async def close(self) -> None:
        """Say goodbye; may be called twice."""
