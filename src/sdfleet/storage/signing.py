"""The key that this machine signs with: links to pictures that end by themselves, and the bodies of webhooks."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from sdfleet.errors import OutputNotWritable

KEY_BYTES = 32


def signing_key(home: Path) -> bytes:
    """The machine's own key, made on first use and readable by its owner alone. Raises OutputNotWritable."""
    path = home / "signing.key"
    try:
        home.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
        else:
            key = secrets.token_bytes(KEY_BYTES)
            with os.fdopen(handle, "wb") as file:
                file.write(key)
    except OSError as exc:
        raise OutputNotWritable(f"{path} cannot be used: {exc.strerror or exc}", hint="see SD_HOME") from exc
    if len(key) < KEY_BYTES:
        raise OutputNotWritable(f"{path} is not whole", hint="delete it; a new one is made")
    return key


def sign(key: bytes, *parts: str) -> str:
    """HMAC-SHA256 over the parts, as hex; a part cannot run into its neighbour."""
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hmac.new(key, text, hashlib.sha256).hexdigest()


def is_signed(key: bytes, signature: str, *parts: str) -> bool:
    """Whether `signature` is that of the parts; takes the same time whatever is wrong with it."""
    return hmac.compare_digest(signature.encode("utf-8", "surrogatepass"), sign(key, *parts).encode())
