"""The files of finished pictures: whole, found by id alone, and nothing else is touched."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdfleet.domain import Drawing, FinishedPicture, ImageResult, Job, JobId, Output, OutputId, Picture, PictureFormat
from sdfleet.errors import InvalidValue, NotFound, OutputNotWritable
from sdfleet.storage.output_files import OutputFiles
from sdfleet.storage.pictures import decode, read_metadata
from tests.storage.conftest import Clock, submit

# 2026-11-21 23:59:59 UTC: another day already in half of the world.
NOW = Clock(1795305599.0)


def _job(**asked: Any) -> Job:
    return Job(id=JobId("a1"), submission=submit(**asked), state="running", created_s=1.0)


def _result(n_images: int = 1, *, side_px: int = 64) -> ImageResult:
    drawing = Drawing(
        job_id=JobId("a1"), checkpoint="/w", family="sd", prompt="fox", negative_prompt="", width_px=side_px,
        height_px=side_px, steps=3, guidance=2.0, seed=5, n_images=n_images, sampler="ddim",
    )  # fmt: skip
    data = bytes(i * 7 % 256 for i in range(side_px * side_px * 3))
    picture = Picture(width_px=side_px, height_px=side_px, mode="RGB", data=data)
    images = tuple(FinishedPicture(picture=picture, seed=5 + i) for i in range(n_images))
    return ImageResult(job_id=JobId("a1"), model="toy", images=images, drawing=drawing)


def _files(tmp_path: Path) -> OutputFiles:
    return OutputFiles(tmp_path / "outputs", clock=NOW)


def _all(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _never(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_pictures_are_named_by_id_and_day_alone(tmp_path: Path) -> None:
    files = _files(tmp_path)
    made = files.write(_job(prompt="../../etc/passwd", label="../x"), _result(2))
    assert _all(files.folder) == ["2026-11-21/a1-0.png", "2026-11-21/a1-1.png"]
    assert [(one.id, one.index, one.seed) for one in made] == [("a1-0", 0, 5), ("a1-1", 1, 6)]
    assert [one.n_bytes for one in made] == [files.path(one).stat().st_size for one in made]


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
def test_a_file_holds_what_is_needed_to_draw_it_again(tmp_path: Path, format_: PictureFormat) -> None:
    files = _files(tmp_path)
    made = files.write(_job(format=format_), _result(2))
    data = files.read(made[1])
    metadata = read_metadata(data)
    assert metadata is not None
    assert (metadata.prompt, metadata.seed, metadata.image_index, made[1].format) == ("fox", 6, 1, format_)
    assert (decode(data).width_px, made[1].width_px) == (64, 64)


def test_the_quality_asked_for_is_used(tmp_path: Path) -> None:
    files = _files(tmp_path)
    sizes = [files.write(_job(format="jpeg", quality=quality), _result())[0].n_bytes for quality in (5, None)]
    assert sizes[0] < sizes[1]


def test_a_second_attempt_replaces_the_files_of_the_first(tmp_path: Path) -> None:
    files = _files(tmp_path)
    first = files.write(_job(), _result(side_px=32))
    (second,) = files.write(_job(), _result())
    assert _all(files.folder) == ["2026-11-21/a1-0.png"]
    assert files.read(second) == files.read(first[0])
    assert second.width_px == 64


def test_all_pictures_are_written_or_none(tmp_path: Path) -> None:
    files = _files(tmp_path)
    (files.folder / "2026-11-21/a1-2.png").mkdir(parents=True)
    with pytest.raises(OutputNotWritable, match="cannot be written") as caught:
        files.write(_job(), _result(3))
    assert caught.value.hint
    assert _all(files.folder) == []


def test_files_and_their_folder_are_on_the_disk_before_write_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", _never)
    with pytest.raises(OutputNotWritable, match="No space left"):
        _files(tmp_path).write(_job(), _result())


def test_the_folder_of_new_names_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfleet.storage.output_files._sync_folder", _never)
    with pytest.raises(OutputNotWritable, match="No space left"):
        _files(tmp_path).write(_job(), _result())
    assert _all(tmp_path) == []


@pytest.mark.parametrize(
    "output_id", ["../../x", "a1-0/..", "a1", "", "a1-0.png", "A1-0", "a1-٣", "a1-0\n", "/etc/passwd", "a1-99999", "\0"]
)
def test_an_id_we_did_not_make_leads_to_no_path(tmp_path: Path, output_id: str) -> None:
    made = _output(id=OutputId(output_id))
    files = _files(tmp_path)
    for use in (files.path, files.read, files.thumbnail, files.delete):
        with pytest.raises(InvalidValue, match="no id of a picture"):
            use(made)


def test_a_thumbnail_is_small_and_made_once(tmp_path: Path) -> None:
    files = _files(tmp_path)
    (made,) = files.write(_job(), _result())
    small = files.thumbnail(made, side_px=16)
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.size) == ("WEBP", (16, 16))
    kept = files.folder / ".thumbnails/2026-11-21/a1-0-16.webp"
    kept.write_bytes(b"kept")
    assert files.thumbnail(made, side_px=16) == b"kept"
    with pytest.raises(InvalidValue, match="side"):
        files.thumbnail(made, side_px=100_000)


def test_a_thumbnail_does_not_outlive_its_picture(tmp_path: Path) -> None:
    files = _files(tmp_path)
    (made,) = files.write(_job(), _result())
    files.thumbnail(made)
    files.path(made).unlink()
    with pytest.raises(NotFound, match="is gone"):
        files.thumbnail(made)


def test_a_damaged_picture_has_no_thumbnail(tmp_path: Path) -> None:
    files = _files(tmp_path)
    (made,) = files.write(_job(), _result())
    files.path(made).write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    with pytest.raises(NotFound, match="damaged"):
        files.thumbnail(made)


def test_a_picture_is_deleted_with_its_thumbnails_and_nothing_else(tmp_path: Path) -> None:
    files = _files(tmp_path)
    _, gone, *_ = files.write(_job(), _result(11))
    files.thumbnail(gone)
    ten = replace(gone, id=OutputId("a1-10"))
    files.thumbnail(ten)
    (files.folder / "2026-11-21/mine.png").write_text("of the user")
    assert files.delete(gone)
    assert not files.delete(gone)
    left = _all(files.folder)
    assert "2026-11-21/a1-1.png" not in left
    assert ".thumbnails/2026-11-21/a1-1-256.webp" not in left
    assert {"2026-11-21/mine.png", "2026-11-21/a1-10.png", ".thumbnails/2026-11-21/a1-10-256.webp"} <= set(left)


def test_the_folder_of_a_day_goes_with_its_last_picture(tmp_path: Path) -> None:
    files = _files(tmp_path)
    (made,) = files.write(_job(), _result())
    files.thumbnail(made)
    files.delete(made)
    assert list(files.folder.iterdir()) == []


def test_usage_counts_our_pictures_alone(tmp_path: Path) -> None:
    files = _files(tmp_path)
    assert (files.usage().n_files, files.usage().n_bytes) == (0, 0)
    made = files.write(_job(), _result(2))
    files.thumbnail(made[0])
    (files.folder / "2026-11-21/mine.png").write_text("of the user")
    (files.folder / "2026-11-21/a1-7.png").symlink_to(files.path(made[0]))
    (files.folder / "notes").mkdir()
    usage = files.usage()
    assert (usage.n_files, usage.n_bytes) == (2, sum(one.n_bytes for one in made))


def _output(**facts: Any) -> Output:
    defaults: dict[str, Any] = {
        "id": "a1-0", "job_id": "a1", "index": 0, "seed": 5, "width_px": 64, "height_px": 64, "format": "png",
        "n_bytes": 1, "created_s": NOW.now_s,
    }  # fmt: skip
    return Output(**{**defaults, **facts})
