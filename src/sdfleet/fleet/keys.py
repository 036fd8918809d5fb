"""NKeys: the Ed25519 keys by which the broker tells its connections apart, in the spelling that it reads.

Who has a seed can prove that the public key is its own; the broker and the router keep public keys alone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sdfleet.errors import InvalidValue

# The first bits of a key in base32 say what it is: a user's public key begins with U, its seed with SU.
_USER = 20 << 3
_SEED = 18 << 3
_SEED_HEAD = bytes((_SEED | _USER >> 5, (_USER & 31) << 3))
_SEED_BYTES = 32


class NKey:
    """A key pair of one connection. Its `repr` shows the public half only."""

    def __init__(self, raw: bytes) -> None:
        """raw: 32 bytes that nobody else knows."""
        self._raw = raw
        self._private = Ed25519PrivateKey.from_private_bytes(raw)
        self.public = _spelled(bytes((_USER,)) + self._private.public_key().public_bytes_raw())

    @classmethod
    def new(cls) -> Self:
        """A key that nobody has seen."""
        return cls(secrets.token_bytes(_SEED_BYTES))

    @classmethod
    def derived(cls, secret: bytes, purpose: str) -> Self:
        """The key that everybody makes from this secret for this purpose."""
        return cls(hmac.new(secret, purpose.encode(), hashlib.sha256).digest())

    @classmethod
    def from_seed(cls, seed: str) -> Self:
        """The key with this seed, as `seed` spells it. Raises InvalidValue."""
        raw = _read(seed)
        if raw is None or len(raw) != len(_SEED_HEAD) + _SEED_BYTES or not raw.startswith(_SEED_HEAD):
            raise InvalidValue("seed", "is not the seed of a user's NKey")
        return cls(raw[len(_SEED_HEAD) :])

    @property
    def seed(self) -> str:
        """The secret half, for whoever connects."""
        return _spelled(_SEED_HEAD + self._raw)

    def sign(self, data: bytes) -> bytes:
        """64 bytes that only this key makes."""
        return self._private.sign(data)

    def __repr__(self) -> str:
        return f"NKey({self.public})"


def is_public_key(text: str) -> bool:
    """Whether this is a user's public key, without a slip of the pen.

    >>> is_public_key(NKey(bytes(32)).public), is_public_key("U" * 56), is_public_key("fleet.n.>")
    (True, False, False)
    """
    return _public_bytes(text) is not None


def is_signed_by(key: str, data: bytes, signature: bytes) -> bool:
    """Whether the owner of this public key signed the data.

    >>> key = NKey(bytes(32))
    >>> is_signed_by(key.public, b"yes", key.sign(b"yes")), is_signed_by(key.public, b"no", key.sign(b"yes"))
    (True, False)
    """
    raw = _public_bytes(key)
    if raw is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _public_bytes(text: str) -> bytes | None:
    raw = _read(text)
    return raw[1:] if raw is not None and len(raw) == 33 and raw[0] == _USER else None


def _spelled(raw: bytes) -> str:
    return base64.b32encode(raw + _checksum(raw)).decode().rstrip("=")


def _read(text: str) -> bytes | None:
    """The bytes of a key without their check sum; None where it does not agree."""
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        return None
    return raw[:-2] if raw[-2:] == _checksum(raw[:-2]) else None


def _checksum(raw: bytes) -> bytes:
    return binascii.crc_hqx(raw, 0).to_bytes(2, "little")
