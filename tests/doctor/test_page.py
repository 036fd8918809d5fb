"""docs/troubleshooting.md, which is made from the table."""

from __future__ import annotations

from pathlib import Path

from sdfleet.doctor.page import page
from sdfleet.doctor.table import ENTRIES

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_table_says() -> None:
    written = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert written == page(), "make docs"


def test_every_entry_has_its_place_and_its_cure_on_the_page() -> None:
    lines = page().splitlines()
    for entry in ENTRIES:
        assert lines.count(f"### {entry.id}") == 1
        assert any(line == f"- What mends it: {entry.cure}" for line in lines), entry.id


def test_commands_on_the_page_name_checks_that_there_are() -> None:
    import re

    named = set(re.findall(r"sdfleet doctor ([a-z][a-z0-9-]+)", page()))
    assert named - {entry.id for entry in ENTRIES} == set()
