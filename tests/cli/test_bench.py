"""`sdfleet bench` from the outside: what it refuses at once, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdfleet.catalog import architectures
from tests.cli.conftest import Run


def test_architectures_are_listed_by_name(run: Run) -> None:
    told = run("bench", "--architecture", "list").out
    assert all(name in told for name in architectures.names())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["toy", "--architecture", "sd15"], "a model was named too"),
        (["--no-text-encoders"], "use it with --architecture"),
        (["--plot", "curve.pdf"], "neither .svg nor .png"),
        (["--architecture", "sd16"], "sd15"),
        (["nobody"], "nobody"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(run: Run, options: list[str], part: str) -> None:
    answer = run("bench", *options)
    assert (answer.code, answer.err.count("\n"), part in answer.err) == (2, 1, True)


def test_a_model_can_be_named_and_its_curve_saved(run: Run, tmp_path: Path) -> None:
    answer = run("bench", "toy", "--rows", "1,2", "--runs", "1", "--steps", "2", "--plot", "curve.svg", "--json")
    assert (answer.code, answer.json["model"], answer.json["weights"]) == (0, "toy", "checkpoint")
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")


def test_an_estimate_is_told_apart_from_what_was_measured(run: Run) -> None:
    options = ("--rows", "1", "--runs", "1", "--steps", "40", "--one-step")
    assert "estimated, not measured: 64x64, 1 rows, 40 steps" in run("bench", *options).out
    (timing,) = run("bench", *options, "--json").json["timings"]
    assert (timing["steps"], timing["estimate"]["steps"]) == (1, 40)


def test_an_architecture_needs_no_checkpoint_and_leaves_none(run: Run, home: Path) -> None:
    before = json.dumps(sorted(str(path) for path in home.rglob("*")))
    answer = run("bench", "--architecture", "sd15", "--no-text-encoders", "--rows", "1", "--runs", "1", "--json")
    told = answer.json
    assert (told["model"], told["weights"], told["text_encoders"]) == ("sd15", "random", "light")
    assert json.dumps(sorted(str(path) for path in home.rglob("*"))) == before
