"""The safety checker says of every picture what diffusers' own says, and no picture leaves without its verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdfleet.domain import Picture, SafetyChecker, SafetyVerdict
from sdfleet.engine.components import Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import JobFailed, PictureDone
from sdfleet.engine.safety import Preparation, load_safety_checker
from sdfleet.errors import BrokenCheckpoint, OutOfMemory, UnsupportedByModel
from tests import tiny
from tests.engine.drawing import FLOAT32, drawing, run

SIZES = ((32, 32), (64, 48), (33, 97), (200, 40), (24, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("sd15-checked", tmp_path_factory.mktemp("checked"))


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """One that a test may change."""
    return tiny.write("sd15-checked", tmp_path)


@pytest.fixture
def engine() -> Iterator[Engine]:
    one = Engine(FLOAT32)
    yield one
    one.close()


def scribbles(n: int) -> list[Picture]:
    """Pictures of several sizes: some plain, some noise."""
    chance = np.random.default_rng(5)
    made = []
    for i in range(n):
        width_px, height_px = SIZES[i % len(SIZES)]
        low, high = sorted(chance.integers(0, 257, 2))
        pixels = chance.integers(low, high + 1, (height_px, width_px, 3), dtype=np.uint16).clip(0, 255).astype(np.uint8)
        if i % 2:
            pixels[:] = chance.integers(0, 256, 3)
        made.append(Picture(width_px=width_px, height_px=height_px, mode="RGB", data=pixels.tobytes()))
    return made


def theirs(folder: Path, pictures: list[Picture]) -> tuple[torch.Tensor, list[bool]]:
    """What diffusers prepares of the pictures, and its verdicts."""
    pipe = tiny.load(folder)
    arrays = [np.frombuffer(p.data, np.uint8).reshape(p.height_px, p.width_px, 3) for p in pictures]
    prepared = pipe.feature_extractor(arrays, return_tensors="pt").pixel_values
    _, flags = pipe.safety_checker(clip_input=prepared, images=[array.copy() for array in arrays])
    return prepared, flags


def with_threshold(folder: Path, threshold: float) -> Path:
    """The folder with one threshold for every concept: -2 flags everything, 2 nothing."""
    file = folder / "safety_checker/model.safetensors"
    weights = load_file(file)
    weights["concept_embeds_weights"].fill_(threshold)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def finished(engine: Engine, folder: Path, **changes: Any) -> list[PictureDone]:
    engine.submit(drawing("sd15-checked", folder, **changes))
    events = run(engine)
    failed = [event for event in events if isinstance(event, JobFailed)]
    if failed:
        raise failed[0].error
    return [event for event in events if isinstance(event, PictureDone)]


def verdicts(engine: Engine, folder: Path, **changes: Any) -> list[SafetyVerdict]:
    return [event.finished.safety for event in finished(engine, folder, **changes)]


def test_verdicts_are_those_of_diffusers(folder: Path) -> None:
    pictures = scribbles(40)
    checker = load_safety_checker(folder / "safety_checker", dtype=torch.float32)
    _, expected = theirs(folder, pictures)

    assert len(set(expected)) == 2, "a toy that flags all or nothing would prove nothing"
    assert checker.flags(pictures) == expected


@pytest.mark.parametrize(("special", "expected"), [(2.0, False), (-2.0, True)])
def test_a_picture_near_a_special_concept_is_judged_more_strictly(
    own_folder: Path, *, special: float, expected: bool
) -> None:
    """Every concept's threshold lies 0.005 above the picture; being special takes 0.01 off."""
    (picture,) = scribbles(1)
    pipe = tiny.load(own_folder).safety_checker
    prepared, _ = theirs(own_folder, [picture])
    with torch.no_grad():
        embeds = pipe.visual_projection(pipe.vision_model(prepared)[1])
        likeness = torch.nn.functional.cosine_similarity(embeds, pipe.concept_embeds)
    file = own_folder / "safety_checker/model.safetensors"
    weights = load_file(file)
    weights["concept_embeds_weights"] = likeness + 0.005
    weights["special_care_embeds_weights"].fill_(special)
    save_file(weights, file, metadata={"format": "pt"})
    _, flags = theirs(own_folder, [picture])

    assert flags == [expected]
    assert load_safety_checker(own_folder / "safety_checker", dtype=torch.float32).flags([picture]) == [expected]


def test_a_picture_has_the_same_verdict_alone_as_among_others(folder: Path) -> None:
    pictures = scribbles(12)
    checker = load_safety_checker(folder / "safety_checker", dtype=torch.float32)

    assert [checker.flags([picture])[0] for picture in pictures] == checker.flags(pictures)


def test_pictures_are_prepared_as_transformers_does(folder: Path) -> None:
    pictures = scribbles(10)
    prepare = Preparation({"size": 32, "crop_size": {"height": 32, "width": 32}})
    prepared, _ = theirs(folder, pictures)

    torch.testing.assert_close(torch.stack([prepare(picture) for picture in pictures]), prepared, rtol=0, atol=1e-5)


def test_weights_saved_by_transformers_4_are_read(own_folder: Path) -> None:
    pictures = scribbles(12)
    _, expected = theirs(own_folder, pictures)
    file = own_folder / "safety_checker/model.safetensors"
    old = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): weight
        for name, weight in load_file(file).items()
    }
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(old, file)

    assert load_safety_checker(own_folder / "safety_checker", dtype=torch.float32).flags(pictures) == expected


