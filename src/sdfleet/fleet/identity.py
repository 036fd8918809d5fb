"""Who a device is in its fleet: what it was given when it joined, in one file that this user alone can read."""

from __future__ import annotations

import json
import ssl
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sdfleet.errors import InvalidValue, JoinRefused, StorageError
from sdfleet.fleet.bus_nats import Credentials
from sdfleet.fleet.certificates import trusting, write_private
from sdfleet.fleet.join_code import is_place
from sdfleet.fleet.keys import NKey
from sdfleet.fleet.subjects import inbox_of, is_node_id

_VERSION = 1
_FORMAT = "sdfleet node"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One device. node: its id. seed: its own key. secret: what its router signs with, in hex.

    places: where the broker is, see `JoinCode`. authority: PEM text of what it trusts; empty for a broker whose
    certificate a public authority has signed.
    """

    node: str
    seed: str = field(repr=False)
    secret: str = field(repr=False)
    places: tuple[str, ...]
    authority: str = field(default="", repr=False)

    @property
    def key(self) -> NKey:
        return NKey.from_seed(self.seed)

    @property
    def secret_bytes(self) -> bytes:
        """For `NodeOptions.secret`."""
        return bytes.fromhex(self.secret)

    @property
    def urls(self) -> tuple[str, ...]:
        """For `bus_nats.connect`."""
        return urls_of(self.places)

    @property
    def inbox(self) -> str:
        """For `bus_nats.connect`, of both connections: no other inbox is open to this node."""
        return inbox_of(self.node)

    @property
    def credentials(self) -> Credentials:
        """For `bus_nats.connect`."""
        return Credentials(seed=self.seed)

    def tls(self) -> ssl.SSLContext | None:
        """For `bus_nats.connect`. Raises JoinRefused."""
        return trusting(self.authority) if self.authority else None

    def save(self, path: Path) -> None:
        """Write it down. Raises StorageError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(path, json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1).encode())
        except OSError as exc:
            raise StorageError(f"the node's keys cannot be kept in {path}: {exc.strerror or exc}") from exc

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The one in this file; None where there is none: the device has not joined. Raises StorageError."""
        try:
            found = cls._read(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidValue, JoinRefused) as exc:
            raise StorageError(
                f"the node's keys in {path} cannot be used: {exc}",
                hint="move the file away and join again: sdfleet node --join CODE",
            ) from exc
        return found

    @classmethod
    def _read(cls, plain: dict[str, Any]) -> Self:
        if (plain.pop("format"), plain.pop("version")) != (_FORMAT, _VERSION):
            raise ValueError("it was written by another version")
        found = cls(**{**plain, "places": tuple(plain["places"])})
        _ = found.key, found.secret_bytes, found.tls()  # they raise where they cannot be read
        if not is_node_id(found.node) or not all(map(is_place, found.places)):
            raise ValueError("it names no node or no router")
        return found


def identity_file(home: Path, *, device: str = "") -> Path:
    """Where a device of this machine keeps its identity. device: tells several of one machine apart."""
    return home / "fleet" / (f"node-{device}.json" if device else "node.json")


def urls_of(places: tuple[str, ...]) -> tuple[str, ...]:
    """What the client library is told: a place without a scheme speaks TLS.

    >>> urls_of(("10.0.0.2:4222", "wss://broker.example.org:443"))
    ('tls://10.0.0.2:4222', 'wss://broker.example.org:443')
    """
    return tuple(place if "://" in place else f"tls://{place}" for place in places)
