"""The engine's process from outside: bytes in, bytes and an exit code out. No torch: see scripted_engine.py."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Sequence

from sdfleet.domain import JobId
from sdfleet.engine import wire
from sdfleet.engine.child import EXIT_FAULT
from sdfleet.engine.events import Event, JobDone, JobFailed
from sdfleet.errors import EngineFailed, JobCancelled, UnsupportedByModel
from tests.backends.drawings import child_command, child_environment, drawing
from tests.engine.test_wire import frame, read_reports, written

READY_FACTS: dict[str, object] = {"device": "scripted", "threads": None, "n_done": 0, "checkpoints": [], "pinned": []}


def run(stream: bytes, *more: str, engine: str = "ScriptedEngine") -> tuple[list[wire.Report], int, str]:
    """The reports, the exit code and stderr of a process whose stdin holds `stream` and then ends."""
    command = [*child_command(engine), *more]
    done = subprocess.run(command, input=stream, capture_output=True, env=child_environment(), timeout=60, check=False)
    return read_reports(done.stdout), done.returncode, done.stderr.decode()


def talk(stream: bytes, *, until: Sequence[bytes]) -> tuple[list[wire.Report], str]:
    """As `run`, but stdin stays open until one of some bytes was heard."""
    with subprocess.Popen(
        child_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(stream)
        process.stdin.flush()
        heard = b""
        while not any(each in heard for each in until) and (byte := process.stdout.read(1)):
            heard += byte
        process.stdin.close()
        return read_reports(heard + process.stdout.read()), process.stderr.read().decode()


def ends(reports: list[wire.Report]) -> list[Event]:
    return [report for report in reports if isinstance(report, JobDone | JobFailed)]


def test_the_end_of_stdin_ends_the_process_and_closes_the_engine() -> None:
    reports, code, stderr = run(b"")
    assert (reports, code) == ([wire.Ready(facts=READY_FACTS)], 0)
    assert "scripted engine closed" in stderr


def test_close_ends_the_process_with_jobs_unfinished() -> None:
    reports, code, _ = run(written(wire.Submit(drawing=drawing("endless", steps=9)), wire.Close()))
    assert code == 0
    assert ends(reports) == []


def test_options_reach_the_engine() -> None:
    reports, _, _ = run(b"", "--options", '{"n_threads": 5}')
    assert reports == [wire.Ready(facts={**READY_FACTS, "threads": 5})]


def test_a_refused_job_fails_with_the_error_of_the_engine() -> None:
    refused = drawing("refuse")
    reports, code, _ = run(written(wire.Submit(drawing=refused)))
    (failed,) = ends(reports)
    assert isinstance(failed, JobFailed)
    assert isinstance(failed.error, UnsupportedByModel)
    assert (failed.job_id, failed.error.hint, code) == (refused.job_id, "take another", 0)


def test_a_broken_command_fails_its_job_and_the_next_is_obeyed() -> None:
    bad = frame({"type": "submit", "blobs": [], "drawing": {"job_id": "bad"}})
    nobody = frame({"type": "dance", "blobs": []})
    refused = drawing("refuse")
    reports, code, stderr = run(bad + nobody + written(wire.Submit(drawing=refused)))
    failed = [(e.job_id, type(e.error)) for e in ends(reports) if isinstance(e, JobFailed)]
    assert failed == [(JobId("bad"), EngineFailed), (refused.job_id, UnsupportedByModel)]
    assert code == 0
    assert "a command made no sense" in stderr


def test_garbage_on_stdin_is_a_fault() -> None:
    reports, code, _ = run(b"GET / HTTP/1.1\r\n\r\n")
    assert code == EXIT_FAULT
    assert isinstance(reports[-1], wire.Fault)
    assert "is no header length" in reports[-1].error.message


def test_an_engine_that_cannot_be_imported_is_a_fault_with_a_hint() -> None:
    reports, code, _ = run(b"", "--engine", "no_such_module:Engine")
    (fault,) = reports
    assert isinstance(fault, wire.Fault)
    assert (code, type(fault.error)) == (EXIT_FAULT, EngineFailed)
    assert "No module named 'no_such_module'" in fault.error.message
    assert "install" in fault.error.hint


def test_an_engine_that_cannot_be_built_is_a_fault_with_its_own_error() -> None:
    reports, code, _ = run(b"", engine="RefusingEngine")
    (fault,) = reports
    assert isinstance(fault, wire.Fault)
    assert (code, type(fault.error), fault.error.hint) == (EXIT_FAULT, UnsupportedByModel, "take the CPU")


def test_an_exception_that_escapes_a_step_is_a_fault() -> None:
    with subprocess.Popen(
        child_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment()
    ) as process:
        assert process.stdin is not None
        process.stdin.write(written(wire.Submit(drawing=drawing("raise"))))
        process.stdin.flush()  # and stdin stays open
        assert process.stdout is not None
        assert process.stderr is not None
        fault = read_reports(process.stdout.read())[-1]
        assert isinstance(fault, wire.Fault)
        assert fault.error.message == "the engine's process met a fault: RuntimeError: boom"
        assert b"Traceback" in process.stderr.read()
    assert process.returncode == EXIT_FAULT


def test_what_a_library_prints_does_not_come_between_frames() -> None:
    printing = drawing("print")
    reports, stderr = talk(written(wire.Submit(drawing=printing)), until=[b'"job_done"'])
    assert [e.job_id for e in ends(reports)] == [printing.job_id]
    assert all(said in stderr for said in ("a library says hello", "and so does its C code", "and its process"))


def test_facts_are_sent_again_when_a_job_changed_them() -> None:
    stream = written(wire.Submit(drawing=drawing(steps=1)), wire.Submit(drawing=drawing("refuse")))
    reports, _ = talk(stream, until=[b'"job_done"'])
    assert [report for report in reports if isinstance(report, wire.Facts)][-1] == wire.Facts(
        facts={**READY_FACTS, "n_done": 1, "checkpoints": ["toy"]}
    )


def test_whoever_hears_that_a_checkpoint_came_or_left_has_heard_the_facts_before() -> None:
    loading, unload = drawing(steps=1, n_images=0), wire.Unload(job_id=JobId("u"), checkpoint="toy")
    reports, _ = talk(written(wire.Submit(drawing=loading)), until=[b'"job_done"'])
    told = [report for report in reports if isinstance(report, wire.Facts | JobDone)]
    assert [getattr(report, "job_id", "facts") for report in told] == ["facts", loading.job_id]
    reports, _ = talk(written(unload), until=[b'"job_done"'])
    assert isinstance(reports[-1], JobDone)
    assert reports[-1].job_id == unload.job_id


def test_a_job_whose_event_cannot_be_sent_fails_and_is_stopped() -> None:
    stream = written(wire.Submit(drawing=drawing("infinite")))
    reports, _ = talk(stream, until=[b'"cancelled"', b'"job_done"'])
    assert [type(e.error) for e in ends(reports) if isinstance(e, JobFailed)] == [EngineFailed, JobCancelled]


def test_the_sync_reader_and_the_async_reader_agree_on_eof() -> None:
    assert wire.read_command(io.BytesIO(b"").read) is None
    assert read_reports(b"") == []
