"""Runs checks side by side, each with its own limit: one that hangs is told as hanging, and nobody waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, warning
from sdfleet.doctor.machine import Machine
from sdfleet.errors import SdfleetError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """One check's answer."""

    entry: Entry
    finding: Finding
    spent_s: float

    @property
    def cure(self) -> str:
        """The command that mends it; empty where nothing is wrong and nothing is to be gained."""
        is_bad = self.finding.verdict in {"warning", "fault"}
        return self.finding.cure or (self.entry.cure if is_bad else "")


class Examiner:
    """Examines as often as asked. A check of an earlier time that still hangs is not begun a second time."""

    def __init__(self) -> None:
        self._hanging: dict[str, threading.Thread] = {}

    def examine(
        self, machine: Machine, entries: Iterable[Entry], *, on_done: Callable[[Examined], None] | None = None
    ) -> tuple[Examined, ...]:
        """The answer of every entry that has a check, in the entries' order. Blocks for the longest limit at most.

        on_done: called with each answer as it comes, in this thread.
        """
        asked = [entry for entry in entries if entry.check is not None]
        answers: SimpleQueue[Examined] = SimpleQueue()
        self._hanging = {name: thread for name, thread in self._hanging.items() if thread.is_alive()}
        done: dict[str, Examined] = {}

        def note(answer: Examined) -> None:
            done[answer.entry.id] = answer
            if on_done is not None:
                on_done(answer)

        begun_s = time.monotonic()
        for entry in asked:
            if entry.id in self._hanging:
                note(_hangs(entry, 0.0))
                continue
            # A daemon: the program may end while a dead network disk still keeps a check waiting.
            thread = threading.Thread(
                target=_answer, args=(machine, entry, answers), name=f"sdfleet-doctor {entry.id}", daemon=True
            )
            self._hanging[entry.id] = thread
            thread.start()
        while waiting := [entry for entry in asked if entry.id not in done]:
            spent_s = time.monotonic() - begun_s
            for entry in waiting:
                if spent_s > entry.limit_s:
                    note(_hangs(entry, spent_s))
            left_s = min(entry.limit_s for entry in waiting) - spent_s
            try:
                answer = answers.get(timeout=max(0.01, left_s))
            except Empty:
                continue
            if answer.entry.id not in done:
                note(answer)
        return tuple(done[entry.id] for entry in asked)


def _answer(machine: Machine, entry: Entry, answers: SimpleQueue[Examined]) -> None:
    assert entry.check is not None
    begun_s = time.monotonic()
    try:
        if entry.effort == "network" and not machine.may_ask_hub:
            finding = not_applicable("it would contact a hub: sdfleet doctor --network")
        else:
            finding = entry.check(machine)
    except SdfleetError as exc:
        finding = fault(exc.message, exc.hint)
    except Exception as exc:
        # One check that falls over must not hide what the others found.
        log.exception("a check failed", extra={"check": entry.id})
        finding = warning(f"the check itself failed: {type(exc).__name__}: {exc}", "report this; it is a fault of ours")
    answers.put(Examined(entry=entry, finding=finding, spent_s=time.monotonic() - begun_s))


def _hangs(entry: Entry, spent_s: float) -> Examined:
    what = f"no answer within {entry.limit_s:.0f} s: the disk, the device or the network that it looks at hangs"
    return Examined(entry=entry, finding=warning(what), spent_s=spent_s)