def test_a_checker_that_lacks_weights_is_refused(own_folder: Path) -> None:
    file = own_folder / "safety_checker/model.safetensors"
    weights = load_file(file)
    del weights["visual_projection.weight"]
    save_file(weights, file)

    with pytest.raises(BrokenCheckpoint, match="lacks visual_projection"):
        load_safety_checker(own_folder / "safety_checker", dtype=torch.float32)


def test_a_checker_of_another_kind_is_refused(own_folder: Path) -> None:
    config = own_folder / "safety_checker/config.json"
    config.write_text(config.read_text().replace('"hidden_act": "quick_gelu"', '"hidden_act": "tanh"'))

    with pytest.raises(UnsupportedByModel, match="not known here"):
        load_safety_checker(own_folder / "safety_checker", dtype=torch.float32)


@pytest.mark.parametrize(
    ("threshold", "safety_checker", "expected"),
    [(-2.0, "on", "flagged"), (2.0, "on", "passed"), (-2.0, "flag", "flagged"), (-2.0, "off", "off")],
)
def test_every_picture_of_a_job_has_its_verdict(
    own_folder: Path, engine: Engine, threshold: float, safety_checker: SafetyChecker, expected: SafetyVerdict
) -> None:
    with_threshold(own_folder, threshold)

    assert verdicts(engine, own_folder, n_images=3, safety_checker=safety_checker) == [expected] * 3


def test_the_verdict_is_about_the_picture_as_diffusers_sees_it(folder: Path, engine: Engine) -> None:
    done = finished(engine, folder, n_images=12, safety_checker="on")
    _, expected = theirs(folder, [event.finished.picture for event in done])

    assert [event.finished.safety == "flagged" for event in done] == expected


def test_where_memory_is_short_the_checker_comes_with_the_vae_and_leaves_again(folder: Path) -> None:
    whole, lean = Engine(FLOAT32), Engine(replace(FLOAT32, memory_mode="eco"))
    try:
        expected = verdicts(whole, folder, n_images=6)
        assert verdicts(lean, folder, n_images=6) == expected
    finally:
        whole.close()
        lean.close()


def test_jobs_that_share_their_steps_are_each_checked_as_they_asked(own_folder: Path, engine: Engine) -> None:
    with_threshold(own_folder, -2.0)
    asked: tuple[SafetyChecker, ...] = ("on", "flag", "off")
    for safety_checker in asked:
        engine.submit(drawing("sd15-checked", own_folder, job=safety_checker, safety_checker=safety_checker))
    done = {event.job_id: event.finished.safety for event in run(engine) if isinstance(event, PictureDone)}

    assert done == {"on": "flagged", "flag": "flagged", "off": "off"}


def test_a_checkpoint_without_a_checker_says_so(own_folder: Path, engine: Engine) -> None:
    for file in (own_folder / "safety_checker").iterdir():
        file.unlink()

    assert verdicts(engine, own_folder) == ["none"]


def test_flagged_pixels_are_not_changed(own_folder: Path, engine: Engine) -> None:
    (flagged,) = finished(engine, with_threshold(own_folder, -2.0), safety_checker="flag")
    (unchecked,) = finished(engine, own_folder, safety_checker="off")

    assert flagged.finished.picture == unchecked.finished.picture


def test_a_checker_that_cannot_be_read_fails_the_job_and_not_the_engine(own_folder: Path, engine: Engine) -> None:
    (own_folder / "safety_checker/config.json").write_text("no json")

    with pytest.raises(BrokenCheckpoint):
        finished(engine, own_folder, safety_checker="on")
    assert verdicts(engine, own_folder, safety_checker="off") == ["off"]


def test_a_picture_that_cannot_be_checked_fails_its_own_job_alone(own_folder: Path) -> None:
    (own_folder / "safety_checker/config.json").write_text("no json")
    # By phase, the checker is loaded only when the pictures are drawn.
    engine = Engine(replace(FLOAT32, memory_mode="eco"))
    try:
        for safety_checker in ("on", "off"):
            engine.submit(drawing("sd15-checked", own_folder, job=safety_checker, safety_checker=safety_checker))
        events = run(engine)
    finally:
        engine.close()
    failed = [event for event in events if isinstance(event, JobFailed)]

    assert [(event.job_id, event.error.code) for event in failed] == [("on", BrokenCheckpoint.code)]
    assert [event.job_id for event in events if isinstance(event, PictureDone)] == ["off"]


def test_a_checker_that_is_switched_off_is_not_loaded(own_folder: Path, engine: Engine) -> None:
    verdicts(engine, own_folder, safety_checker="off")
    without = engine.facts()["resident_bytes"]
    verdicts(engine, own_folder, safety_checker="on")

    weights = load_file(own_folder / "safety_checker/model.safetensors")
    n_bytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
    assert engine.facts()["resident_bytes"] == without + n_bytes  # type: ignore[operator]


def test_the_memory_plan_counts_the_checker_beside_the_vae(folder: Path) -> None:
    components = Components(folder, choose_device("cpu", "float32"))
    weights = load_file(folder / "safety_checker/model.safetensors")
    n_bytes = sum(weight.numel() * weight.element_size() for weight in weights.values())

    assert components.weights().vae == components.weights(has_checker=False).vae + n_bytes


def test_out_of_memory_while_checking_looks_at_the_pictures_one_by_one(
    own_folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = verdicts(engine, own_folder, n_images=3)
    from sdfleet.engine.safety import SafetyChecker as Network

    whole = Network.flags

    def short_of_memory(self: Network, pictures: list[Picture]) -> list[bool]:
        if len(pictures) > 1:
            raise OutOfMemory("no room for three")
        return whole(self, pictures)

    monkeypatch.setattr(Network, "flags", short_of_memory)
    assert verdicts(engine, own_folder, n_images=3) == expected
