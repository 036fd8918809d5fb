"""How the engine's process starts, talks and ends. Real processes, no torch."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdfleet.backends.engine_job import DRAWN_AGAIN
from sdfleet.backends.local import LocalBackend
from sdfleet.domain import ImageResult
from sdfleet.engine.events import EngineOptions
from sdfleet.errors import EngineDied, EngineFailed, UnsupportedByModel
from tests.backends.drawings import child_environment, drawing, scripted_backend
from tests.backends.test_local_faults import program, tell

# -------------------- the start


def test_an_engine_that_cannot_be_built_fails_waiting_jobs_at_once() -> None:
    async def story(backend: LocalBackend) -> None:
        with pytest.raises(UnsupportedByModel, match="no such device"):
            await backend.generate(drawing())
        now = backend.capabilities()
        assert now.state == "unavailable"
        assert "take the CPU" in now.reason

    tell(story, scripted_backend("RefusingEngine"))


def test_start_raises_what_a_first_job_would_have_met() -> None:
    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineFailed, match="has no attribute 'NoSuchEngine'"):
            await backend.start()

    tell(story, scripted_backend("NoSuchEngine"))


def test_start_makes_the_process_ready() -> None:
    async def story(backend: LocalBackend) -> None:
        assert backend.capabilities().state == "idle"
        await backend.start()
        await backend.start()
        now = backend.capabilities()
        assert (now.state, now.facts["threads"]) == ("ready", 3)

    tell(story)


def test_an_engine_that_does_not_get_ready_in_time_is_ended() -> None:
    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineDied, match=r"was not ready within 0\.5 s"):
            await backend.generate(drawing())

    tell(story, scripted_backend("StuckEngine", start_deadline_s=0.5))


def test_the_deadline_of_the_start_is_none_for_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        backend = scripted_backend()
        await backend.start()
        loop = asyncio.get_running_loop()
        now_s = loop.time
        monkeypatch.setattr(loop, "time", lambda: now_s() + 1000)
        assert DRAWN_AGAIN not in (await backend.generate(drawing(steps=50))).warnings
        await backend.close()

    asyncio.run(story())


def test_closing_does_not_wait_for_an_engine_that_is_starting() -> None:
    async def story(backend: LocalBackend) -> None:
        task = asyncio.create_task(backend.generate(drawing()))
        await asyncio.sleep(0)  # the task has begun
        await backend.close()
        with pytest.raises(EngineDied, match="closed"):
            await task

    tell(story, scripted_backend("StuckEngine"))


def test_a_program_that_is_not_there_is_told() -> None:
    async def story(backend: LocalBackend) -> None:
        for _ in range(2):
            with pytest.raises(EngineFailed, match="/nowhere/python could not be started"):
                await backend.generate(drawing())

    tell(story, LocalBackend(EngineOptions(), command=["/nowhere/python"]))


OTHER_PROTOCOL = """
header = b'{"type":"ready","blobs":[],"protocol":99}'
os.write(1, len(header).to_bytes(4, "big") + header)
sys.stdin.buffer.read()
"""


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('hello', flush=True); sys.stdin.buffer.read()", "sent what is not a message .*no header length"),
        ("sys.exit('no room')", "ended with exit code 1 before it was ready; its last words: no room"),
        ("os.close(1); os.close(2); sys.stdin.buffer.read()", "closed its pipes and stayed"),
        (OTHER_PROTOCOL, "speaks protocol 99"),
    ],
)
def test_a_child_that_does_not_speak_our_language_is_ended(
    code: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdfleet.backends.process.EXIT_DEADLINE_S", 0.2)

    async def story(backend: LocalBackend) -> None:
        with pytest.raises(EngineDied, match=why):
            await backend.generate(drawing())

    tell(story, LocalBackend(EngineOptions(), command=program(code), env=child_environment()))


def test_garbage_in_the_middle_of_a_job_is_a_death(tmp_path: Path) -> None:
    """The first life answers a job with garbage, the second with an error."""
    marker = tmp_path / "lived"
    code = f"""
