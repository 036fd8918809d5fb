"""What only the router can make: the signature of what a node is told, and the proof that it gave out a job."""

from __future__ import annotations

import hashlib
import hmac

from sdfleet.domain import JobId

# The header of everything that a node is told: `sign` of the rest.
SIGNATURE = "Sdfleet-Signature"


def sign(secret: bytes, subject: str, payload: bytes) -> str:
    """HMAC-SHA256 (RFC 2104) of a message to a node, in hex: only who has the node's secret gives it orders.

    The subject is part of it, so that nothing said to one node can be said to another.
    """
    return hmac.new(secret, subject.encode() + b"\0" + payload, hashlib.sha256).hexdigest()


def is_signed(secret: bytes, subject: str, payload: bytes, signature: str) -> bool:
    """Whether `signature` is `sign`'s, compared in constant time."""
    return hmac.compare_digest(sign(secret, subject, payload).encode(), signature.encode("utf-8", "replace"))


def lease_for(secret: bytes, *, job: JobId, node: str, attempt: int) -> str:
    """A token of 128 bits that only the router can make: that it gave this attempt of this job to this node.

    Needs no memory: after a restart the router knows its leases again.
    """
    text = f"lease\0{job}\0{node}\0{attempt}"
    return f"{attempt}.{hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:32]}"


def is_lease(secret: bytes, lease: str, *, job: JobId, node: str) -> bool:
    """Whether the router gave this job to this node, at whatever attempt."""
    attempt, _, _ = lease.partition(".")
    if not (attempt.isascii() and attempt.isdigit() and len(attempt) <= 9):
        return False
    genuine = lease_for(secret, job=job, node=node, attempt=int(attempt))
    return hmac.compare_digest(genuine.encode(), lease.encode("utf-8", "replace"))
