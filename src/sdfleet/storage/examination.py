"""A look at a database without changing it: no migration, no file made, nothing kept open."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, create_engine, func, select
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError

from sdfleet.errors import StorageError
from sdfleet.storage.database import parse_url, reason_of, version_of
from sdfleet.storage.tables import HEAD, jobs, keys

# A server's own transactions take milliseconds; who holds the lock for longer stands in its way.
LOCK_WITHIN_S = 2.0
MOST_FAILURES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Jobs that failed for one reason. message, hint: of the newest of them."""

    code: str
    message: str
    hint: str
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LongestRunning:
    """The job that is being drawn for longest. typical_s: what drawing took the slowest done job of its model."""

    job_id: str
    model: str
    started_s: float
    typical_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a database holds. is_current: its tables are of this version; the rest is empty where they are not.

    is_newer: they are of a later sdfleet; older ones are brought up by the next start.

    n_done, failures: jobs that ended since the time asked for, the most frequent failure first.
    newest_s: when the newest job was accepted.
    """

    name: str
    is_current: bool
    version: str | None
    is_newer: bool = False
    n_done: int = 0
    failures: tuple[Failure, ...] = ()
    running: LongestRunning | None = None
    newest_s: float | None = None
    n_keys: int = 0

    @property
    def n_failed(self) -> int:
        """All failures together."""
        return sum(failure.n for failure in self.failures)


def look(url: str | None, *, home: Path, since_s: float) -> Seen | None:
    """What the database holds; None where there is none yet. url, home: as `open_database`. Blocks.

    Raises InvalidValue for a URL we do not know, StorageError for a database that cannot be read or whose lock
    another program keeps.
    """
    parsed = parse_url(url, home)
    is_file = parsed.get_backend_name() == "sqlite"
    name = str(parsed.database) if is_file else parsed.render_as_string()
    if is_file and not Path(name).exists():
        return None
    engine = _engine(parsed)
    try:
        with _told(name), engine.connect() as connection:
            if is_file:
                # Whether a writer would get in; given back at once.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                connection.exec_driver_sql("ROLLBACK")
                connection.exec_driver_sql("BEGIN")
            seen = _seen(connection, name=name, since_s=since_s)
            connection.rollback()
            return seen
    finally:
        engine.dispose()


def _engine(parsed: URL) -> Engine:
    if parsed.get_backend_name() == "sqlite":
        # `rw`: a file that vanished meanwhile is not made anew.
        url = URL.create("sqlite", database=f"file:{parsed.database}", query={"mode": "rw", "uri": "true"})
        return create_engine(
            url, hide_parameters=True, connect_args={"timeout": LOCK_WITHIN_S, "isolation_level": None}
        )
    try:
        options = {"connect_timeout": round(LOCK_WITHIN_S), "options": "-c default_transaction_read_only=on"}
        return create_engine(parsed, hide_parameters=True, connect_args=options)
    except ModuleNotFoundError as exc:
        raise StorageError(
            "PostgreSQL needs a package that is not here", hint="pip install 'sdfleet[postgres]'"
        ) from exc


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as exc:
        what, hint = reason_of(exc)
        raise StorageError(f"the database {name} cannot be used: {what}", hint=hint) from exc


def _seen(connection: Connection, *, name: str, since_s: float) -> Seen:
    version = version_of(connection)
    if version != HEAD:
        return Seen(name=name, is_current=False, version=version, is_newer=_is_newer(version))
    ended = jobs.c.finished_s >= since_s
    n_done = connection.execute(select(func.count()).where(jobs.c.state == "done", ended)).scalar_one()
    return Seen(
        name=name,
        is_current=True,
        version=version,
        n_done=n_done,
        failures=_failures(connection, since_s=since_s),
        running=_running(connection),
        newest_s=connection.execute(select(func.max(jobs.c.created_s))).scalar_one(),
        n_keys=connection.execute(select(func.count()).where(keys.c.revoked_s.is_(None))).scalar_one(),
    )


def _is_newer(version: str | None) -> bool:
    if version is None:
        return False
    from sdfleet.storage.migrations.upgrade import scripts

    return version not in {script.revision for script in scripts().walk_revisions()}


def _failures(connection: Connection, *, since_s: float) -> tuple[Failure, ...]:
    query = (
        select(jobs.c.error)
        .where(jobs.c.state == "failed", jobs.c.finished_s >= since_s, jobs.c.error.is_not(None))
        .order_by(jobs.c.finished_s.desc())
        .limit(MOST_FAILURES)
    )
    counts: Counter[str] = Counter()
    newest: dict[str, dict[str, str]] = {}
    for text in connection.execute(query).scalars():
        error: dict[str, str] = json.loads(text)
        code = error.get("code", "internal_error")
        counts[code] += 1
        newest.setdefault(code, error)
    return tuple(
        Failure(code=code, message=newest[code].get("message", ""), hint=newest[code].get("hint", ""), n=n)
        for code, n in counts.most_common()
    )


def _running(connection: Connection) -> LongestRunning | None:
    query = (
        select(jobs.c.id, jobs.c.model, jobs.c.started_s)
        .where(jobs.c.state == "running", jobs.c.started_s.is_not(None))
        .order_by(jobs.c.started_s)
        .limit(1)
    )
    row = connection.execute(query).first()
    if row is None:
        return None
    typical = select(func.max(jobs.c.generation_s)).where(jobs.c.model == row.model, jobs.c.state == "done")
    return LongestRunning(
        job_id=row.id, model=row.model, started_s=row.started_s, typical_s=connection.execute(typical).scalar_one()
    )
