"""An entry of the doctor's table: what a person sees, why it happens, how it is looked for, and what mends it.

`sdfleet doctor`, `/dashboard/api/health`, `sdfleet doctor --explain` and docs/troubleshooting.md all read this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sdfleet.doctor.machine import Machine

# not_applicable: there is nothing to look at here, or nobody gave leave to look; the finding says which.
Verdict = Literal["ok", "warning", "fault", "not_applicable"]
# quick: within a second on a healthy machine, and without a process of its own. network: asks a hub.
Effort = Literal["quick", "slow", "network"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. cure: the command that mends it here; the entry's own where empty, a hint beside an `ok`."""

    verdict: Verdict
    what: str
    cure: str = ""


Check = Callable[[Machine], Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that goes wrong.

    symptoms: what is seen, in words that people search for. looks: how the check sees it. check: None where nothing
    can be looked at beforehand; `checked_by` then names the entry whose check would meet it, if there is one.
    signs: regular expressions, case aside, that its messages fit, ours and other libraries'. codes: of our errors.
    limit_s: a check that takes longer is given up and told as a warning.
    """

    id: str
    title: str
    symptoms: tuple[str, ...]
    cause: str
    cure: str
    looks: str = ""
    check: Check | None = None
    checked_by: str = ""
    effort: Effort = "quick"
    limit_s: float = 5.0
    signs: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()


def ok(what: str, hint: str = "") -> Finding:
    """Nothing is wrong."""
    return Finding("ok", what, hint)


def warning(what: str, cure: str = "") -> Finding:
    """It draws, but worse than it could, or not for much longer."""
    return Finding("warning", what, cure)


def fault(what: str, cure: str = "") -> Finding:
    """Something does not work, or should not be as it is."""
    return Finding("fault", what, cure)


def not_applicable(why: str) -> Finding:
    """Nothing to look at here."""
    return Finding("not_applicable", why)
