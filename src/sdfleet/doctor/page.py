"""docs/troubleshooting.md, from the same table that the checks are in."""

from __future__ import annotations

from sdfleet.doctor.entry import Entry
from sdfleet.doctor.table import ENTRIES, GROUPS

_HEAD = """# Troubleshooting

`sdfleet doctor` looks at this machine and says what is wrong and what mends it; it changes nothing.
`sdfleet doctor --network` also asks the hub, and `sdfleet doctor hub-access --model NAME` whether it would give a
model.
For a message, yours or another program's: `sdfleet doctor --explain "the message"`, or pipe a whole traceback into
`sdfleet doctor --explain -`. The server tells the quick ones at `GET /dashboard/api/health`.

This page is made from the table in `src/sdfleet/doctor/` (`make docs`).
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [_HEAD, "| you see | look at |", "|---|---|"]
    parts += [f"| {_cell(', '.join(entry.symptoms))} | [{entry.id}](#{entry.id}) |" for entry in ENTRIES]
    for title, entries in GROUPS:
        parts += ["", f"## {title}"]
        for entry in entries:
            parts += ["", *_section(entry)]
    return "\n".join(parts) + "\n"


def _section(entry: Entry) -> list[str]:
    told = [f"### {entry.id}", "", f"**{entry.title}.** {entry.cause}", ""]
    told.append(f"- What mends it: {_code(entry.cure)}")
    if entry.looks:
        beside = {"quick": "", "slow": "", "network": "; with `--network` only"}[entry.effort]
        told.append(f"- How `sdfleet doctor {entry.id}` sees it: {_code(entry.looks)}{beside}.")
    elif entry.checked_by:
        told.append(f"- Met by `sdfleet doctor {entry.checked_by}`.")
    if entry.codes:
        told.append(f"- Codes in answers: {', '.join(f'`{code}`' for code in entry.codes)}")
    return told


def _code(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")


def _cell(text: str) -> str:
    return _code(" ".join(text.split()))
