"""The database: one writer that commits for everybody who waits, a few readers, and the promise that a commit stays.

Everything blocking runs in threads of its own. A piece of work is a function of a connection; it is run whole in one
transaction or not at all, also when the task that waits for it is cancelled. Not SQLAlchemy's asyncio layer: that
changes threads at every statement and commits each job alone. Jobs accepted per second on two cores of a Xeon,
2026-11-21: 941 here and 686 there for one caller, 2912 and 659 for 16 at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, table
from sqlalchemy import column as sql_column
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError

from sdfleet.errors import InvalidValue, SdfleetError, StorageError, StoreUnavailable
from sdfleet.storage.tables import HEAD, VERSION_TABLE

log = logging.getLogger(__name__)

T = TypeVar("T")

# How long one process waits for another that is writing; a transaction of ours takes milliseconds, a migration seconds.
BUSY_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10
# A page of jobs takes a few milliseconds; more than this many at once would only wait for the interpreter.
N_READERS = 4
# A transaction of this many pieces of work has spread its one fsync thin enough; a longer one only delays its first.
MAX_GROUP = 64
# Any number that other users of a PostgreSQL server are unlikely to take.
_ADVISORY_LOCK = 0x5DF1EE7

# What a piece of work of ours can raise by mistake. Its neighbours in the transaction are then run again without it.
_ONES_OWN_FAULTS = (SQLAlchemyError, SdfleetError, ArithmeticError, LookupError, TypeError, ValueError)

_SQLITE_FAULTS = {
    sqlite3.SQLITE_BUSY: ("another program holds its lock", "try again; close what else has the file open"),
    sqlite3.SQLITE_LOCKED: ("another program holds its lock", "try again; close what else has the file open"),
    sqlite3.SQLITE_FULL: ("the disk is full", "make room"),
    sqlite3.SQLITE_READONLY: ("it may not be written", "give the file and its folder to the user that runs sdfleet"),
    sqlite3.SQLITE_CANTOPEN: ("it cannot be opened", "look at the rights of the file and its folder"),
    sqlite3.SQLITE_NOTADB: ("it is not a SQLite database", "move it away, or name another with SD_DATABASE_URL"),
    sqlite3.SQLITE_CORRUPT: ("it is damaged", "move it away, or restore it from a copy"),
    sqlite3.SQLITE_IOERR: ("the disk does not answer as it should", "look at the system's log"),
}


class _Write(Generic[T]):
    """A piece of work that waits for the writer."""

    def __init__(self, work: Callable[[Connection], T]) -> None:
        self.work = work
        self.done: Future[T] = Future()


class Database:
    """An open database at the newest migration. Made by `open_database`; `close` when done.

    name: the database for messages, without its password. n_writes: transactions that this process has committed.
    """

    def __init__(self, *, name: str, writer: Engine, readers: Engine) -> None:
        self.name = name
        self.n_writes = 0
        self._writer = writer
        self._readers = readers
        self._waiting: deque[_Write[Any]] = deque()
        # One thread, so one transaction at a time: what arrives during a commit waits, and is committed together.
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="sdfleet-writer")
        self._read_threads = ThreadPoolExecutor(N_READERS, thread_name_prefix="sdfleet-reader")
        self._is_closed = False

    def __repr__(self) -> str:
        return f"Database({self.name!r})"

    @property
    def is_postgresql(self) -> bool:
        """PostgreSQL rather than SQLite."""
        return self._writer.dialect.name == "postgresql"

    async def write(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, once its transaction is on the disk.

        work runs in the writer's thread, perhaps together with others in one transaction, perhaps a second time after
        the first was rolled back: it must do nothing but read and write through the connection, and let the database's
        errors through (PostgreSQL undoes the whole transaction after one). Expected refusals are better given back as
        a value, so that they cost the others nothing. If the caller is cancelled, the work is done whole or not at all.
        Raises StoreUnavailable when nothing was committed, and what `work` raises.
        """
        self._check_open()
        write = _Write(work)
        self._waiting.append(write)
        self._write_thread.submit(self._write_waiting)
        return await asyncio.wrap_future(write.done)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns; it sees one state of the database and cannot change it. Raises as `write`."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._read_threads, self._read, work)

    async def off_loop(self, work: Callable[[], T]) -> T:
        """What `work` returns, run in a reader's thread: unpacking and packing of pictures."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._read_threads, work)

    async def close(self) -> None:
        """Let the waiting work end, then close; may be called twice."""
        if not self._is_closed:
            self._is_closed = True
            await asyncio.to_thread(self._close)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("the database is closed", hint="the server is stopping; try again when it is back")

    def _close(self) -> None:
        self._write_thread.shutdown()
        self._read_threads.shutdown()
        self._writer.dispose()
        self._readers.dispose()

    def _read(self, work: Callable[[Connection], T]) -> T:
        with self._told(), self._readers.begin() as connection:
            return work(connection)

    def _write_waiting(self) -> None:
        group: list[_Write[Any]] = []
        while self._waiting and len(group) < MAX_GROUP:
            write = self._waiting.popleft()
            if write.done.set_running_or_notify_cancel():
                group.append(write)
        try:
            self._commit(group)
        except BaseException as exc:
            for write in group:
                if not write.done.done():
                    write.done.set_exception(exc)
            raise

    def _commit(self, group: list[_Write[Any]]) -> None:
        if len(group) > 1:
            try:
                results = self._transaction(group)
            except StoreUnavailable as exc:
                for write in group:
                    write.done.set_exception(exc)
                return
            except _ONES_OWN_FAULTS:
                log.debug("a group of writes is taken apart", extra={"n_writes": len(group)}, exc_info=True)
            else:
                for write, result in zip(group, results, strict=True):
                    write.done.set_result(result)
                return
        for write in group:
            try:
                (result,) = self._transaction([write])
            except _ONES_OWN_FAULTS as exc:
                write.done.set_exception(exc)
            else:
                write.done.set_result(result)

    def _transaction(self, group: list[_Write[Any]]) -> list[Any]:
        with self._told(), self._writer.begin() as connection:
            results = [write.work(connection) for write in group]
        self.n_writes += 1
        return results

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The database's own faults as StoreUnavailable."""
        try:
            yield
        except (IntegrityError, ProgrammingError, DataError):
            # Said by a database that works: the caller's own fault, or one of ours.
            raise
        except DBAPIError as exc:
            what, hint = reason_of(exc)
            log.warning("the database cannot be used", extra={"database": self.name, "reason": what})
            raise StoreUnavailable(f"the database {self.name} cannot be used now: {what}", hint=hint) from exc


