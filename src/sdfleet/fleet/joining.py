"""How a router takes in machines that want to join: over the broker's own port, the only one a node ever needs.

    with a code     the machine connects with the key that the code holds, and may say one thing on one subject:
                    its own public keys, signed with them and with the code's secret. It is answered with its name.
    without one     as a guest, who hears nothing, it says its public keys and a hash (the commitment). Then the broker
                    lets that key in, to one inbox of its own. Router and machine exchange random numbers, the machine's
                    being the one it had committed itself to; both show the same short code, and a person says yes.

The commitment makes the short code safe: who sits between the two cannot try numbers until its own codes agree.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

from sdfleet.errors import Busy, JoinRefused, SdfleetError, StoreUnavailable
from sdfleet.fleet.broker import Broker
from sdfleet.fleet.keys import is_public_key, is_signed_by
from sdfleet.fleet.members import Settled
from sdfleet.fleet.packing import BrokenMessage, pack, unpack
from sdfleet.fleet.rights import asking_inbox, code_inbox
from sdfleet.fleet.signing import is_signed, sign
from sdfleet.fleet.subjects import inbox_of, node_of
from sdfleet.fleet.transport import Bus, Handler, Incoming, Subscription
from sdfleet.fleet.trust import MAX_KEYS, Enrolled, Pending, Roster

log = logging.getLogger(__name__)

PROOF = "Sdfleet-Proof"
MAX_WISH_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A machine with a code: these are its devices' public keys. proofs: base64, see `proof_of`."""

    keys: tuple[str, ...]
    proofs: tuple[str, ...]
    wish: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A device's name in the fleet, and what its router will sign with (hex)."""

    key: str
    node: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What a machine with a code is answered. authority: PEM text, empty for another's broker. places: as JoinCode."""

    granted: tuple[Granted, ...] = ()
    authority: str = ""
    places: tuple[str, ...] = ()
    error: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A machine without a code. commitment: hex, see `commitment_of`."""

    keys: tuple[str, ...]
    proofs: tuple[str, ...]
    wish: str
    commitment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What such a machine says once the broker knows its key. nonce: what it had committed itself to."""

    step: Literal["begin", "reveal", "decide"]
    nonce: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What it is answered: the router's nonce; what it would be given; whether a person has said yes."""

    nonce: str = ""
    offered: Joined | None = None
    is_approved: bool = False
    error: Mapping[str, str] | None = None


def proof_of(subject: str, keys: tuple[str, ...], *said: str) -> bytes:
    """What each of the keys signs, so that nobody joins with the key of another."""
    return b"sdfleet join\0" + "\0".join((subject, *keys, *said)).encode()


def commitment_of(nonce: str, keys: tuple[str, ...]) -> str:
    """What a machine says before it knows the router's nonce."""
    return hashlib.sha256("\0".join(("sdfleet commitment", nonce, *keys)).encode()).hexdigest()


def short_code(*, fingerprint: bytes, keys: tuple[str, ...], asker_nonce: str, router_nonce: str) -> str:
    """What both sides show: 40 bits of everything that was said, and of the certificate that the asker has seen.

    >>> short_code(fingerprint=bytes(16), keys=("U",), asker_nonce="1", router_nonce="2")
    '2MP2-M6US'
    """
    said = "\0".join(("sdfleet code", fingerprint.hex(), *keys, asker_nonce, router_nonce))
    text = base64.b32encode(hashlib.sha256(said.encode()).digest()[:5]).decode()
    return f"{text[:4]}-{text[4:]}"


