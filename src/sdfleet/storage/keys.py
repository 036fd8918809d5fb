"""Keys of callers: made once, shown once, stored as a hash.

A key is `sdf_<id>_<secret>`. The id is no secret and finds the row; the whole text is compared by its hash, in the same
time whether it is right or wrong. One round of SHA-256 is enough: the secret is 256 random bits, not a password.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

from sqlalchemy import Connection, RowMapping, insert, or_, select, update

from sdfleet.domain import OwnerId, Scope
from sdfleet.errors import Conflict, InvalidValue, NotFound
from sdfleet.storage.database import Database
from sdfleet.storage.tables import keys

MAX_NAME_CHARS = 64
# A key in use would otherwise be written at every request; a minute is fine enough to see which keys are dead.
_USE_IS_NOTED_EVERY_S = 60.0

_NAME = re.compile(r"[^\W_](?:[\w .@-]{0,62}[\w.@-])?")
_SECRET = re.compile(r"sdf_([0-9a-f]{12})_[A-Za-z0-9_-]{43}", re.ASCII)
# Compared with when there is no such id, so that this takes as long as a wrong secret.
_NOBODYS_HASH = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key that is in force, without its secret.

    owner: whose jobs those made with it are; never given twice, also not to a later key of the same name.
    rate_per_minute, max_queued: None has no limit of its own. last_used_s: to the minute.
    """

    owner: OwnerId
    name: str
    scopes: frozenset[Scope]
    rate_per_minute: int | None
    max_queued: int | None
    created_s: float
    last_used_s: float | None


class KeyStore:
    """The keys of one database. clock: seconds since 1970. Methods raise StoreUnavailable beside what they name."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def create(
        self,
        name: str,
        *,
        scopes: Iterable[Scope] = ("generate", "read"),
        rate_per_minute: int | None = None,
        max_queued: int | None = None,
    ) -> tuple[KeyRecord, str]:
        """A new key and its text, which nobody can read again.

        Raises InvalidValue, or Conflict when a key of that name is in force.
        """
        allowed = frozenset(scopes)
        _check(name, allowed, rate_per_minute=rate_per_minute, max_queued=max_queued)
        key_id = secrets.token_hex(6)
        secret = f"sdf_{key_id}_{secrets.token_urlsafe(32)}"
        row = {
            "id": key_id,
            "name": name,
            "secret_sha256": _hash(secret),
            "scopes": json.dumps(sorted(allowed)),
            "rate_per_minute": rate_per_minute,
            "max_queued": max_queued,
            "created_s": self._clock(),
        }

        def work(connection: Connection) -> KeyRecord | Conflict:
            same = select(keys.c.id).where(keys.c.name == name, keys.c.revoked_s.is_(None))
            if connection.execute(same).first() is not None:
                return Conflict(f"there is a key named {name!r}", hint="revoke it first, or take another name")
            connection.execute(insert(keys), row)
            return _record(connection.execute(select(keys).where(keys.c.id == key_id)).mappings().one())

        answer = await self._database.write(work)
        if isinstance(answer, Conflict):
            raise answer
        return answer, secret

    async def list(self) -> tuple[KeyRecord, ...]:
        """The keys in force, oldest first."""
        query = select(keys).where(keys.c.revoked_s.is_(None)).order_by(keys.c.created_s, keys.c.id)
        return await self._database.read(lambda connection: tuple(map(_record, connection.execute(query).mappings())))

    async def revoke(self, name_or_id: str) -> KeyRecord:
        """The key that is in force no longer, also in servers that run. Raises NotFound."""
        now_s = self._clock()
        is_it = or_(keys.c.name == name_or_id, keys.c.id == name_or_id.removeprefix("key_"))

        def work(connection: Connection) -> KeyRecord | None:
            # A name that looks like another key's id: the id is meant.
            by_name_last = (keys.c.name == name_or_id).asc()
            query = select(keys).where(keys.c.revoked_s.is_(None), is_it).order_by(by_name_last)
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            connection.execute(update(keys).where(keys.c.id == row["id"]).values(revoked_s=now_s))
            return _record(row)

        found = None if "\0" in name_or_id else await self._database.write(work)
        if found is None:
            raise NotFound(f"there is no key named {name_or_id[:80]!r}", hint="list them with `sdfleet keys list`")
        return found

    async def find(self, secret: str) -> KeyRecord | None:
        """The key in force with this text; None for any other text."""
        match = _SECRET.fullmatch(secret)
        key_id = match[1] if match is not None else ""
        query = select(keys).where(keys.c.id == key_id, keys.c.revoked_s.is_(None))
        row = await self._database.read(lambda connection: connection.execute(query).mappings().first())
        is_right = hmac.compare_digest(_hash(secret), _NOBODYS_HASH if row is None else row["secret_sha256"])
        if row is None or not is_right:
            return None
        await self._note_use(key_id, last_used_s=row["last_used_s"])
        return _record(row)

    async def in_force(self, owner: OwnerId) -> KeyRecord | None:
        """The key in force of this owner, for who has shown it before; None if there is none any more."""
        query = select(keys).where(keys.c.id == owner.removeprefix("key_"), keys.c.revoked_s.is_(None))
        row = await self._database.read(lambda connection: connection.execute(query).mappings().first())
        return None if row is None else _record(row)

    async def _note_use(self, key_id: str, *, last_used_s: float | None) -> None:
        now_s = self._clock()
        if last_used_s is None or now_s - last_used_s >= _USE_IS_NOTED_EVERY_S:
            change = update(keys).where(keys.c.id == key_id).values(last_used_s=now_s)
            await self._database.write(lambda connection: connection.execute(change).rowcount)


def _check(name: str, scopes: frozenset[Scope], *, rate_per_minute: int | None, max_queued: int | None) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidValue(
            "name",
            f"{name[:80]!r} is no name for a key",
            hint=f"1 to {MAX_NAME_CHARS} letters, digits, . _ - @ or spaces",
        )
    unknown = sorted(scopes - set(get_args(Scope)))
    if unknown or not scopes:
        named = f"{unknown[0]!r} is not one" if unknown else "there is none"
        raise InvalidValue("scope", named, hint=f"use {', '.join(get_args(Scope))}")
    for field, value in (("rate_per_minute", rate_per_minute), ("max_queued", max_queued)):
        if value is not None and not 1 <= value <= 2**31 - 1:
            raise InvalidValue(field, f"{value} is not 1 or more")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _record(row: RowMapping) -> KeyRecord:
    return KeyRecord(
        owner=OwnerId(f"key_{row['id']}"),
        name=row["name"],
        scopes=frozenset(json.loads(row["scopes"])),
        rate_per_minute=row["rate_per_minute"],
        max_queued=row["max_queued"],
        created_s=row["created_s"],
        last_used_s=row["last_used_s"],
    )
