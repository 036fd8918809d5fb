"""Many checks at once, and what becomes of one that hangs or falls over."""

from __future__ import annotations

import threading
from pathlib import Path

from sdfleet.doctor.entry import Check, Effort, Entry, fault, ok
from sdfleet.doctor.examining import Examiner
from sdfleet.doctor.machine import Machine
from sdfleet.errors import StorageError
from tests.doctor.stage import machine


def _entry(name: str, check: Check, *, limit_s: float = 30.0, effort: Effort = "quick") -> Entry:
    return Entry(
        id=name, title=name, symptoms=(), cause="", cure="the entry's cure", check=check, limit_s=limit_s, effort=effort
    )


def test_answers_come_in_the_order_of_the_entries(tmp_path: Path) -> None:
    names = [f"check-{n}" for n in range(20)]
    entries = [_entry(name, lambda _machine, name=name: ok(name)) for name in names]  # type: ignore[misc]
    assert [one.finding.what for one in Examiner().examine(machine(tmp_path), entries)] == names


def test_checks_run_side_by_side(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=30.0)

    def meet(_machine: Machine) -> object:
        both.wait()
        return ok("met")

    entries = [_entry(name, meet) for name in ("a", "b")]  # type: ignore[arg-type]
    assert {one.finding.what for one in Examiner().examine(machine(tmp_path), entries)} == {"met"}


def test_a_check_that_hangs_is_told_and_neither_waited_for_nor_begun_again(tmp_path: Path) -> None:
    go_on, begun = threading.Event(), []

    def hang(_machine: Machine) -> object:
        begun.append(1)
        go_on.wait(60.0)
        return ok("late")

    entries = [_entry("hangs", hang, limit_s=0.05), _entry("well", lambda _machine: ok("well"))]  # type: ignore[arg-type]
    examiner = Examiner()
    for _ in range(2):
        hangs, well = examiner.examine(machine(tmp_path), entries)
        assert (hangs.finding.verdict, well.finding.verdict) == ("warning", "ok")
        assert "no answer within" in hangs.finding.what
    assert begun == [1]
    stuck = next(thread for thread in threading.enumerate() if thread.name == "sdfleet-doctor hangs")
    assert stuck.daemon, "the program could not end before it"
    go_on.set()
    stuck.join(30.0)
    assert examiner.examine(machine(tmp_path), entries[:1])[0].finding.what == "late"


def test_a_check_that_falls_over_says_so_and_hides_no_other(tmp_path: Path) -> None:
    def fall(_machine: Machine) -> object:
        raise ZeroDivisionError("by zero")

    entries = [_entry("falls", fall), _entry("well", lambda _machine: ok("well"))]  # type: ignore[arg-type]
    falls, well = Examiner().examine(machine(tmp_path), entries)
    assert falls.finding.what == "the check itself failed: ZeroDivisionError: by zero"
    assert well.finding.verdict == "ok"


def test_our_own_error_is_a_fault_with_its_own_hint(tmp_path: Path) -> None:
    def refuse(_machine: Machine) -> object:
        raise StorageError("it is damaged", hint="restore it")

    (one,) = Examiner().examine(machine(tmp_path), [_entry("refuses", refuse)])  # type: ignore[arg-type]
    assert (one.finding.verdict, one.finding.what, one.cure) == ("fault", "it is damaged", "restore it")


def test_what_mends_it_is_the_findings_own_or_else_the_entrys(tmp_path: Path) -> None:
    entries = [
        _entry("own", lambda _machine: fault("x", "its own")),
        _entry("entrys", lambda _machine: fault("x")),
        _entry("well", lambda _machine: ok("x")),
    ]
    found = Examiner().examine(machine(tmp_path), entries)
    assert [one.cure for one in found] == ["its own", "the entry's cure", ""]
