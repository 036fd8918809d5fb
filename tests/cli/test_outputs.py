"""`sdfleet outputs`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sdfleet.domain import Drawing, FinishedPicture, ImageResult, Output, Picture
from sdfleet.storage.output_files import OutputFiles
from tests.cli.conftest import Run
from tests.storage.conftest import Clock, Stage, play_on

OLD_S = 1_000_000.0
# The year 2096: new for whoever runs this.
NEW_S = 4_000_000_000.0


def _finish(home: Path, made_s: float, name: str) -> Output:
    """A finished job of one picture, file and row."""
    clock = Clock(made_s)
    files = OutputFiles(home / "outputs", clock=clock)

    async def story(stage: Stage) -> Output:
        job = await stage.begun(job_id=name)
        drawing = Drawing(
            job_id=job.id, checkpoint="/w", family="sd", prompt="fox", negative_prompt="", width_px=8, height_px=8,
            steps=3, guidance=2.0, seed=5, n_images=1, sampler="ddim",
        )  # fmt: skip
        picture = FinishedPicture(picture=Picture(width_px=8, height_px=8, mode="RGB", data=bytes(192)), seed=5)
        result = ImageResult(job_id=job.id, model="toy", images=(picture,), drawing=drawing)
        (made,) = files.write(job, result)
        assert await stage.jobs.finish(replace(job, outputs=(made,)))
        return made

    return play_on(f"sqlite:///{home / 'sdfleet.db'}", story, clock=clock)


def test_finished_pictures_are_listed_newest_first_with_their_files(run: Run, home: Path) -> None:
    for name, made_s in (("a1", OLD_S), ("b2", NEW_S)):
        _finish(home, made_s, name)
    found = run("outputs", "list", "--json").json["outputs"]
    assert [one["id"] for one in found] == ["b2-0", "a1-0"]
    assert all(Path(one["file"]).is_file() for one in found)
    assert "b2-0" in run("outputs", "list", "--limit", "1").out
    assert "a1-0" not in run("outputs", "list", "--limit", "1").out


def test_pruning_deletes_what_is_older_and_no_file_of_others(run: Run, home: Path) -> None:
    old, new = _finish(home, OLD_S, "a1"), _finish(home, NEW_S, "b2")
    files = OutputFiles(home / "outputs")
    mine = files.path(old).parent / "holiday.png"
    mine.write_text("of the user")
    assert run("outputs", "prune", "--older-than", "7d", "--dry-run").out == "would delete 1 pictures, 0.0 MiB\n"
    assert files.path(old).is_file()
    assert run("outputs", "prune", "--older-than", "7d", "--json").json == {
        "n_files": 1,
        "n_bytes": old.n_bytes,
        "dry_run": False,
    }
    assert [files.path(old).exists(), files.path(new).exists(), mine.exists()] == [False, True, True]
    assert [one["id"] for one in run("outputs", "list", "--json").json["outputs"]] == ["b2-0"]


def test_du_says_what_the_pictures_take(run: Run, home: Path) -> None:
    assert run("outputs", "du", "--json").json["n_files"] == 0
    made = _finish(home, OLD_S, "a1")
    assert run("outputs", "du", "--json").json == {
        "folder": str(home / "outputs"),
        "n_files": 1,
        "n_bytes": made.n_bytes,
    }


@pytest.mark.parametrize("age", ["7", "d", "-7d", "7 d", "7y", "\N{ARABIC-INDIC DIGIT SEVEN}d", "1e9d", ""])
def test_an_age_we_do_not_read_deletes_nothing(run: Run, home: Path, age: str) -> None:
    made = _finish(home, OLD_S, "a1")
    answer = run("outputs", "prune", f"--older-than={age}")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert OutputFiles(home / "outputs").path(made).is_file()