from sdfleet.engine.events import JobFailed
from sdfleet.errors import UnsupportedByModel
say = lambda report: os.writev(1, wire.encode(report))
say(wire.Ready())
job_id = wire.read_command(sys.stdin.buffer.read).drawing.job_id
if os.path.exists({str(marker)!r}):
    say(JobFailed(job_id=job_id, error=UnsupportedByModel('second life')))
else:
    open({str(marker)!r}, 'w').close()
    os.write(1, b'garbage!')
sys.stdin.buffer.read()
"""

    async def story(backend: LocalBackend) -> None:
        with pytest.raises(UnsupportedByModel, match="second life"):
            await backend.generate(drawing())

    tell(story, LocalBackend(EngineOptions(), command=program(code), env=child_environment()))


def test_a_broken_report_fails_its_job_only() -> None:
    code = """
from sdfleet.engine.events import JobFailed
from sdfleet.errors import UnsupportedByModel
say = lambda report: os.writev(1, wire.encode(report))
say(wire.Ready())
read = sys.stdin.buffer.read
first = wire.read_command(read).drawing.job_id
second = wire.read_command(read).drawing.job_id
h = ('{"type":"progress","blobs":[],"job_id":"' + first + '","step":"many"}').encode()
os.write(1, len(h).to_bytes(4, 'big') + h)
assert wire.read_command(read) == wire.Cancel(job_id=first)
say(JobFailed(job_id=second, error=UnsupportedByModel('undisturbed')))
read()
"""

    async def story(backend: LocalBackend) -> None:
        first = asyncio.create_task(backend.generate(drawing()))
        second = asyncio.create_task(backend.generate(drawing()))
        with pytest.raises(EngineFailed, match="made no sense"):
            await first
        with pytest.raises(UnsupportedByModel, match="undisturbed"):
            await second

    tell(story, LocalBackend(EngineOptions(), command=program(code), env=child_environment()))


# -------------------- the end

PARENT = """
import asyncio, sys
from tests.backends.drawings import endless, scripted_backend
async def main():
    backend = scripted_backend({arguments})
    await backend.generate(endless(), lambda _: print("drawing", flush=True))
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_no_process_outlives_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    """The engine holds a FIFO open for writing; its reader sees the end of file when the engine is gone."""
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    repository = Path(__file__).resolve().parents[2]
    environment = child_environment(ALIVE_FIFO=str(fifo))
    environment = {**environment, "PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{repository}"}
    command = [sys.executable, "-c", PARENT.format(arguments=f"env={dict(environment)!r}")]
    with (
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as parent,
        fifo.open("rb") as alive,
    ):
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"drawing\n"
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)  # as a terminal does
        else:
            parent.send_signal(number)
        parent.stdout.close()
        assert alive.read() == b""


def test_closing_ends_a_process_that_ignores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfleet.backends.local.TERMINATE_DEADLINE_S", 0.1)
    code = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.writev(1, wire.encode(wire.Ready()))
signal.pause()
"""
    backend = LocalBackend(EngineOptions(), command=program(code), env=child_environment(), close_deadline_s=0.1)

    async def story(local: LocalBackend) -> None:
        await local.start()
        await local.close()
        assert (local.pid, local.capabilities().state) == (None, "closed")

    tell(story, backend)


def test_a_child_that_only_knows_the_end_of_stdin_is_closed_in_peace() -> None:
    code = "os.writev(1, wire.encode(wire.Ready())); sys.stdin.buffer.read()"

    async def story(backend: LocalBackend) -> None:
        await backend.start()
        await backend.close()  # within the test's own deadline, so not by waiting out the one below
        assert (backend.pid, backend.capabilities().state) == (None, "closed")

    tell(story, LocalBackend(EngineOptions(), command=program(code), env=child_environment(), close_deadline_s=1000))


def test_the_engine_is_closed_in_peace(caplog: pytest.LogCaptureFixture) -> None:
    async def story(backend: LocalBackend) -> None:
        result: ImageResult = await backend.generate(drawing())
        assert result.timings_s["total"] == 1.0

    with caplog.at_level(logging.DEBUG, "sdfleet.backends"):
        tell(story)
    assert "scripted engine closed" in {getattr(record, "line", "") for record in caplog.records}
    assert "engine process ended" not in {record.message for record in caplog.records}