async def open_database(url: str | None, *, home: Path) -> Database:
    """The database at its newest migration: `home/sdfleet.db`, or what the URL names.

    url: None, `sqlite:///FILE`, or `postgresql://USER:PASSWORD@HOST/NAME` (with the extra `postgres`).
    Raises InvalidValue for a URL we do not know, StorageError when it cannot be opened or is of a newer sdfleet.
    """
    return await asyncio.to_thread(_open, url, home)


def _open(url: str | None, home: Path) -> Database:
    parsed = parse_url(url, home)
    name = parsed.database or "" if parsed.get_backend_name() == "sqlite" else parsed.render_as_string()
    if parsed.get_backend_name() == "sqlite":
        _make_file(Path(name))
        writer, readers = _sqlite(parsed, is_writer=True), _sqlite(parsed, is_writer=False)
    else:
        writer, readers = _postgresql(parsed, is_writer=True), _postgresql(parsed, is_writer=False)
    try:
        _bring_to_head(writer, name=name)
    except BaseException as exc:
        writer.dispose()
        readers.dispose()
        if isinstance(exc, DBAPIError):
            what, hint = reason_of(exc)
            raise StorageError(f"the database {name} cannot be used: {what}", hint=hint) from exc
        raise
    return Database(name=name, writer=writer, readers=readers)


def parse_url(url: str | None, home: Path) -> URL:
    """The database; a file by its whole path. Raises InvalidValue, never with the text: it may hold a password."""
    if url is None:
        return URL.create("sqlite", database=str(home / "sdfleet.db"))
    hint = "use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
    try:
        parsed = make_url(url)
    except ArgumentError as exc:
        # The text itself may hold a password.
        raise InvalidValue("database_url", "it is not a URL", hint=hint) from exc
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "sqlite":
        raise InvalidValue("database_url", f"{parsed.drivername!r} is not a database we use", hint=hint)
    if parsed.database in (None, "", ":memory:") or parsed.query:
        raise InvalidValue("database_url", "it names no file, and jobs in memory would be lost", hint=hint)
    return parsed.set(database=str(Path(str(parsed.database)).expanduser().absolute()))


