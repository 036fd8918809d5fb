"""What the runtime gives out of what a backend drew, by the verdict of the model's safety checker."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sdfleet.backends.base import OnProgress
from sdfleet.backends.fake import FakeBackend
from sdfleet.catalog.cards import Card
from sdfleet.catalog.identify import identify
from sdfleet.catalog.store import BuiltIn, Catalog
from sdfleet.domain import (
    Drawing,
    ImageRequest,
    ImageResult,
    Progress,
    SafetyChecker,
    SafetyVerdict,
    Withheld,
)
from sdfleet.errors import BrokenCheckpoint, ContentWithheld
from sdfleet.runtime import Runtime
from sdfleet.storage.outputs import OutputPlan, save
from sdfleet.storage.pictures import read_metadata
from tests.catalog.folders import safetensors, write_sd

CARD = Card(name="toy", family="sd", width_px=64, height_px=64, steps=3, guidance=3.0, sampler="ddim")


def _folder(tmp_path: Path, *, checker: str = "model.safetensors") -> Path:
    """A checkpoint whose index names a safety checker, with this file of it; "" leaves its folder out."""
    folder = write_sd(tmp_path / "toy")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    if checker:
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker/config.json").write_text("{}")
        (folder / "safety_checker" / checker).write_bytes(safetensors({"concept_embeds": (17, 4)}))
    return folder


def _flags_odd(drawing: Drawing, index: int) -> SafetyVerdict:
    if drawing.safety_checker == "off":
        return "off"
    return "flagged" if (drawing.seed + index) % 2 else "passed"


def _runtime(folder: Path, **more: Any) -> Runtime:
    catalog = Catalog(folder.parent / "models", built_in=(BuiltIn(CARD, lambda: folder),))
    return Runtime(catalog=catalog, backend=FakeBackend(verdict=_flags_odd), **more)


def _generate(runtime: Runtime, *, seen: list[Progress] | None = None, **asked: Any) -> ImageResult:
    request = ImageRequest(**{"prompt": "fox", "model": "toy", "seed": 4, **asked})
    on_progress = None if seen is None else seen.append
    return asyncio.run(runtime.generate(request, on_progress=on_progress, wants_previews=True))


def test_flagged_pictures_are_taken_out_and_the_others_keep_their_places(tmp_path: Path) -> None:
    result = _generate(_runtime(_folder(tmp_path)), n_images=4)

    assert [(image.index, image.seed, image.safety) for image in result.images] == [(0, 4, "passed"), (2, 6, "passed")]
    assert result.withheld == (Withheld(index=1, seed=5), Withheld(index=3, seed=7))
    assert any(text.startswith("2 pictures (seeds 5, 7) were withheld") for text in result.warnings)


def test_what_another_runtime_withheld_stays_withheld_and_numbered(tmp_path: Path) -> None:
    """A backend may be a machine of the fleet, whose runtime has taken out the flagged pictures already."""
    folder = _folder(tmp_path)
    there = _generate(_runtime(folder), n_images=4)

    class Elsewhere(FakeBackend):
        async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
            return there

    catalog = Catalog(tmp_path / "models", built_in=(BuiltIn(CARD, lambda: folder),))
    result = _generate(Runtime(catalog=catalog, backend=Elsewhere()), n_images=4)

    assert [image.index for image in result.images] == [0, 2]
    assert result.withheld == there.withheld


def test_a_job_of_which_nothing_is_left_fails_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ContentWithheld, match="the picture with seed 5 was withheld") as caught:
        _generate(_runtime(_folder(tmp_path)), seed=5)

    assert "another seed" in caught.value.hint
    assert "docs/safety.md" in caught.value.hint


@pytest.mark.parametrize(
    ("of_server", "asked", "expected"),
    [
        ("on", None, ["passed"]),
        ("on", "flag", ["passed", "flagged"]),
        ("flag", None, ["passed", "flagged"]),
        ("off", None, ["off", "off"]),
        ("off", "on", ["passed"]),
        ("on", "off", ["off", "off"]),
    ],
)
def test_the_request_comes_before_the_setting(
    tmp_path: Path, of_server: SafetyChecker, asked: SafetyChecker | None, expected: list[SafetyVerdict]
) -> None:
    runtime = _runtime(_folder(tmp_path), safety_checker=of_server)

    result = _generate(runtime, n_images=2, safety_checker=asked)
    assert [image.safety for image in result.images] == expected


def test_a_prepared_request_leaves_nothing_open(tmp_path: Path) -> None:
    runtime = _runtime(_folder(tmp_path), safety_checker="flag")
    prepared = asyncio.run(runtime.prepare(ImageRequest(prompt="fox", model="toy")))

    assert prepared.request.safety_checker == prepared.drawing.safety_checker == "flag"


@pytest.mark.parametrize("checker", ["", "pytorch_model.bin"])
def test_a_checker_that_is_named_and_not_here_is_told_unless_switched_off(tmp_path: Path, checker: str) -> None:
    runtime = _runtime(_folder(tmp_path, checker=checker))

    assert any("pictures are not checked" in text for text in _generate(runtime).warnings)
    assert not any("not checked" in text for text in _generate(runtime, safety_checker="off").warnings)


def test_a_model_that_never_had_a_checker_is_not_told_about(tmp_path: Path) -> None:
    runtime = _runtime(write_sd(tmp_path / "toy"))

    assert not any("checker" in text for text in _generate(runtime).warnings)


@pytest.mark.parametrize(
    ("checker", "expected"),
    [("model.safetensors", "here"), ("model.fp16.safetensors", "here"), ("model.bin", "left_out"), ("", "left_out")],
)
def test_a_folder_says_whether_its_checker_is_here(tmp_path: Path, checker: str, expected: str) -> None:
    found = identify(_folder(tmp_path, checker=checker))

    assert found.safety_checker == expected
    assert ("safety_checker" in {part.name for part in found.components}) == (expected == "here")


def test_a_checker_without_its_config_is_a_fault_of_the_folder(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "safety_checker/config.json").unlink()

    with pytest.raises(BrokenCheckpoint, match=r"safety_checker/config\.json is missing"):
        identify(folder)


def test_a_checker_of_another_class_is_a_fault_of_the_folder(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["elsewhere", "OtherChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(BrokenCheckpoint, match="OtherChecker"):
        identify(folder)


@pytest.mark.parametrize(
    ("previews_before_check", "safety_checker", "shows"),
    [(True, "on", True), (False, "on", False), (False, "flag", True), (False, "off", True)],
)
def test_previews_are_held_back_where_a_picture_may_be_withheld(
    tmp_path: Path, *, previews_before_check: bool, safety_checker: SafetyChecker, shows: bool
) -> None:
    seen: list[Progress] = []
    runtime = _runtime(_folder(tmp_path), previews_before_check=previews_before_check, safety_checker=safety_checker)
    _generate(runtime, seen=seen)

    assert len(seen) == CARD.steps
    assert [progress.preview is not None for progress in seen] == [shows] * CARD.steps


def test_previews_of_a_model_without_a_checker_are_never_held_back(tmp_path: Path) -> None:
    seen: list[Progress] = []
    _generate(_runtime(write_sd(tmp_path / "toy"), previews_before_check=False), seen=seen)

    assert all(progress.preview is not None for progress in seen)


def test_saved_files_are_named_and_noted_by_their_place_in_the_job(tmp_path: Path) -> None:
    result = _generate(_runtime(_folder(tmp_path)), n_images=4)
    files = tuple(tmp_path / f"x-{i}.png" for i in range(1, 5))
    saved = save(result, OutputPlan(folder=tmp_path, format="png", files=files))

    assert [one.path.name for one in saved] == ["x-1.png", "x-3.png"]
    noted = read_metadata(saved[1].path.read_bytes())
    assert noted is not None
    assert (noted.image_index, noted.seed, noted.safety) == (2, 6, "passed")


def test_a_picture_of_a_model_without_a_checker_notes_nothing(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "toy")
    catalog = Catalog(tmp_path / "models", built_in=(BuiltIn(CARD, lambda: folder),))
    result = _generate(Runtime(catalog=catalog, backend=FakeBackend()))
    (saved,) = save(result, OutputPlan(folder=tmp_path, format="png"))

    assert b'"safety"' not in saved.path.read_bytes()
