"""A join code: what a person carries from a router to a new node, so that neither has to trust the network between.

    sdf1-<base32 of: secret (16 bytes), fingerprint (16), where (text), check sum (4)>

The secret is good once and for a quarter of an hour. From it both sides derive the key that opens the broker to the
joining node, and the secret with which they sign what they say to each other there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from sdfleet.errors import InvalidValue
from sdfleet.fleet.certificates import FINGERPRINT_BYTES
from sdfleet.fleet.keys import NKey

_PREFIX = "sdf1-"
_SECRET_BYTES = 16
_CHECK_BYTES = 4
MAX_CODE_CHARS = 600
MAX_PLACES = 8
# A host name or an address (IPv6 in brackets) and a port; a scheme only for brokers that are not the router's own.
_PLACE = re.compile(r"(?:(?:tls|nats|wss?)://)?(?:\[[0-9A-Fa-f:.%]{2,60}\]|[A-Za-z0-9._-]{1,253}):\d{1,5}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinCode:
    """See the file's first lines. places: `host:port` of the broker, the likeliest first; with a scheme for another's.

    fingerprint: of the broker's certificate; empty for a broker whose certificate a public authority has signed.
    """

    secret: bytes = field(repr=False)
    fingerprint: bytes
    places: tuple[str, ...]

    @property
    def id(self) -> str:
        """A name for the code that gives nothing of it away."""
        return hmac.new(self.secret, b"sdfleet: name of a join code", hashlib.sha256).hexdigest()[:16]

    @property
    def key(self) -> NKey:
        """With which the joining node connects."""
        return NKey.derived(self.secret, "sdfleet: key of a join code")

    @property
    def proof(self) -> bytes:
        """What the joining node and the router sign with."""
        return hmac.new(self.secret, b"sdfleet: proof of a join code", hashlib.sha256).digest()

    def text(self) -> str:
        """The code, for a person.

        >>> code = JoinCode(secret=bytes(16), fingerprint=b"f" * 16, places=("10.0.0.2:4222",))
        >>> parse(code.text()) == code, len(code.text())
        (True, 84)
        """
        fingerprint = self.fingerprint or bytes(FINGERPRINT_BYTES)
        raw = self.secret + fingerprint + ",".join(self.places).encode("ascii")
        return _PREFIX + base64.b32encode(raw + _checksum(raw)).decode().rstrip("=").lower()


def parse(text: str) -> JoinCode:
    """The code in a text that a person pasted; spaces and line breaks do not matter. Raises InvalidValue."""
    whole = "".join(text.split())
    if not whole.lower().startswith(_PREFIX) or len(whole) > MAX_CODE_CHARS:
        raise _bad("is not a join code; these begin with sdf1-")
    body = whole[len(_PREFIX) :].upper()
    try:
        raw = base64.b32decode(body + "=" * (-len(body) % 8))
    except (binascii.Error, ValueError) as exc:
        raise _bad("has letters that no join code has") from exc
    raw, checksum = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
    if checksum != _checksum(raw):
        raise _bad("is damaged: a letter is missing or another than it was")
    secret, rest = raw[:_SECRET_BYTES], raw[_SECRET_BYTES:]
    fingerprint, places = rest[:FINGERPRINT_BYTES], rest[FINGERPRINT_BYTES:].decode("ascii", "replace").split(",")
    if len(places) > MAX_PLACES or not all(_PLACE.fullmatch(place) for place in places):
        raise _bad("does not say where the router is")
    return JoinCode(secret=secret, fingerprint=fingerprint if any(fingerprint) else b"", places=tuple(places))


def is_place(text: str) -> bool:
    """Whether this can stand in a code as the place of a broker.

    >>> is_place("192.168.1.2:4222"), is_place("[fe80::1]:4222"), is_place("no port")
    (True, True, False)
    """
    return _PLACE.fullmatch(text) is not None


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:_CHECK_BYTES]


def _bad(why: str) -> InvalidValue:
    return InvalidValue("code", why, hint="copy the whole line that `sdfleet fleet code` prints on the router")
