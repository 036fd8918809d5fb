"""What the README tells people to type is typed here, in a folder of its own, in the README's order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"(?:<!--\s*skip:\s*(?P<skip>[^>]*?)\s*-->\s*\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
# A command of the README draws a few pictures at most; this only stops a hang.
DEADLINE_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block of a page; `skip` is the reason why it is not run, or empty."""

    line: int
    kind: str
    text: str
    skip: str


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a Markdown page, in order."""
    return [
        Block(
            line=page.count("\n", 0, found.start("text")),
            kind=found["kind"],
            text=found["text"],
            skip=found["skip"] or "",
        )
        for found in FENCE.finditer(page)
    ]


BLOCKS = blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))
TYPED = [block for block in BLOCKS if block.kind in {"bash", "sh", "shell", "python"}]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all blocks share, so that a later one can use what an earlier one made."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", TYPED, ids=lambda block: f"line-{block.line}")
def test_readme_block_works_as_written(block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.skip:
        pytest.skip(block.skip)
    if block.kind != "python" and re.match(r"\s*make\b", block.text):
        assert set(re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE)) <= _make_targets()
        return
    if block.kind == "python":
        command = [sys.executable, "-c", block.text]
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.text]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("SD_HOME", str(desk / "home"))
    monkeypatch.setenv("SD_THREADS", "1")  # threads that outnumber the free cores wait for each other, for minutes
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, f"README.md line {block.line}:\n{block.text}\n{done.stdout}\n{done.stderr}"


def test_readme_has_blocks_to_run() -> None:
    """Guards the reader above: a fence it does not understand would pass in silence."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(BLOCKS) == page.count("\n```") // 2
    assert any(block.kind == "bash" and "sdfleet" in block.text and not block.skip for block in BLOCKS)


def test_every_linked_file_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert missing == []


def test_makefile_explains_every_target_a_person_types() -> None:
    assert {"demo", "test", "check", "bench", "starter", "clean"} <= _make_targets()


def _make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
