"""Finished pictures on disk."""

from __future__ import annotations

import errno
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from sdfleet.domain import Drawing, FinishedPicture, ImageResult, JobId, Picture
from sdfleet.errors import InvalidValue, OutputNotWritable
from sdfleet.storage.outputs import OutputPlan, plan, save
from sdfleet.storage.pictures import Format, read_metadata

TODAY = date(2026, 11, 20)


def _result(n_images: int = 1, *, resized_to: tuple[int, int] | None = None) -> ImageResult:
    drawing = Drawing(
        job_id=JobId("job1"), checkpoint="/w", family="sd", prompt="fox", negative_prompt="", width_px=8, height_px=8,
        steps=3, guidance=2.0, seed=5, n_images=n_images, sampler="ddim", resize_to=resized_to,
    )  # fmt: skip
    width_px, height_px = resized_to or (8, 8)
    picture = Picture(width_px=width_px, height_px=height_px, mode="RGB", data=bytes(width_px * height_px * 3))
    images = tuple(FinishedPicture(picture=picture, seed=5 + i) for i in range(n_images))
    return ImageResult(job_id=JobId("job1"), model="toy", images=images, drawing=drawing, device="cpu", dtype="float32")


def _plan(output: str | None, tmp_path: Path, *, n: int = 1, format: Format | None = None) -> OutputPlan:
    return plan(output, format=format, n_images=n, default_folder=tmp_path / "outputs", today=TODAY)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_unnamed_pictures_go_into_a_folder_of_the_day(tmp_path: Path) -> None:
    saved = save(_result(2), _plan(None, tmp_path))
    folder = tmp_path / "outputs/2026-11-20"
    assert [one.path for one in saved] == [folder / "job1-0-5.png", folder / "job1-1-6.png"]
    assert _names(folder) == ["job1-0-5.png", "job1-1-6.png"]


def test_a_named_file_is_written_and_an_older_one_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("old")
    (saved,) = save(_result(), _plan(str(tmp_path / "x.png"), tmp_path))
    assert saved.path.read_bytes().startswith(b"\x89PNG")
    assert saved.n_bytes == saved.path.stat().st_size


def test_several_pictures_are_numbered_from_the_name(tmp_path: Path) -> None:
    save(_result(2), _plan(str(tmp_path / "x.webp"), tmp_path, n=2))
    assert _names(tmp_path) == ["x-1.webp", "x-2.webp"]


def test_numbered_pictures_replace_nothing(tmp_path: Path) -> None:
    (tmp_path / "x-2.png").write_text("old")
    with pytest.raises(OutputNotWritable, match="exists already"):
        _plan(str(tmp_path / "x.png"), tmp_path, n=2)
    assert _names(tmp_path) == ["x-2.png"]


def test_a_file_that_appeared_while_drawing_is_not_replaced(tmp_path: Path) -> None:
    planned = _plan(str(tmp_path / "x.png"), tmp_path, n=2)
    (tmp_path / "x-2.png").write_text("theirs")
    with pytest.raises(OutputNotWritable):
        save(_result(2), planned)
    assert _names(tmp_path) == ["x-2.png"]
    assert (tmp_path / "x-2.png").read_text() == "theirs"


@pytest.mark.parametrize("output", ["made/", "there"])
def test_a_folder_can_be_named(tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    (saved,) = save(_result(), _plan(output, tmp_path, format="jpeg"))
    assert saved.path == tmp_path / output / "job1-0-5.jpg"


@pytest.mark.parametrize("output", ["x.tiff", "x", ".png", "x.png.exe", "", "  ", "a\0.png"])
def test_an_unknown_extension_is_told_before_drawing(tmp_path: Path, output: str) -> None:
    with pytest.raises(InvalidValue):
        _plan(output and f"{tmp_path}/{output}" if output.strip() else output, tmp_path)


def test_a_format_that_contradicts_the_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="not a name for png"):
        _plan(str(tmp_path / "x.jpg"), tmp_path, format="png")


def test_a_missing_folder_is_told_before_drawing(tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritable, match="there is no folder"):
        _plan(str(tmp_path / "no/x.png"), tmp_path)


def test_a_folder_that_cannot_be_made_is_told_before_drawing(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file in the way")
    with pytest.raises(OutputNotWritable):
        _plan(None, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told_before_drawing(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputNotWritable):
        _plan(str(tmp_path / "locked/x.png"), tmp_path)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = _plan(str(tmp_path / "x.png"), tmp_path, n=3)
    n_synced = 0

    def fsync(_: int) -> None:
        nonlocal n_synced
        n_synced += 1
        if n_synced == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputNotWritable, match="No space left"):
        save(_result(3), planned)
    assert _names(tmp_path) == []


def test_a_rename_that_fails_takes_back_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = _plan(str(tmp_path / "x.png"), tmp_path, n=2)
    link = os.link

    def failing(source: Any, target: Any) -> None:
        if str(target).endswith("x-2.png"):
            raise FileExistsError(errno.EEXIST, "File exists")
        link(source, target)

    monkeypatch.setattr(os, "link", failing)
    with pytest.raises(OutputNotWritable):
        save(_result(2), planned)
    assert _names(tmp_path) == []


def test_a_file_system_without_hard_links_is_served_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save(_result(2), _plan(str(tmp_path / "x.png"), tmp_path, n=2))
    assert _names(tmp_path) == ["x-1.png", "x-2.png"]


def test_each_picture_says_how_to_draw_it_alone(tmp_path: Path) -> None:
    saved = save(_result(2, resized_to=(16, 24)), _plan(None, tmp_path), sampler_label="DDIM")
    found = read_metadata(saved[1].path.read_bytes())
    assert found is not None
    assert (found.prompt, found.seed, found.steps, found.guidance, found.sampler) == ("fox", 6, 3, 2.0, "ddim")
    assert (found.width_px, found.height_px, found.drawn_width_px, found.drawn_height_px) == (16, 24, 8, 8)
    assert (found.model, found.task, found.job_id, found.image_index) == ("toy", "txt2img", "job1", 1)


def test_a_saved_picture_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (saved,) = save(_result(), _plan(None, tmp_path))
    plain = tmp_path / "plain"
    plain.touch()
    assert saved.path.stat().st_mode == plain.stat().st_mode