def _make_file(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Prompts and the secrets of webhooks are for their owner alone; SQLite gives its other files the same rights.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as exc:
        hint = "give the file and its folder to the user that runs sdfleet, or name another with SD_DATABASE_URL"
        raise StorageError(f"the database {path} cannot be opened: {exc.strerror or exc}", hint=hint) from exc


def _sqlite(url: URL, *, is_writer: bool) -> Engine:
    # hide_parameters: an error's text goes to logs, and the values are prompts.
    engine = create_engine(
        url,
        hide_parameters=True,
        pool_size=1 if is_writer else N_READERS,
        max_overflow=0,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: object) -> None:
        # The driver would begin transactions by itself, and only before some statements.
        connection.isolation_level = None
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise StorageError(
                f"the database {url.database} is on a file system without shared memory (journal mode {mode})",
                hint="put it on a disk of this machine with SD_HOME or SD_DATABASE_URL, or use PostgreSQL",
            )
        connection.execute("PRAGMA synchronous=FULL")
        # macOS: a plain fsync leaves the data in the drive's cache; no effect elsewhere.
        connection.execute("PRAGMA fullfsync=ON")
        connection.execute("PRAGMA checkpoint_fullfsync=ON")
        connection.execute("PRAGMA foreign_keys=ON")
        if not is_writer:
            connection.execute("PRAGMA query_only=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes its lock first: one that read before it writes cannot wait for another writer, it only fails.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")

    return engine


def _postgresql(url: URL, *, is_writer: bool) -> Engine:
    timeout_ms = int(BUSY_TIMEOUT_S * 1000)
    options = f"-c synchronous_commit=on -c lock_timeout={timeout_ms} -c statement_timeout={3 * timeout_ms}"
    if not is_writer:
        options += " -c default_transaction_read_only=on -c default_transaction_isolation=repeatable\\ read"
    try:
        engine = create_engine(
            url,
            hide_parameters=True,
            pool_size=1 if is_writer else N_READERS,
            max_overflow=0,
            # A connection that a restart of the server has closed is found before it is used.
            pool_pre_ping=True,
            connect_args={"connect_timeout": CONNECT_TIMEOUT_S, "options": options, "application_name": "sdfleet"},
        )
    except ModuleNotFoundError as exc:
        raise StorageError(
            "PostgreSQL needs a package that is not here", hint="pip install 'sdfleet[postgres]'"
        ) from exc
    if is_writer:

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # One writer at a time, as with SQLite: what is counted in a transaction still holds when it commits.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")

    return engine


def _bring_to_head(writer: Engine, *, name: str) -> None:
    # In one transaction with the writer's lock: of two processes that start together one migrates, the other waits.
    with writer.begin() as connection:
        found = version_of(connection)
        if found == HEAD:
            return
        # Alembic takes 0.14 s to import, and nearly every start has nothing to migrate.
        from sdfleet.storage.migrations.upgrade import scripts, upgrade

        if found is not None and found not in {script.revision for script in scripts().walk_revisions()}:
            raise StorageError(
                f"the database {name} was written by a newer sdfleet (its tables are of version {found!r})",
                hint="install that version again, or name another database with SD_HOME or SD_DATABASE_URL",
            )
        upgrade(connection)
    log.info("database migrated", extra={"database": name, "from": found, "to": HEAD})


def version_of(connection: Connection) -> str | None:
    """The migration the tables are at; None for an empty database."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found = connection.execute(select(sql_column("version_num")).select_from(table(VERSION_TABLE))).scalar()
    return None if found is None else str(found)


def reason_of(exc: DBAPIError) -> tuple[str, str]:
    """What happened and what to do, in one line each, without a statement or its values."""
    code = getattr(exc.orig, "sqlite_errorcode", None)
    if code is not None:
        found = _SQLITE_FAULTS.get(code & 0xFF)
        return found if found is not None else (" ".join(str(exc.orig).split())[:200], "")
    hint = "is the server up, and are the name and the password right?"
    return " ".join(str(exc.orig).split())[:200], hint
