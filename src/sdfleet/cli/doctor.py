"""`sdfleet doctor`: what is wrong with this machine, and the command that mends it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdfleet.doctor.entry import Entry
    from sdfleet.doctor.examining import Examined

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "fault": "[red]FAULT[/]", "not_applicable": "[dim]-[/]"}


def doctor(
    *,
    checks: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECK]...", help="Only these; all of them if left out.")
    ] = None,
    network: Annotated[bool, typer.Option("--network", help="Also contact the hub of the settings.")] = False,
    model: Annotated[str | None, typer.Option(help="The model for hub-access; contacts the hub.")] = None,
    explain: Annotated[
        str | None, typer.Option(help="A message or traceback to find in the table; - reads it from stdin.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")] = False,
) -> None:
    """Look for what is known to go wrong, and say what mends it. Changes nothing.

    The exit code is 1 where something does not work, and 0 otherwise, warnings included. No hub is contacted unless
    --network, --model or one of its checks by name asks for it; a token never goes to a mirror.
    """
    with console.answering(as_json=as_json):
        if explain is not None:
            _explain(sys.stdin.read() if explain == "-" else explain, as_json=as_json)
            return
        has_fault = _examine(checks or [], network=network, model=model, as_json=as_json)
    if has_fault:
        raise typer.Exit(console.EXIT_FAULT)


def _examine(names: list[str], *, network: bool, model: str | None, as_json: bool) -> bool:
    """Whether something does not work; everything that was found is told."""
    from sdfleet import compose
    from sdfleet.doctor.examining import Examiner
    from sdfleet.doctor.machine import Machine
    from sdfleet.doctor.table import checks
    from sdfleet.settings import read_surroundings

    settings = console.start()
    if model is not None and not names:
        names = ["hub-access"]
    asked = checks(names)
    if model is not None and not any(entry.effort == "network" for entry in asked):
        asked = (*asked, *checks(["hub-access"]))
    # Who names a check that asks a hub, or a model to ask about, has agreed to it.
    may_ask_hub = network or model is not None or (bool(names) and any(e.effort == "network" for e in asked))
    if may_ask_hub:
        endpoint = settings.hf_endpoint if settings.hub == "hf" else settings.modelscope_endpoint
        console.note(f"contacts {endpoint}")
    machine = Machine(
        settings=settings,
        variables=read_surroundings(),
        may_ask_hub=may_ask_hub,
        asked_model=model,
        known=compose.catalog(settings),
    )
    with _Waiting(len(asked)) as waiting:
        found = Examiner().examine(machine, asked, on_done=waiting)
    if as_json:
        console.say_json({"verdict": _worst(found), "checks": [_facts(one) for one in found]})
    else:
        _tell(found, in_full=bool(names))
    return any(one.finding.verdict == "fault" for one in found)


class _Waiting:
    """How many checks are still out, on stderr, where somebody watches."""

    def __init__(self, n: int) -> None:
        self._left = n
        self._status: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._status = console.stderr_console().status(self._text())
            self._status.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, _one: Examined) -> None:
        self._left -= 1
        if self._status is not None:
            self._status.update(self._text())

    def _text(self) -> str:
        return f"{self._left} checks to go"


def _tell(found: Sequence[Examined], *, in_full: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sdfleet.settings import read_terminal

    terminal = read_terminal()
    # Off a terminal nothing is cut: whoever reads it there has no width of ours.
    width = terminal.columns if sys.stdout.isatty() else 200
    out = Console(no_color=not terminal.has_colour, highlight=False, width=width)
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    shown = [one for one in found if in_full or one.finding.verdict != "not_applicable"]
    for one in shown:
        table.add_row(one.entry.id, MARKS[one.finding.verdict], escape(one.finding.what))
        if in_full:
            table.add_row("", "", escape(one.entry.cause), style="dim")
        if one.cure:
            table.add_row("", "", f"-> {escape(one.cure)}")
    out.print(table)
    n_hidden = len(found) - len(shown)
    n = {verdict: sum(one.finding.verdict == verdict for one in found) for verdict in MARKS}
    console.note(
        f"{n['fault']} faults, {n['warning']} warnings, {n['ok']} ok"
        + (f"; {n_hidden} checks do not apply here (--json tells why)" if n_hidden else "")
    )


def _explain(text: str, *, as_json: bool) -> None:
    """Tell the entries that fit. Raises NotFound where none does."""
    from sdfleet.doctor.explaining import explain
    from sdfleet.errors import NotFound

    found = explain(text)
    if not found:
        raise NotFound(
            "nothing in the table fits this text",
            hint="paste the whole message, its last lines above all; `sdfleet doctor` looks at the machine itself",
        )
    if as_json:
        explanations = [
            {"id": one.entry.id, "title": one.entry.title, "found_by": one.by, "is_sure": one.is_sure,
             "cause": one.entry.cause, "cure": one.entry.cure, "check": _check_for(one.entry)}
            for one in found
        ]  # fmt: skip
        console.say_json({"explanations": explanations})
        return
    first, *others = found
    entry = first.entry
    console.say(f"{entry.title}  [{entry.id}]{'' if first.is_sure else '  (a guess, by its words)'}")
    console.say(f"  why:   {entry.cause}")
    console.say(f"  do:    {entry.cure}")
    if check := _check_for(entry):
        console.say(f"  check: {check}")
    if others:
        console.say(f"  or:    {', '.join(f'{one.entry.title} [{one.entry.id}]' for one in others)}")


def _check_for(entry: Entry) -> str:
    if entry.check is None and not entry.checked_by:
        return ""
    name = entry.id if entry.check is not None else entry.checked_by
    return f"sdfleet doctor {name}"


def _worst(found: Sequence[Examined]) -> str:
    verdicts = {one.finding.verdict for one in found}
    return next((verdict for verdict in ("fault", "warning") if verdict in verdicts), "ok")


def _facts(one: Examined) -> dict[str, Any]:
    return {
        "id": one.entry.id,
        "title": one.entry.title,
        "verdict": one.finding.verdict,
        "found": one.finding.what,
        "cause": one.entry.cause,
        "cure": one.cure,
        "spent_s": round(one.spent_s, 3),
    }
