"""What a hub is to us: a list of files with their sizes and hashes, and the bytes of one file from some place on.

Each hub speaks through its own client library, which is imported only when somebody asks for a download.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal, Protocol, assert_never

from sdfleet.errors import HubRateLimited, HubUnreachable, TokenNeeded

Source = Literal["hf", "modelscope"]
TITLES: Mapping[Source, str] = {"hf": "Hugging Face", "modelscope": "ModelScope"}

CHUNK_BYTES = 2**20
# A hub that says nothing for so long is taken for away; its own clients wait 10 s by default and try again.
CONNECT_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 30.0
DEFAULT_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class Digest:
    """The hash a hub gives for a file. git: SHA-1 of the file as a git object, what git knows small files by."""

    kind: Literal["sha256", "git"]
    hex: str

    def hasher(self, n_bytes: int) -> Hasher:
        """What to feed the file's bytes to, in order. n_bytes: the size of the whole file."""
        match self.kind:
            case "sha256":
                return hashlib.sha256()
            case "git":
                return hashlib.sha1(b"blob %d\0" % n_bytes, usedforsecurity=False)
            case _:
                assert_never(self.kind)


class Hasher(Protocol):
    """As in hashlib."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository; `path` as the hub writes it, not to be trusted as a path."""

    path: str
    n_bytes: int
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a repository holds. revision: asked for with every file, so that all are of one state of it."""

    revision: str
    files: tuple[HubFile, ...]
    is_gated: bool = False


@dataclass(frozen=True, slots=True)
class Transfer:
    """The bytes of a file from `start` on: where the hub was asked to begin, or 0 when it cannot begin there."""

    start: int
    chunks: Iterator[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a hub is reached. sends_token: whether the token goes there; never to a mirror unless somebody asked."""

    endpoint: str
    token: str | None = field(default=None, repr=False)
    sends_token: bool = True

    @property
    def sent_token(self) -> str | None:
        """The token that goes along with requests."""
        return self.token if self.sends_token else None


class Hub(Protocol):
    """Where weights come from. Everything blocks, and raises DownloadError or HubRateLimited and nothing else."""

    @property
    def source(self) -> Source:
        """Which one."""

    @property
    def endpoint(self) -> str:
        """Its address."""

    def listing(self, repo_id: str) -> Listing:
        """What the repository holds now."""

    def check_access(self, repo_id: str, listing: Listing) -> None:
        """Raise what a download would meet: no token, licence not accepted. A few bytes, before gigabytes."""

    def open(self, repo_id: str, listing: Listing, path: str, *, start: int) -> AbstractContextManager[Transfer]:
        """The bytes of a file from `start` on."""


def retry_after_s(headers: Mapping[str, str], *, now: datetime | None = None) -> float:
    """How long a hub wants to be left alone: `Retry-After` in seconds or as a date, or Hugging Face's `RateLimit`.

    >>> retry_after_s({"retry-after": "7"}), retry_after_s({"ratelimit": '"api";r=0;t=55'}), retry_after_s({})
    (7.0, 55.0, 60.0)
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,6}(\.\d+)?", value):
        return float(value)
    if value:
        try:
            return max(0.0, (parsedate_to_datetime(value) - (now or datetime.now(UTC))).total_seconds())
        except (TypeError, ValueError):
            pass
    found = re.search(r"\bt=(\d{1,6})", headers.get("ratelimit", ""))
    return float(found[1]) if found else DEFAULT_RETRY_S


def token_needed(message: str, access: Access, *, hint: str) -> TokenNeeded:
    """The error of a hub that wants a token. hint: how to get one; there may be one that a mirror is not sent."""
    if access.token is None:
        return TokenNeeded(message, hint=hint)
    return TokenNeeded(
        f"{message}, and tokens are not sent to the mirror {access.endpoint}",
        hint="set SD_TOKEN_TO_MIRROR=true if you trust it, or use the official address",
    )


def rate_limited(source: Source, wait_s: float) -> HubRateLimited:
    """The error of a hub that wants fewer requests."""
    return HubRateLimited(
        f"{TITLES[source]} wants fewer requests from this address",
        retry_after_s=wait_s,
        hint=f"try again in {max(1, round(wait_s))} s, or set a token: accounts may ask more often",
    )


def unreachable(source: Source, endpoint: str, reason: str) -> HubUnreachable:
    """The error of a hub that does not answer as it should. reason: in a few words."""
    other = {"hf": "--from modelscope", "modelscope": "--from hf"}[source]
    variable = {"hf": "SD_HF_ENDPOINT", "modelscope": "SD_MODELSCOPE_ENDPOINT"}[source]
    return HubUnreachable(
        f"{TITLES[source]} at {endpoint} cannot be reached: {' '.join(reason.split())[:200]}",
        hint=f"check the connection and the proxy, name a mirror with {variable}, or use {other}",
    )
