"""The server's port, door, database and jobs, with real sockets, real processes and a real database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from sdfleet.storage.database import open_database
from sdfleet.storage.lock import alone
from tests.api.serving import running
from tests.doctor.stage import cure, look, machine, write
from tests.storage.conftest import Clock, Stage

NOW_S = 1_900_000_000.0


@contextlib.contextmanager
def _listening() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


def _play(home: Path, story: Callable[[Stage], Awaitable[object]], *, now_s: float = NOW_S) -> None:
    async def main() -> None:
        database = await open_database(None, home=home)
        try:
            await story(Stage(database, Clock(now_s=now_s)))
        finally:
            await database.close()

    asyncio.run(main())


def test_a_free_port_is_well_and_free_afterwards(tmp_path: Path) -> None:
    with _listening() as port:
        pass
    there = machine(tmp_path, port=port)
    assert [look("port-in-use", there).verdict for _ in range(2)] == ["ok", "ok"]


def test_a_port_in_use_is_told_with_the_process_that_has_it(tmp_path: Path) -> None:
    with _listening() as port:
        there = machine(tmp_path, port=port)
        assert f"process {os.getpid()})" in look("port-in-use", there).what
        assert cure("port-in-use", there) == f"SD_PORT={port + 1}, or end it: kill {os.getpid()}"


def test_a_server_of_the_same_data_folder_on_the_port_is_no_fault(tmp_path: Path) -> None:
    with running(tmp_path / "home") as here:
        port = int(here.url.rpartition(":")[2])
        found = look("port-in-use", machine(tmp_path, port=port))
        assert found.verdict == "ok", found
        assert "the sdfleet server of this data folder" in found.what


def test_an_address_that_is_not_of_this_machine_is_a_fault(tmp_path: Path) -> None:
    there = machine(tmp_path, host="203.0.113.7", port=7860)
    assert "cannot be listened on" in look("port-in-use", there).what
    assert cure("port-in-use", there) == "SD_HOST=127.0.0.1"


def test_another_server_of_the_data_folder_is_named_with_the_way_to_have_two(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert look("other-server", machine(tmp_path)).what == "no server uses this data folder"
    script = (
        "import sys; from pathlib import Path; from sdfleet.storage.lock import alone\n"
        "with alone(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        found = look("other-server", machine(tmp_path))
        other.communicate()
    assert f"a server (process {other.pid}) uses" in found.what
    assert "SD_HOME" in found.cure
    assert look("other-server", machine(tmp_path)).what == "no server uses this data folder"


def test_looking_for_a_server_does_not_keep_one_from_starting(tmp_path: Path) -> None:
    there = machine(tmp_path)
    with alone(tmp_path / "home"):
        assert "this server uses the data folder" in look("other-server", there).what
    look("other-server", there)
    with alone(tmp_path / "home"):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_a_server_for_this_machine_alone_needs_no_key(tmp_path: Path, host: str) -> None:
    assert look("open-door", machine(tmp_path, host=host)).verdict == "ok"


def test_a_server_for_the_network_without_a_key_is_a_fault_until_there_is_one(tmp_path: Path) -> None:
    there = machine(tmp_path, host="0.0.0.0")  # noqa: S104 - that is the point
    assert cure("open-door", there).startswith("sdfleet keys create NAME")
    assert look("open-door", machine(tmp_path, host="0.0.0.0", api_key="k")).verdict == "ok"  # noqa: S104 - as above
    _play(tmp_path / "home", lambda stage: stage.keys.create("me"))
    assert look("open-door", there).what == "on 0.0.0.0 callers need one of 1 keys"


def test_no_database_yet_is_well_and_none_is_made(tmp_path: Path) -> None:
    assert look("database", machine(tmp_path)).verdict == "ok"
    assert list((tmp_path / "home").iterdir()) == []


def test_a_database_that_another_program_keeps_locked_is_told(tmp_path: Path) -> None:
    _play(tmp_path / "home", lambda stage: stage.accept())
    there = machine(tmp_path)
    assert look("database", there).verdict == "ok"
    with contextlib.closing(sqlite3.connect(tmp_path / "home/sdfleet.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        found = _examined("database", tmp_path)
        assert "another program holds its lock" in found["found"]
        assert "close what else has the file open" in found["cure"]
        assert look("failing-jobs", there).verdict == "not_applicable", "one fault is told once"


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    there = machine(tmp_path)
    write(tmp_path / "home/sdfleet.db", "not a database, and longer than a header of one hundred bytes " * 3)
    found = _examined("database", tmp_path)
    assert "it is not a SQLite database" in found["found"]
    assert "SD_DATABASE_URL" in found["cure"]
    assert there.settings.database_url is None


def test_a_database_of_a_newer_sdfleet_is_told(tmp_path: Path) -> None:
    _play(tmp_path / "home", lambda stage: stage.accept())
    with contextlib.closing(sqlite3.connect(tmp_path / "home/sdfleet.db")) as ours, ours:
        ours.execute("UPDATE sdfleet_version SET version_num = '9999'")
    assert "install that sdfleet again" in cure("database", machine(tmp_path))


def test_a_database_from_before_is_well_and_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "home/sdfleet.db"
    _play(tmp_path / "home", lambda stage: stage.accept())
    with contextlib.closing(sqlite3.connect(path)) as ours, ours:
        ours.execute("DELETE FROM sdfleet_version")
    before = path.read_bytes()
    there = machine(tmp_path)
    assert look("database", there).verdict == "ok"
    assert look("failing-jobs", there).verdict == "not_applicable"
    assert path.read_bytes() == before


def _examined(name: str, folder: Path) -> dict[str, str]:
    """What the examination tells of one check, errors of ours included."""
    from sdfleet.doctor.examining import Examiner
    from sdfleet.doctor.table import checks

    (one,) = Examiner().examine(machine(folder), checks([name]))
    assert one.finding.verdict == "fault", one
    return {"found": one.finding.what, "cure": one.cure}


def test_jobs_that_fail_often_are_told_by_their_reason_with_its_hint(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        for n in range(5):
            job = await stage.begun()
            code = "out_of_memory" if n < 4 else "engine_died"
            error = {"code": code, "message": "no memory is left", "hint": "ask for a smaller size"}
            await stage.jobs.fail(job.id, error)
        await stage.finished()

    _play(tmp_path / "home", story)
    there = machine(tmp_path, clock=lambda: NOW_S)
    assert "of 6 jobs that ended in the last day 5 failed: 4x out_of_memory (no memory is left)" in (
        look("failing-jobs", there).what
    )
    assert cure("failing-jobs", there) == "ask for a smaller size"
    week_later = machine(tmp_path, clock=lambda: NOW_S + 7 * 86_400)
    assert look("failing-jobs", week_later).verdict == "ok"


def test_a_failure_among_many_and_what_a_person_wanted_are_no_warning(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        for code in ("deadline_exceeded", "deadline_exceeded", "deadline_exceeded", "engine_failed"):
            await stage.jobs.fail((await stage.begun()).id, {"code": code, "message": "m", "hint": "h"})
        for _ in range(3):
            await stage.finished()

    _play(tmp_path / "home", story)
    found = look("failing-jobs", machine(tmp_path, clock=lambda: NOW_S))
    assert (found.verdict, "1x engine_failed (m)" in found.what) == ("ok", True)


def test_a_job_that_is_drawn_for_hours_where_others_took_seconds_is_told(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.finished(spent_s=3.0)
        await stage.accept(job_id="slow")
        await stage.jobs.begin("slow")  # type: ignore[arg-type]

    _play(tmp_path / "home", story)
    with alone(tmp_path / "home"):
        soon, late = (machine(tmp_path, clock=lambda after_s=after_s: NOW_S + after_s) for after_s in (60, 7200))
        assert look("hung-engine", soon).verdict == "ok"
        assert (
            "job slow with toy has been drawn for 2.0 h; the slowest before took 3 s" in look("hung-engine", late).what
        )
        assert cure("hung-engine", late).startswith("sdfleet jobs cancel slow")
    assert cure("hung-engine", soon) == "sdfleet serve"


def test_without_a_job_no_engine_hangs(tmp_path: Path) -> None:
    _play(tmp_path / "home", lambda stage: stage.finished())
    assert look("hung-engine", machine(tmp_path)).verdict == "not_applicable"
