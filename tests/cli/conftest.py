"""The command line in a room of its own: an empty data folder, no settings of the machine, made-up pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.catalog.folders import write_sd


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Answer]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder; it has one model, `toy`, 64x64."""
    for name in list(os.environ):  # noqa: TID251 - tests set the stage
        if name.startswith("SD_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("SD_HOME", str(folder))
    monkeypatch.setenv("SD_BACKEND", "fake")
    monkeypatch.setenv("SD_MODEL", "toy")
    monkeypatch.chdir(tmp_path)
    weights = write_sd(tmp_path / "weights", sample_size=8)
    (folder / "models").mkdir(parents=True)
    card = {"name": "toy", "family": "sd", "width_px": 64, "height_px": 64, "steps": 3, "guidance": 4.0}
    lines = [
        f"{key} = {json.dumps(value)}" for key, value in {**card, "sampler": "ddim", "folder": str(weights)}.items()
    ]
    (folder / "models/toy.toml").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(home: Path) -> Run:  # noqa: ARG001 - sets the stage
    """Run `sdfleet` with these arguments, in this process."""
    from sdfleet.cli.main import app

    def run(*arguments: str) -> Answer:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return Answer(code=done.exit_code, out=done.stdout, err=done.stderr)

    return run


def pictures_in(folder: Path) -> Sequence[Path]:
    """Every file under the folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