class Joining:
    """The router's side. `start`, then `run` until cancelled; `apply` after each change of the roster by a person.

    bus: the router's connection. broker: its own, told who may connect; None for another's, which the operator tells.
    admit: called with everybody who belongs to the fleet, whenever that changes. places: where nodes find the broker.
    """

    def __init__(
        self,
        bus: Bus,
        roster: Roster,
        *,
        broker: Broker | None,
        admit: Callable[[Iterable[Settled]], None],
        places: Callable[[], tuple[str, ...]],
    ) -> None:
        self._bus = bus
        self._roster = roster
        self._broker = broker
        self._admit = admit
        self._places = places
        self._ears: list[Subscription] = []
        self._undecided: dict[str, str] = {}
        self._news = asyncio.Event()
        self._one = asyncio.Lock()
        roster.on_change(self._news.set)

    async def start(self) -> None:
        """Answer those who want to join. Raises StoreUnavailable."""
        for subject, handler in (
            ("fleet.join.*", self._on_join),
            ("fleet.ask.*", self._on_ask),
            ("fleet.asking.*", self._on_asking),
            ("fleet.up.*.joined", self._on_joined),
        ):
            self._ears.append(await self._bus.subscribe(subject, self._guarded(handler)))
        await self.apply()

    async def run(self) -> NoReturn:
        """Follow the roster and the clock until cancelled."""
        while True:
            self._news.clear()
            await self.apply()
            try:
                async with asyncio.timeout(self._roster.next_change_s()):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Answer nobody any more."""
        ears, self._ears = self._ears, []
        for ear in ears:
            await ear.close()

    async def apply(self) -> None:
        """Make what the roster says true: who waited is answered, who may not take part is cut off."""
        async with self._one:
            self._roster.tidy()
            await self._tell_decided()
            self._admit(self._roster.settled())
            if self._broker is not None and self._broker.config.users != (users := self._roster.users()):
                await self._broker.become(replace(self._broker.config, users=users))

    # ------------------------------------------------------------------------------------------------------ with a code

    async def _on_join(self, message: Incoming) -> None:
        code_id = message.subject.rsplit(".", 1)[-1]
        if not _is_answered_at(message, code_inbox(code_id)):
            return
        code = self._roster.open_code(code_id)
        if code is None:
            log.warning("a join code that has run out or was used was refused", extra={"code": code_id})
            return  # nothing to sign an answer with; its key opens the broker no more
        proof = bytes.fromhex(code.proof)
        if not is_signed(proof, message.subject, message.data, message.headers.get(PROOF, "")):
            log.warning("a join without the code's secret was refused", extra={"code": code_id})
            return
        join = unpack(Join, message.data)
        try:
            _check(message.subject, join.keys, join.proofs, join.wish)
            made = self._roster.enrol_by_code(code_id, join.keys, join.wish)
            await self.apply()
            answer = self._granted(made)
        except SdfleetError as exc:
            log.warning("a join was refused", extra={"code": code_id, "why": str(exc)})
            answer = Joined(error=exc.to_wire())
        payload = pack(answer)
        await self._bus.publish(message.reply, payload, headers={PROOF: sign(proof, message.reply, payload)})

    def _granted(self, made: Iterable[Enrolled]) -> Joined:
        granted = tuple(Granted(key=each.key, node=each.node, secret=each.secret) for each in made)
        return self._offer(granted)

    def _offer(self, granted: tuple[Granted, ...]) -> Joined:
        authority = "" if self._broker is None else self._roster.authority
        return Joined(granted=granted, authority=authority, places=self._places())

    # --------------------------------------------------------------------------------------------------- without a code

    async def _on_ask(self, message: Incoming) -> None:
        """Nobody is answered here: a guest hears nothing."""
        ask = unpack(Ask, message.data)
        if not self._roster.takes_guests or not message.subject.endswith(f".{ask.keys[0] if ask.keys else ''}"):
            log.warning("a machine that asks to join was refused", extra={"subject": message.subject})
            return
        try:
            _check(message.subject, ask.keys, ask.proofs, ask.wish, ask.commitment)
            self._roster.add_pending(ask.keys, ask.wish, ask.commitment)
        except (JoinRefused, Busy) as exc:
            log.warning("a machine that asks to join was refused", extra={"subject": message.subject, "why": str(exc)})
            return
        await self.apply()

    async def _on_asking(self, message: Incoming) -> None:
        key = message.subject.rsplit(".", 1)[-1]
        if not is_public_key(key) or not _is_answered_at(message, asking_inbox(key)):
            return
        said = unpack(Asking, message.data)
        asking = next((each for each in self._roster.pending() if each.key == key), None)
        if asking is None and any(each.key == key for each in self._roster.enrolled()):
            answer = Asked(is_approved=True)  # the yes was faster than the question
        elif asking is None:
            answer = Asked(error=JoinRefused("this machine was turned away, or has asked for too long").to_wire())
        elif said.step == "begin":
            answer = Asked(nonce=asking.nonce)
        elif said.step == "reveal":
            answer = self._revealed(asking, said.nonce)
        else:
            self._undecided[key] = message.reply  # answered by `apply`, when a person has decided
            return
        await self._bus.publish(message.reply, pack(answer))

    def _revealed(self, asking: Pending, nonce: str) -> Asked:
        if not hmac.compare_digest(commitment_of(nonce, asking.keys), asking.commitment):
            log.warning("a machine that asks to join has changed its mind", extra={"wish": asking.wish})
            return Asked(error=JoinRefused("this is not what was committed to").to_wire())
        fingerprint = b"" if self._broker is None else self._roster.fingerprint
        code = short_code(fingerprint=fingerprint, keys=asking.keys, asker_nonce=nonce, router_nonce=asking.nonce)
        shown = self._roster.show_code(asking.key, code)
        granted = tuple(
            Granted(key=key, node=node, secret=secret)
            for key, node, secret in zip(shown.keys, shown.nodes, shown.secrets, strict=True)
        )
        return Asked(offered=self._offer(granted))

    async def _on_joined(self, message: Incoming) -> None:
        """A node whose answer was lost makes sure that it belongs to the fleet."""
        node = node_of(message.subject)
        if _is_answered_at(message, inbox_of(node)):
            await self._bus.publish(message.reply, pack(Asked(is_approved=True)))

    async def _tell_decided(self) -> None:
        """Before the broker lets their keys in under new names: then they could not hear it here any more."""
        asking = {each.key for each in self._roster.pending()}
        decided = [key for key in self._undecided if key not in asking]
        members = {each.key for each in self._roster.enrolled()}
        for key in decided:
            reply = self._undecided.pop(key)
            error = None if key in members else JoinRefused("this machine was turned away").to_wire()
            await self._bus.publish(reply, pack(Asked(is_approved=key in members, error=error)))
        if decided:
            try:
                await self._bus.flush()
            except StoreUnavailable as exc:
                log.info("who waited for a decision could not be told", extra={"why": str(exc)})

    @staticmethod
    def _guarded(handler: Handler) -> Handler:
        async def heed(message: Incoming) -> None:
            try:
                await handler(message)
            except BrokenMessage as exc:
                log.warning("a message makes no sense", extra={"subject": message.subject, "why": str(exc)[:200]})

        return heed


def _is_answered_at(message: Incoming, inbox: str) -> bool:
    """Whether it wants its answer where it may hear one. The router could say it anywhere, and must not be made to."""
    if message.reply.startswith(f"{inbox}."):
        return True
    extra = {"subject": message.subject, "reply": message.reply[:80]}
    log.warning("somebody who joins asked to be answered elsewhere", extra=extra)
    return False


def _check(subject: str, keys: tuple[str, ...], proofs: tuple[str, ...], wish: str, *said: str) -> None:
    """Raises JoinRefused unless all the keys are keys, different, and of whoever says this."""
    if not 1 <= len(keys) <= MAX_KEYS or len(set(keys)) != len(keys) or len(keys) != len(proofs):
        raise JoinRefused(f"{len(keys)} keys and {len(proofs)} proofs are not those of one machine")
    if len(wish) > MAX_WISH_CHARS or not wish.isprintable():
        raise JoinRefused(f"a name has at most {MAX_WISH_CHARS} characters that can be printed")
    text = proof_of(subject, keys, wish, *said)
    for key, proof in zip(keys, proofs, strict=True):
        if not is_signed_by(key, text, _decoded(proof)):
            raise JoinRefused("one of the keys is not its own")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""
