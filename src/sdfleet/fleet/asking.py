"""How a machine joins a fleet, from its own side: `join` with a code, `ask` without one. See `joining.py`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from sdfleet.errors import JoinRefused, NotReady, SdfleetError, StoreUnavailable, from_wire
from sdfleet.fleet.bus_nats import Credentials, NatsBus, NotLetIn, connect
from sdfleet.fleet.certificates import certificate_at, fingerprint_of, trusting, trusting_only
from sdfleet.fleet.identity import Identity, urls_of
from sdfleet.fleet.join_code import parse
from sdfleet.fleet.joining import (
    PROOF,
    Ask,
    Asked,
    Asking,
    Join,
    Joined,
    commitment_of,
    proof_of,
    short_code,
)
from sdfleet.fleet.keys import NKey
from sdfleet.fleet.packing import BrokenMessage, pack, unpack
from sdfleet.fleet.rights import asking_inbox, code_inbox, guest_key
from sdfleet.fleet.signing import is_signed, sign
from sdfleet.fleet.subjects import inbox_of, up
from sdfleet.fleet.transport import Bus, NoAnswer
from sdfleet.fleet.trust import PENDING_S

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_S = 3.0
N_TRIES = 3
# How long a person's decision is waited for before it is asked for again.
DECISION_S = 4.0
# The broker is told of a new key before that key connects, but takes it in a moment later.
LET_IN_S = 10.0
_AGAIN_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    """A broker that was found. fingerprint: of the certificate it showed; empty where a public authority vouches."""

    place: str
    tls: ssl.SSLContext | None
    fingerprint: bytes


async def join(code_text: str, *, keys: Sequence[NKey], wish: str) -> tuple[Identity, ...]:
    """Become a part of the fleet that the code is of. keys: one for each device of this machine.

    A key that the fleet knows keeps its name. Raises InvalidValue (no code), JoinRefused, StoreUnavailable.
    """
    code = parse(code_text)
    route = await _found(code.places, fingerprint=code.fingerprint)
    subject = f"fleet.join.{code.id}"
    public = tuple(key.public for key in keys)
    said = Join(keys=public, proofs=_proofs(keys, proof_of(subject, public, wish)), wish=wish)
    payload = pack(said)
    headers = {PROOF: sign(code.proof, subject, payload)}
    refusal = JoinRefused(
        "the router does not take this join code: it has run out or was used",
        hint="`sdfleet fleet code` on the router makes a new one",
    )
    async with _connection(route, key=code.key, inbox=code_inbox(code.id), refusal=refusal) as bus:
        for _ in range(N_TRIES):
            with contextlib.suppress(NoAnswer):
                answer = await bus.request(subject, payload, headers=headers, timeout_s=ANSWER_S)
                if is_signed(code.proof, answer.subject, answer.data, answer.headers.get(PROOF, "")):
                    made = _identities(_read(Joined, answer.data), keys)
                    await _let_in(made[0])
                    return made
                log.warning("an answer to the join was not signed by the router that made the code")
        raise (
            refusal
            if getattr(bus, "was_refused", False)
            else NotReady(
                "the router's broker is there, the router does not answer",
                hint="is `sdfleet router` running, or did the code run out?",
            )
        )


async def ask(
    place: str,
    *,
    keys: Sequence[NKey],
    wish: str,
    show: Callable[[str], None],
    confirm: Callable[[str], Awaitable[bool]],
    within_s: float = PENDING_S,
) -> tuple[Identity, ...]:
    """Become a part of the fleet whose broker is at `place` (`host:port`), if a person says so on both sides.

    show: called with the short code that the router shows too, if it is the one that was meant. confirm: asked, once
    the router has said yes, whether its code was the same: whoever sits in between could say yes as well.
    Raises JoinRefused, StoreUnavailable, NotReady (nobody decided in time).
    """
    route = await _found((place,), fingerprint=None)
    first, public = keys[0], tuple(key.public for key in keys)
    nonce = secrets.token_hex(16)
    commitment = commitment_of(nonce, public)
    subject = f"fleet.ask.{first.public}"
    proofs = _proofs(keys, proof_of(subject, public, wish, commitment))
    said = pack(Ask(keys=public, proofs=proofs, wish=wish, commitment=commitment))
    closed = JoinRefused("this router takes no machines without a code", hint="`sdfleet fleet code` makes one there")
    async with _connection(route, key=guest_key(), inbox="_INBOX_guest", refusal=closed) as guest:
        await guest.publish(subject, said)
        await guest.flush()
    unheard = NotReady(
        "the router did not let this machine ask: too many do at once, or it knows this key already",
        hint="try again in a minute, or join with a code",
    )
    async with _connection(route, key=first, inbox=asking_inbox(first.public), refusal=unheard, is_new=True) as bus:
        router_nonce = (await _asked(bus, first, Asking(step="begin"))).nonce
        offered = (await _asked(bus, first, Asking(step="reveal", nonce=nonce))).offered
        if offered is None:
            raise JoinRefused("the router offers nothing")
        offer = _identities(offered, keys)
        code = short_code(fingerprint=route.fingerprint, keys=public, asker_nonce=nonce, router_nonce=router_nonce)
        show(code)
        try:
            async with asyncio.timeout(within_s):
                while not await _is_approved(bus, first, offer[0]):
                    pass
        except TimeoutError as exc:
            raise NotReady("nobody has approved this machine in time", hint="ask again, or join with a code") from exc
    if not await confirm(code):
        raise JoinRefused("the router showed another code: it may be somebody else's", hint="join with a code instead")
    return offer


async def _is_approved(bus: Bus, key: NKey, offer: Identity) -> bool:
    """Whether a person has said yes; returns after a while where nobody has. Raises JoinRefused."""
    try:
        answer = await bus.request(_asking(key), pack(Asking(step="decide")), timeout_s=DECISION_S)
    except NoAnswer:
        # The yes may have been lost: then this machine is a node by now.
        if await _is_welcome(offer):
            return True
        if not bus.is_connected:
            raise JoinRefused("this machine was turned away, or the router has gone", hint="ask again") from None
        return False
    return _heard(Asked, answer.data).is_approved


async def _let_in(made: Identity) -> None:
    """Return once the broker knows the new node; another's broker is told by its operator, whenever that is."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + LET_IN_S
    while made.authority and loop.time() < end_s and not await _is_welcome(made):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(_AGAIN_S)


