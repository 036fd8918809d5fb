"""Opening a database, what each connection promises, and what is said when it cannot be used."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Select, column, insert, select, table, text

from sdfleet.errors import InvalidValue, StorageError, StoreUnavailable
from sdfleet.storage import database as database_module
from sdfleet.storage.database import Database, open_database
from sdfleet.storage.migrations.upgrade import scripts, upgrade
from sdfleet.storage.tables import HEAD, VERSION_TABLE, keys, metadata
from tests.storage.conftest import Play, Stage, play_on


def _open_and_close(url: str | None, home: Path) -> None:
    async def story() -> None:
        await (await open_database(url, home=home)).close()

    asyncio.run(story())


def _pragmas(connection: Connection) -> dict[str, Any]:
    names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "fullfsync", "query_only")
    return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names}


def _insert_key(key_id: str) -> Callable[[Connection], str]:
    def work(connection: Connection) -> str:
        connection.execute(
            insert(keys), {"id": key_id, "name": key_id, "secret_sha256": "", "scopes": "[]", "created_s": 1.0}
        )
        return key_id

    return work


def _ids(connection: Connection) -> list[str]:
    return list(connection.scalars(text("SELECT id FROM keys ORDER BY id")))


# ------------------------------------------------------------------------------------------------------------- promises


def test_every_sqlite_connection_survives_a_power_cut(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        durable = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000, "fullfsync": 1}
        assert await stage.database.write(_pragmas) == {**durable, "query_only": 0}
        gate = threading.Barrier(database_module.N_READERS)

        def read(connection: Connection) -> dict[str, Any]:
            gate.wait(timeout=60)  # so that each reads through a connection of its own
            return _pragmas(connection)

        found = await asyncio.gather(*(stage.database.read(read) for _ in range(database_module.N_READERS)))
        assert found == [{**durable, "query_only": 1}] * database_module.N_READERS

    play_on(f"sqlite:///{tmp_path / 'jobs.db'}", story)


def test_a_postgresql_commit_waits_for_the_disk(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        if stage.database.is_postgresql:
            found = await stage.database.write(lambda c: c.exec_driver_sql("SHOW synchronous_commit").scalar())
            assert found == "on"

    play(story)


def test_a_reader_cannot_write(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(StoreUnavailable):
            await stage.database.read(_insert_key("a"))
        assert await stage.database.read(_ids) == []

    play(story)


def test_what_arrives_during_a_commit_is_committed_together(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        begun, gate = threading.Event(), threading.Event()

        def slow(connection: Connection) -> int:
            begun.set()
            assert gate.wait(timeout=60)
            return id(connection.get_transaction())

        first = asyncio.ensure_future(stage.database.write(slow))
        await asyncio.to_thread(begun.wait, 60)
        later = [asyncio.ensure_future(stage.database.write(_transaction_of)) for _ in range(30)]
        await asyncio.sleep(0)
        gate.set()
        found = await asyncio.gather(*later)
        assert len(set(found)) == 1
        assert await first not in found

    kept: list[object] = []

    def _transaction_of(connection: Connection) -> int:
        transaction = connection.get_transaction()
        kept.append(transaction)  # or the next may have the same id
        return id(transaction)

    play(story)


def test_one_that_fails_takes_no_neighbour_along(play: Play[Any]) -> None:
    def broken(connection: Connection) -> None:
        _insert_key("half")(connection)
        message = "not my day"
        raise LookupError(message)

    async def story(stage: Stage) -> None:
        works: list[Callable[[Connection], Any]] = [_insert_key(f"a{i}") for i in range(6)]
        works[3:3] = [broken, _insert_key("a1")]
        answers = await asyncio.gather(*map(stage.database.write, works), return_exceptions=True)
        assert [type(answer).__name__ for answer in answers[3:5]] == ["LookupError", "IntegrityError"]
        assert await stage.database.read(_ids) == [f"a{i}" for i in range(6)]

    play(story)


def test_a_caller_who_is_cancelled_tears_no_transaction(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        begun, gate = threading.Event(), threading.Event()

        def slow(connection: Connection) -> None:
            _insert_key("a")(connection)
            begun.set()
            assert gate.wait(timeout=60)
            _insert_key("b")(connection)

        running = asyncio.ensure_future(stage.database.write(slow))
        await asyncio.to_thread(begun.wait, 60)
        waiting = asyncio.ensure_future(stage.database.write(_insert_key("never")))
        await asyncio.sleep(0)
        for task in (running, waiting):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        gate.set()
        await stage.database.write(_insert_key("c"))
        assert await stage.database.read(_ids) == ["a", "b", "c"]

    play(story)


def test_closing_waits_for_what_was_given_and_refuses_what_comes_later(play: Play[Any]) -> None:
    async def first(stage: Stage) -> None:
        given = [asyncio.ensure_future(stage.database.write(_insert_key(f"a{i}"))) for i in range(9)]
        await asyncio.sleep(0)
        await stage.database.close()
        await asyncio.gather(*given)
        with pytest.raises(StoreUnavailable, match="closed"):
            await stage.database.write(_insert_key("late"))

    async def second(stage: Stage) -> list[str]:
        return await stage.database.read(_ids)

    play(first)
    assert len(play(second)) == 9


# -------------------------------------------------------------------------------------------------------- two processes


def test_two_processes_share_one_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    script = (
        "import asyncio, sys\n"
        "from tests.storage.conftest import play_on\n"
        "async def story(stage):\n"
        "    for i in range(60): await stage.accept(job_id=f'{sys.argv[2]}{i}')\n"
        "play_on(sys.argv[1], story)\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", script, url, name], stderr=subprocess.PIPE) for name in "abc"]
    faults = [child.communicate(timeout=120)[1].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], faults

    async def story(stage: Stage) -> int:
        return (await stage.jobs.counts())["queued"]

    assert play_on(url, story) == 180


def test_a_file_that_another_program_holds_is_not_there_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "jobs.db"

    async def story(stage: Stage) -> None:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="another program holds its lock"):
            await stage.accept(prompt="a secret plan")
        assert (await stage.jobs.counts())["queued"] == 0
        other.execute("COMMIT")
        other.close()
        await stage.accept()

    play_on(f"sqlite:///{path}", story)


# -------------------------------------------------------------------------------------------------------- what can fail


def test_a_full_disk_is_said_and_costs_only_the_new_job(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.accept(job_id="before")

        def fill(connection: Connection) -> None:
            n_pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={n_pages}")

        await stage.database.write(fill)
        with pytest.raises(StoreUnavailable, match="the disk is full") as caught:
            await stage.accept(prompt="secret " * 2000)
        assert "secret" not in "".join(map(str, (caught.value, caught.value.__cause__)))
        assert [job.id for job in (await stage.jobs.page())[0]] == ["before"]

    play_on(f"sqlite:///{tmp_path / 'jobs.db'}", story)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: path.write_bytes(b"no database " * 1000), "not a SQLite database"),
        (lambda path: path.mkdir(), "cannot be opened"),
        (lambda path: path.parent.joinpath("jobs.db-wal").mkdir(), "cannot be"),
    ],
    ids=["other file", "folder", "no place for the log"],
)
def test_a_file_that_cannot_be_opened_is_said_with_what_to_do(tmp_path: Path, make: Any, part: str) -> None:
    path = tmp_path / "jobs.db"
    make(path)
    with pytest.raises(StorageError, match=part) as caught:
        _open_and_close(f"sqlite:///{path}", tmp_path)
    assert caught.value.hint
    assert str(path) in caught.value.message


def test_a_home_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(StorageError, match="cannot be opened"):
        _open_and_close(None, tmp_path / "home")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    _open_and_close(None, tmp_path)
    (tmp_path / "sdfleet.db").chmod(0o400)
    with pytest.raises(StorageError, match="cannot be opened"):
        _open_and_close(None, tmp_path)


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "sqlite:///a.db?mode=memory", "mysql://u:pass-word@h/d", "jobs.db", "", "x://"],
)
def test_a_url_that_would_lose_jobs_or_is_unknown_is_refused_without_its_password(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="database_url") as caught:
        _open_and_close(url, tmp_path)
    assert "pass-word" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_postgresql_that_is_not_there_is_said_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql://u:pass-word@/jobs?host={tmp_path}"
    with pytest.raises(StorageError, match="cannot be used") as caught:
        _open_and_close(url, tmp_path)
    assert "pass-word" not in "".join(map(str, (caught.value, caught.value.__cause__)))


def test_a_connection_that_the_server_closed_is_opened_again(postgresql_url: str) -> None:
    own = text("SELECT pg_backend_pid()")
    one = text("SELECT 1")

    async def story(stage: Stage) -> None:
        for work, other in [
            (stage.database.write, stage.database.read),
            (stage.database.read, stage.database.write),
        ]:
            idle = await work(lambda connection: connection.scalar(own))
            end = text(f"SELECT pg_terminate_backend({idle}, 60000)")
            await other(lambda connection, end=end: connection.scalar(end))  # type: ignore[misc]
            assert await work(lambda connection: connection.scalar(one)) == 1

    play_on(postgresql_url.format(name="postgres"), story)


def test_a_connection_that_breaks_in_a_transaction_is_said(postgresql_url: str) -> None:
    end = text("SELECT pg_terminate_backend(pg_backend_pid())")

    async def story(stage: Stage) -> None:
        for work in (stage.database.write, stage.database.read):
            with pytest.raises(StoreUnavailable):
                await work(lambda connection: connection.scalar(end))

    play_on(postgresql_url.format(name="postgres"), story)


def test_what_is_shown_of_a_database_holds_no_password(postgresql_url: str) -> None:
    async def story(stage: Stage) -> str:
        return repr(stage.database)

    url = postgresql_url.format(name="postgres").replace("sdfleet@", "sdfleet:pass-word@")
    shown = play_on(url, story)
    assert "sdfleet:***@" in shown
    assert "pass-word" not in shown


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.accept()
        rights = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "home").iterdir()}
        assert rights == {"sdfleet.db": 0o600, "sdfleet.db-wal": 0o600, "sdfleet.db-shm": 0o600}

    play_on(f"sqlite:///{tmp_path / 'home/sdfleet.db'}", story)


# ----------------------------------------------------------------------------------------------------------- migrations


def test_the_migrations_make_exactly_the_tables_we_use(play: Play[Any]) -> None:
    def differences(connection: Connection) -> list[Any]:
        options = {"version_table": VERSION_TABLE, "compare_type": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    async def story(stage: Stage) -> None:
        assert await stage.database.write(differences) == []

    play(story)


def test_head_is_the_newest_migration() -> None:
    assert scripts().get_heads() == [HEAD]


def test_a_database_of_the_first_version_is_brought_to_head_with_its_rows(url: str) -> None:
    def first_version(database: Database) -> Callable[[Connection], None]:
        def work(connection: Connection) -> None:
            for name in (*metadata.tables, VERSION_TABLE):
                cascade = " CASCADE" if database.is_postgresql else ""
                connection.exec_driver_sql(f"DROP TABLE {name}{cascade}")
            upgrade(connection, to="0001")
            connection.exec_driver_sql(
                "INSERT INTO keys (id, name, secret_sha256, scopes, created_s) VALUES ('a', 'n', '', '[]', 1.0)"
            )

        return work

    async def make(stage: Stage) -> None:
        await stage.database.write(first_version(stage.database))

    async def story(stage: Stage) -> None:
        assert await stage.database.read(_ids) == ["a"]
        version: Select[str] = select(column("version_num")).select_from(table(VERSION_TABLE))
        assert await stage.database.read(lambda connection: connection.scalar(version)) == HEAD

    play_on(url, make)
    play_on(url, story)


def test_a_database_of_a_newer_version_is_refused_and_left_alone(url: str) -> None:
    async def make(stage: Stage) -> None:
        await stage.accept()
        newer = table(VERSION_TABLE, column("version_num")).update().values(version_num="9999")
        await stage.database.write(lambda connection: connection.execute(newer).rowcount)

    play_on(url, make)
    with pytest.raises(StorageError, match="newer sdfleet"):
        play_on(url, make)


def test_processes_that_start_together_migrate_once(url: str) -> None:
    script = (
        "import asyncio, sys, pathlib\n"
        "from sdfleet.storage.database import open_database\n"
        "async def main(): await (await open_database(sys.argv[1], home=pathlib.Path('unused'))).close()\n"
        "asyncio.run(main())\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", script, url], stderr=subprocess.PIPE) for _ in range(4)]
    faults = [child.communicate(timeout=120)[1].decode() for child in children]
    assert [child.returncode for child in children] == [0] * 4, faults
