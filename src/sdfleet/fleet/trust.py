"""Who belongs to a fleet, as its router remembers it: its nodes, open join codes, machines that ask, and its own keys.

Everything lies in one folder that this user alone can read; each change is on disk before it counts. Nothing here
talks: `joining.py` answers those who want to join, `broker.py` keeps the others out.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sdfleet.errors import Conflict, InvalidValue, JoinRefused, RateLimited, StorageError, UnknownName
from sdfleet.fleet.broker import BrokerConfig, User
from sdfleet.fleet.bus_nats import Credentials
from sdfleet.fleet.certificates import Certificates, certificates_in, trusting, write_private
from sdfleet.fleet.join_code import MAX_PLACES, JoinCode, is_place
from sdfleet.fleet.keys import NKey
from sdfleet.fleet.members import Settled
from sdfleet.fleet.rights import asking_user, code_user, guest_user, node_user, router_user
from sdfleet.fleet.state import Limits
from sdfleet.fleet.subjects import is_node_id

log = logging.getLogger(__name__)

CODE_S = 15 * 60.0
MAX_CODES = 16
# A node that lost the answer to its join asks again within this; then the code opens nothing any more.
CLAIM_S = 10.0
PENDING_S = 15 * 60.0
MAX_PENDING = 16
# Devices of one machine that join together.
MAX_KEYS = 16
# Machines that may begin to ask: a few at once, then one in so many seconds.
ASK_BURST = 4
ASK_EVERY_S = 5.0
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """One node that belongs to the fleet. key: public. how: "code" or "approval"."""

    node: str
    key: str
    secret: str = field(repr=False)
    since_s: float
    how: str
    is_draining: bool = False
    pinned: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    max_pictures: int | None = None

    @property
    def settled(self) -> Settled:
        """What `Members.admit` takes."""
        return Settled(
            node=self.node, secret=bytes.fromhex(self.secret), name=self.node, is_draining=self.is_draining,
            pinned=frozenset(self.pinned), limits=self.limits, max_pictures=self.max_pictures,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCode:
    """A join code that may still be used. key: public, of whoever joins with it. claimed_by: the keys that did."""

    id: str
    key: str
    proof: str = field(repr=False)
    expires_s: float
    claimed_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A machine that asks to join. keys: public, one for each of its devices; the first one is its connection's.

    code: what both sides show, once it is known. nodes, secrets: what its devices will be called and sign with.
    """

    keys: tuple[str, ...]
    wish: str
    commitment: str
    nonce: str
    expires_s: float
    code: str = ""
    nodes: tuple[str, ...] = ()
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def key(self) -> str:
        return self.keys[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What lies in roster.json."""

    router_seed: str = field(repr=False)
    lease_secret: str = field(repr=False)
    epoch: int = 0
    nodes: tuple[Enrolled, ...] = ()
    codes: tuple[OpenCode, ...] = ()


class Roster:
    """See the file's first lines. Made by `Roster.open`; belongs to one process and one thread.

    takes_guests: whether machines without a code may ask. clock: seconds since 1970.
    """

    def __init__(
        self, folder: Path, kept: _Kept, certificates: Certificates, *, clock: Callable[[], float], takes_guests: bool
    ) -> None:
        self.takes_guests = takes_guests
        self._folder = folder
        self._kept = kept
        self._certificates = certificates
        self._clock = clock
        self._pending: dict[str, Pending] = {}
        self._listeners: list[Callable[[], None]] = []
        self._asks = float(ASK_BURST)
        self._asks_as_of_s = clock()

    @classmethod
    def open(cls, folder: Path, *, clock: Callable[[], float] = time.time, takes_guests: bool = True) -> Roster:
        """The roster in this folder (home/fleet), made where there is none. Raises StorageError."""
        path = folder / "roster.json"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
            certificates = certificates_in(folder)
            kept = _read(path) if path.exists() else _new()
            write_private(path, _written(kept))
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise StorageError(
                f"the fleet's keys in {folder} cannot be used: {exc}",
                hint="put them back from a backup; without them every node must join anew",
            ) from exc
        return cls(folder, kept, certificates, clock=clock, takes_guests=takes_guests)

    def on_change(self, call: Callable[[], None]) -> None:
        """Be told whenever `users` or `settled` may have changed."""
        self._listeners.append(call)

    # -------------------------------------------------------------------------------------------- the router's own keys

    @property
    def lease_secret(self) -> bytes:
        """What leases are made with."""
        return bytes.fromhex(self._kept.lease_secret)

    @property
    def epoch(self) -> int:
        """The highest one that this router has reigned with."""
        return self._kept.epoch

    def note_epoch(self, epoch: int) -> None:
        """Remember it."""
        self._keep(replace(self._kept, epoch=max(epoch, self._kept.epoch)))

    @property
    def authority(self) -> str:
        """PEM text of what the nodes trust."""
        return self._certificates.authority

    @property
    def fingerprint(self) -> bytes:
        """Of the broker's certificate."""
        return self._certificates.fingerprint

    def credentials(self) -> Credentials:
        """Of the router's own connection."""
        return Credentials(seed=self._kept.router_seed)

    def tls(self) -> ssl.SSLContext:
        """Of the router's own connection."""
        return trusting(self.authority)

    # ------------------------------------------------------------------------------------- what broker and members get

    def enrolled(self) -> tuple[Enrolled, ...]:
        """Every node that belongs to the fleet, in the order of joining."""
        return self._kept.nodes

    def settled(self) -> tuple[Settled, ...]:
        """The same for `Members.admit`."""
        return tuple(each.settled for each in self._kept.nodes)

    def users(self) -> tuple[User, ...]:
        """Who may connect to the broker now, and what each may say and hear."""
        router = router_user(NKey.from_seed(self._kept.router_seed).public)
        nodes = [node_user(each.key, each.node) for each in self._kept.nodes]
        known = {each.key for each in self._kept.nodes}
        codes = [code_user(code.key, code.id) for code in self._codes()]
        pending = [asking_user(each.key) for each in self.pending() if each.key not in known]
        guest = [guest_user()] if self.takes_guests else []
        return (router, *nodes, *codes, *pending, *guest)

    def broker_config(self, host: str, port: int) -> BrokerConfig:
        """All that the router's own broker is told."""
        return BrokerConfig(
            host=host, port=port, users=self.users(), tls_certificate=self._certificates.certificate,
            tls_key=self._certificates.key,
        )  # fmt: skip

    def next_change_s(self) -> float | None:
        """Seconds until a code or a machine that asks runs out; None where there is none."""
        ends = [code.expires_s for code in self._kept.codes] + [each.expires_s for each in self._pending.values()]
        return max(0.0, min(ends) - self._clock()) if ends else None

    def tidy(self) -> None:
        """Forget what has run out."""
        codes, pending = self._codes(), self.pending()
        if len(codes) != len(self._kept.codes) or len(pending) != len(self._pending):
            self._pending = {each.key: each for each in pending}
            self._keep(replace(self._kept, codes=codes))

    # ------------------------------------------------------------------------------------------------------ join codes

    def make_code(self, places: Sequence[str], *, within_s: float = CODE_S, is_pinned: bool = True) -> JoinCode:
        """A new code. places: `host:port` where nodes reach the broker.

        is_pinned: the broker is the router's own; else a public authority vouches for it. Raises InvalidValue.
        """
        if not places or not all(map(is_place, places)):
            raise InvalidValue("places", f"{list(places)!r} are not addresses and ports of a broker")
        code = JoinCode(
            secret=secrets.token_bytes(16), places=tuple(places[:MAX_PLACES]),
            fingerprint=self.fingerprint if is_pinned else b"",
        )  # fmt: skip
        opened = OpenCode(id=code.id, key=code.key.public, proof=code.proof.hex(), expires_s=self._clock() + within_s)
        self._keep(replace(self._kept, codes=(*self._codes()[-MAX_CODES + 1 :], opened)))
        log.info("a join code was made", extra={"code": code.id, "minutes": round(within_s / 60)})
        return code

    def open_code(self, code_id: str) -> OpenCode | None:
        """The code of that name; None when it has run out, was used, or never was one."""
        return next((code for code in self._codes() if code.id == code_id), None)

    def enrol_by_code(self, code_id: str, keys: tuple[str, ...], wish: str) -> tuple[Enrolled, ...]:
        """Take these keys' machine into the fleet and use the code up. The same keys again get the same answer.

        Raises JoinRefused.
        """
        code = self.open_code(code_id)
        if code is None:
            raise JoinRefused("the join code has run out or was used", hint="`sdfleet fleet code` makes a new one")
        if code.claimed_by and code.claimed_by != keys:
            raise JoinRefused("the join code was used by another machine", hint="`sdfleet fleet code` makes a new one")
        if not code.claimed_by:
            claimed = replace(code, claimed_by=keys, expires_s=min(code.expires_s, self._clock() + CLAIM_S))
            codes = tuple(claimed if each.id == code_id else each for each in self._kept.codes)
            self._kept = replace(self._kept, codes=codes)
        return self._enrol(keys, self.names_for(keys, wish), [secrets.token_hex(32) for _ in keys], how="code")

    # ---------------------------------------------------------------------------------------------- machines that ask

    def pending(self) -> tuple[Pending, ...]:
        """Machines that ask now."""
        now_s = self._clock()
        return tuple(each for each in self._pending.values() if each.expires_s > now_s)

    def add_pending(self, keys: tuple[str, ...], wish: str, commitment: str) -> Pending:
        """A machine begins to ask. Raises RateLimited, JoinRefused."""
        self._count_ask()
        self.tidy()
        if any(each.key in keys for each in self._kept.nodes):
            raise JoinRefused("one of its keys belongs to the fleet already", hint="join with a code, or revoke it")
        if keys[0] not in self._pending and len(self._pending) >= MAX_PENDING:
            raise RateLimited("as many machines ask to join as may", retry_after_s=60.0)
        asking = Pending(
            keys=keys, wish=wish, commitment=commitment, nonce=secrets.token_hex(16),
            expires_s=self._clock() + PENDING_S,
        )  # fmt: skip
        self._pending[asking.key] = asking
        self._changed()
        return asking

    def show_code(self, key: str, code: str) -> Pending:
        """The asking machine has shown what it had committed itself to: this is the code that both sides show."""
        asking = self._pending[key]
        if not asking.code:
            named = self.names_for(asking.keys, asking.wish)
            made = tuple(secrets.token_hex(32) for _ in asking.keys)
            asking = self._pending[key] = replace(asking, code=code, nodes=named, secrets=made)
            log.info("a machine asks to join: sdfleet fleet approve", extra={"wish": asking.wish, "code": code})
        return asking

    def approve(self, which: str) -> tuple[Enrolled, ...]:
        """Take a machine that asks into the fleet. which: its code, or the name that it would get.

        Raises UnknownName, Conflict.
        """
        asking = self._find_pending(which)
        if self._taken() & set(asking.nodes):
            raise Conflict("another node took its name meanwhile", hint="let it ask again")
        del self._pending[asking.key]
        return self._enrol(asking.keys, asking.nodes, asking.secrets, how="approval")

    def deny(self, which: str) -> None:
        """Forget a machine that asks. Raises UnknownName, Conflict."""
        asking = self._find_pending(which)
        del self._pending[asking.key]
        log.info("a machine that asked to join was turned away", extra={"wish": asking.wish, "code": asking.code})
        self._changed()

    # ------------------------------------------------------------------------------------------------ verbs on a node

    def find(self, node: str) -> Enrolled:
        """The node of that name. Raises UnknownName."""
        found = next((each for each in self._kept.nodes if each.node == node), None)
        if found is None:
            raise UnknownName("node", node, [each.node for each in self._kept.nodes])
        return found

    def revoke(self, node: str) -> None:
        """It belongs to the fleet no more; its key and its secret are forgotten. Raises UnknownName."""
        gone = self.find(node)
        self._keep(replace(self._kept, nodes=tuple(each for each in self._kept.nodes if each != gone)))
        log.warning("a node was revoked", extra={"node": node, "key": gone.key})

    def drain(self, node: str) -> None:
        """It is given no more jobs. Raises UnknownName."""
        self._set(replace(self.find(node), is_draining=True))

    def undrain(self, node: str) -> None:
        """It is given jobs again. Raises UnknownName."""
        self._set(replace(self.find(node), is_draining=False))

    def pin(self, node: str, model: str) -> None:
        """The model stays in the node's memory. Raises UnknownName."""
        found = self.find(node)
        self._set(replace(found, pinned=tuple(sorted({*found.pinned, model}))))

    def unpin(self, node: str, model: str) -> None:
        """It may leave. Raises UnknownName."""
        found = self.find(node)
        self._set(replace(found, pinned=tuple(each for each in found.pinned if each != model)))

    def limit(self, node: str, *, limits: Limits, max_pictures: int | None = None) -> None:
        """What may be drawn there, and how many pictures at once, instead of what was settled. Raises UnknownName."""
        self._set(replace(self.find(node), limits=limits, max_pictures=max_pictures))

    # --------------------------------------------------------------------------------------------------- small things

    def names_for(self, keys: Iterable[str], wish: str) -> tuple[str, ...]:
        """A name for each key: the one it has; else the wish, with a number where that is taken."""
        had = {each.key: each.node for each in self._kept.nodes}
        taken = self._taken() | {node for each in self.pending() for node in each.nodes}
        named = []
        for key in keys:
            node = had.get(key) or _free_name(node_id_of(wish), taken)
            taken.add(node)
            named.append(node)
        return tuple(named)

    def _taken(self) -> set[str]:
        return {each.node for each in self._kept.nodes}

    def _enrol(
        self, keys: Sequence[str], nodes: Sequence[str], fresh: Sequence[str], *, how: str
    ) -> tuple[Enrolled, ...]:
        had = {each.key: each for each in self._kept.nodes}
        made = [
            had.get(key) or Enrolled(node=node, key=key, secret=secret, since_s=self._clock(), how=how)
            for key, node, secret in zip(keys, nodes, fresh, strict=True)
        ]
        self._keep(replace(self._kept, nodes=(*self._kept.nodes, *(each for each in made if each.key not in had))))
        for each in made:
            log.info("a node has joined the fleet", extra={"node": each.node, "key": each.key, "how": how})
        return tuple(made)

    def _find_pending(self, which: str) -> Pending:
        shown = [each for each in self.pending() if each.code]
        found = [each for each in shown if plain_code(which) == plain_code(each.code) or which in each.nodes]
        if not found:
            raise UnknownName("machine that asks to join", which, [each.code for each in shown])
        return found[0]

    def _count_ask(self) -> None:
        now_s = self._clock()
        self._asks = min(float(ASK_BURST), self._asks + max(0.0, now_s - self._asks_as_of_s) / ASK_EVERY_S)
        self._asks_as_of_s = now_s
        if self._asks < 1.0:
            raise RateLimited("too many machines ask to join at once", retry_after_s=ASK_EVERY_S)
        self._asks -= 1.0

    def _codes(self) -> tuple[OpenCode, ...]:
        now_s = self._clock()
        return tuple(code for code in self._kept.codes if code.expires_s > now_s)

    def _set(self, changed: Enrolled) -> None:
        nodes = tuple(changed if each.node == changed.node else each for each in self._kept.nodes)
        self._keep(replace(self._kept, nodes=nodes))

    def _keep(self, kept: _Kept) -> None:
        try:
            write_private(self._folder / "roster.json", _written(kept))
        except OSError as exc:
            raise StorageError(
                f"the fleet's roster cannot be written: {exc.strerror or exc}", hint="make room on that disk"
            ) from exc
        self._kept = kept
        self._changed()

    def _changed(self) -> None:
        for call in self._listeners:
            call()


def node_id_of(wish: str) -> str:
    """A name that a node may have, as near to the wished one as can be.

    >>> node_id_of("Anna's Mac Studio.local"), node_id_of("---"), is_node_id(node_id_of("x" * 90))
    ('anna-s-mac-studio', 'node', True)
    """
    plain = re.sub(r"[^a-z0-9]+", "-", wish.lower().removesuffix(".local")).strip("-")
    return plain[:28].strip("-") or "node"


def plain_code(text: str) -> str:
    """A code that a person typed, without what does not matter.

    >>> plain_code("abcd-efgh")
    'ABCDEFGH'
    """
    return re.sub(r"[\s-]", "", text).upper()


def _free_name(wished: str, taken: set[str]) -> str:
    if wished not in taken:
        return wished
    return next(name for n in range(2, 10_000) if (name := f"{wished[:26]}-{n}") not in taken)


def _new() -> _Kept:
    return _Kept(router_seed=NKey.new().seed, lease_secret=secrets.token_hex(32))


def _written(kept: _Kept) -> bytes:
    plain = asdict(kept)
    for node in plain["nodes"]:
        only = node["limits"]["only"]
        node["limits"]["only"] = None if only is None else sorted(only)
    return json.dumps({"version": _VERSION, **plain}, indent=1).encode()


def _read(path: Path) -> _Kept:
    """Raises OSError, ValueError, KeyError, TypeError for a file that is not ours."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    if plain.pop("version") != _VERSION:
        raise ValueError(f"{path.name} was written by another version of sdfleet")
    nodes = []
    for node in plain.pop("nodes"):
        limits = node.pop("limits")
        only = limits.pop("only")
        settled = Limits(**limits, only=None if only is None else frozenset(only))
        nodes.append(Enrolled(**{**node, "pinned": tuple(node["pinned"])}, limits=settled))
        if not is_node_id(nodes[-1].node):
            raise ValueError(f"{nodes[-1].node!r} names no node")
    codes = [OpenCode(**{**code, "claimed_by": tuple(code["claimed_by"])}) for code in plain.pop("codes")]
    return _Kept(**plain, nodes=tuple(nodes), codes=tuple(codes))