async def _is_welcome(offer: Identity) -> bool:
    try:
        bus = await connect(
            offer.urls, name=f"{offer.node} joins", credentials=offer.credentials, tls=offer.tls(),
            inbox=inbox_of(offer.node), within_s=ANSWER_S,
        )  # fmt: skip
    except StoreUnavailable:
        return False
    try:
        answer = await bus.request(up(offer.node, "joined"), pack(Asking(step="decide")), timeout_s=ANSWER_S)
        return _heard(Asked, answer.data).is_approved
    except NoAnswer:
        return False
    finally:
        await bus.close()


async def _asked(bus: Bus, key: NKey, said: Asking) -> Asked:
    """The router's answer. Raises JoinRefused, NotReady."""
    for _ in range(N_TRIES):
        with contextlib.suppress(NoAnswer):
            return _heard(Asked, (await bus.request(_asking(key), pack(said), timeout_s=ANSWER_S)).data)
    raise NotReady("the router's broker is there, the router does not answer", hint="is `sdfleet router` running?")


def _asking(key: NKey) -> str:
    return f"fleet.asking.{key.public}"


def _heard(kind: type[Asked], data: bytes) -> Asked:
    answer = _read(kind, data)
    if answer.error is not None:
        raise from_wire(dict(answer.error))
    return answer


def _identities(joined: Joined, keys: Sequence[NKey]) -> tuple[Identity, ...]:
    if joined.error is not None:
        raise from_wire(dict(joined.error))
    by_key = {each.key: each for each in joined.granted}
    if set(by_key) != {key.public for key in keys}:
        raise JoinRefused("the router's answer is not about this machine's keys")
    if joined.authority:
        trusting(joined.authority)  # raises where it cannot be read, before anything is written down
    return tuple(
        Identity(
            node=by_key[key.public].node, seed=key.seed, secret=by_key[key.public].secret, places=joined.places,
            authority=joined.authority,
        )
        for key in keys
    )  # fmt: skip


def _read(kind: type[T], data: bytes) -> T:
    try:
        return unpack(kind, data)
    except BrokenMessage as exc:
        raise JoinRefused(f"the router's answer makes no sense: {exc}", hint="is it of the same version?") from exc


def _proofs(keys: Sequence[NKey], text: bytes) -> tuple[str, ...]:
    return tuple(base64.b64encode(key.sign(text)).decode() for key in keys)


async def _found(places: Sequence[str], *, fingerprint: bytes | None) -> _Route:
    """The first broker that answers and has the certificate of the code.

    fingerprint: None: whichever it shows, for a person to compare. Raises JoinRefused, StoreUnavailable.
    """
    faults: list[SdfleetError] = []
    for place in places:
        if "://" in place or fingerprint == b"":
            return _Route(place=place, tls=None, fingerprint=b"")
        host, _, port = place.rpartition(":")
        try:
            shown = await certificate_at(host.strip("[]"), int(port))
        except StoreUnavailable as exc:
            faults.append(exc)
            continue
        seen = fingerprint_of(shown)
        if fingerprint is None or secrets.compare_digest(seen, fingerprint):
            return _Route(place=place, tls=trusting_only(shown), fingerprint=seen)
        log.warning("a broker with a foreign certificate was refused", extra={"place": place, "shown": seen.hex()})
        faults.insert(0, JoinRefused(
            f"who answers at {place} is not the router that made this code: its certificate is another",
            hint="somebody may sit in between; or the router has new keys: get a new code",
        ))  # fmt: skip
    raise faults[0]


@asynccontextmanager
async def _connection(
    route: _Route, *, key: NKey, inbox: str, refusal: SdfleetError, is_new: bool = False
) -> AsyncIterator[NatsBus]:
    """A connection with this key. is_new: the broker is only now told of it. Raises `refusal`, StoreUnavailable."""
    end_s = asyncio.get_running_loop().time() + (LET_IN_S if is_new else 0.0)
    bus = await _let_in_by(end_s, route, key=key, inbox=inbox, refusal=refusal)
    try:
        yield bus
    finally:
        await bus.close()


async def _let_in_by(end_s: float, route: _Route, *, key: NKey, inbox: str, refusal: SdfleetError) -> NatsBus:
    while True:
        try:
            return await connect(
                urls_of((route.place,)), name="joins", credentials=Credentials(seed=key.seed), tls=route.tls,
                inbox=inbox, within_s=ANSWER_S,
            )  # fmt: skip
        except NotLetIn as exc:
            if asyncio.get_running_loop().time() >= end_s:
                raise refusal from exc
        await asyncio.sleep(_AGAIN_S)
