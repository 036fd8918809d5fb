"""OpenVINO draws what torch draws, takes over only where it is faster, and is never missed where it fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdfleet.domain import Drawing
from sdfleet.engine import executors
from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.openvino_cache import Conversion, ConversionFailed, ModelCache
from sdfleet.engine.openvino_convert import MODEL_FILE
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser
from sdfleet.errors import InvalidValue
from tests.engine.conversions import InThisProcess, converting_here, executor_of, fake_seconds
from tests.engine.drawing import FLOAT32, Pixels, drawing, most_levels_apart, ours, pictures, run

pytest.importorskip("openvino")

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(autouse=True)
def converted(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with converting_here(cache_folder, monkeypatch) as begun:
        yield begun


def options(cache_folder: Path, **changes: Any) -> EngineOptions:
    return replace(FLOAT32, cache_folder=str(cache_folder), **changes)


def company(name: str, folder: Path) -> list[Drawing]:
    prompts = ("a cat on the moon", "a robot", " ".join(["a dog on the moon"] * 20))
    return [
        drawing(name, folder, job=str(i), prompt=prompts[i % 3], seed=i, steps=3 + i % 2, guidance=(1.0, 5.0)[i % 2])
        for i in range(4)
    ]


def drawn_alone_and_together(drawings: list[Drawing], chosen: EngineOptions) -> tuple[list[Pixels], str]:
    """Pictures of the first drawing alone, then of all of them at once, and the executor."""
    engine = Engine(chosen)
    try:
        engine.submit(drawings[0])
        drawn = [pictures(run(engine))[drawings[0].job_id, 0]]
        for one in drawings:
            engine.submit(one)
        together = pictures(run(engine))
        return [*drawn, *(together[one.job_id, 0] for one in drawings)], executor_of(engine)["executor"]
    finally:
        engine.close()


def draw(engine: Engine, one: Drawing) -> Pixels:
    engine.submit(one)
    return pictures(run(engine))[one.job_id, 0]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_openvino_draws_torchs_pictures_alone_and_in_mixed_company(
    name: str, checkpoints: Checkpoints, cache_folder: Path
) -> None:
    drawings = company(name, checkpoints(name))
    theirs, executor = drawn_alone_and_together(drawings, options(cache_folder, executor="openvino", max_rows=8))
    expected = ours(*drawings, options=replace(FLOAT32, max_rows=8))

    assert executor == "openvino"
    pairs = zip(theirs, [expected[0], *expected], strict=True)
    assert [most_levels_apart(a, b) <= 1 for a, b in pairs] == [True] * 5


def test_a_size_that_does_not_halve_evenly_is_drawn_too(checkpoints: Checkpoints, cache_folder: Path) -> None:
    """Sides of 9 and 5 latents: a trace that doubles blindly on the way up would not fit."""
    one = drawing("sd15", checkpoints("sd15"), width_px=72, height_px=40)

    theirs = ours(one, options=options(cache_folder, executor="openvino"))
    assert most_levels_apart(theirs[0], ours(one)[0]) <= 1


def test_eco_mode_draws_the_same_picture_with_openvino(checkpoints: Checkpoints, cache_folder: Path) -> None:
    one = drawing("sd15", checkpoints("sd15"))

    theirs = ours(one, options=options(cache_folder, executor="openvino", memory_mode="eco"))
    assert most_levels_apart(theirs[0], ours(one)[0]) <= 1


def test_bfloat16_is_as_near_to_float32_as_torchs_bfloat16(checkpoints: Checkpoints, cache_folder: Path) -> None:
    one = drawing("sd15", checkpoints("sd15"), steps=1, guidance=1.0, negative_prompt="")
    exact = ours(one)[0].astype(float)
    by_torch = ours(one, options=replace(FLOAT32, dtype="bfloat16"))[0]
    by_openvino = ours(one, options=options(cache_folder, executor="openvino", dtype="bfloat16"))[0]

    assert abs(by_openvino - exact).mean() <= 1.5 * abs(by_torch - exact).mean() + 0.5


@pytest.mark.parametrize(("openvino_s", "winner"), [(0.05, "openvino"), (0.2, "torch"), (0.099, "torch")])
def test_the_faster_executor_stays(
    openvino_s: float, winner: str, checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_seconds(monkeypatch, openvino=openvino_s)
    folder = checkpoints("sd15")
    engine = Engine(options(cache_folder))
    first = draw(engine, drawing("sd15", folder))
    module = engine._residency.get(str(folder)).family.components.use("unet")
    second = draw(engine, drawing("sd15", folder))
    facts = executor_of(engine)
    engine.close()

    assert (facts["executor"], isinstance(module, OpenVinoDenoiser)) == (winner, winner == "openvino")
    assert facts["torch_ms_by_rows"] == {"2": 100.0, "8": 100.0, "16": 100.0, "32": 100.0}
    assert most_levels_apart(first, second) <= 1


def test_a_faster_executor_with_other_answers_is_not_taken(
    checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_seconds(monkeypatch, openvino=0.01, spoilt={"openvino": 0.01})
    engine = Engine(options(cache_folder))
    draw(engine, drawing("sd15", checkpoints("sd15")))
    facts = executor_of(engine)
    engine.close()

    assert facts["executor"] == "torch"
    assert "away from torch's" in facts["why"]


def test_the_batcher_learns_anew_after_a_change(
    checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_seconds(monkeypatch, openvino=0.01)
    engine = Engine(options(cache_folder))
    draw(engine, drawing("sd15", checkpoints("sd15")))

    assert engine._batcher._speeds == {}
    engine.close()


def test_nothing_is_tried_while_something_is_drawn(
    checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that all pictures of a job, and a reproducible one above all, come from one executor."""
    fake_seconds(monkeypatch, openvino=0.01)
    folder = checkpoints("sd15")
    engine = Engine(options(cache_folder))
    engine.submit(drawing("sd15", folder, steps=8, n_images=2, reproducible=True))
    used = set()
    while engine._has_work:
        engine.step()
        used.add(type(engine._residency.get(str(folder)).family.components.use("unet")).__name__)
    assert used == {"UNet2DConditionModel"}
    run(engine)
    assert executor_of(engine)["executor"] == "openvino"
    engine.close()


def test_the_next_start_takes_over_in_the_first_pause_without_conversion_or_trial(
    checkpoints: Checkpoints, cache_folder: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_seconds(monkeypatch, openvino=0.01)
    one = drawing("sd15", checkpoints("sd15"))
    ours(one, options=options(cache_folder))
    converted.clear()
    monkeypatch.setattr(executors, "timed_call", None)
    engine = Engine(options(cache_folder))
    engine.submit(one)
    while engine._has_work:
        engine.step()
    assert executor_of(engine)["executor"] == "torch"  # the first picture did not wait for it to be compiled
    run(engine)

    assert (executor_of(engine)["executor"], converted) == ("openvino", [])
    engine.close()


def test_a_checkpoint_that_comes_back_is_opened_with_what_was_chosen(
    checkpoints: Checkpoints, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_seconds(monkeypatch, openvino=0.01)
    one = drawing("sd15", checkpoints("sd15"))
    engine = Engine(options(cache_folder))
    draw(engine, one)
    engine._residency.drop_idle(busy=())
    loaded: list[str] = []
    real = Components.load

    def load(self: Components, name: ComponentName) -> Any:
        loaded.append(name)
        return real(self, name)

    monkeypatch.setattr(Components, "load", load)
    draw(engine, one)

    assert "text_encoder" in loaded
    assert "unet" not in loaded
    engine.close()


def test_changed_files_are_another_conversion(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    (tmp_path / "checkpoint" / "unet").mkdir(parents=True)
    weights = tmp_path / "checkpoint" / "unet" / "model.safetensors"
    weights.write_bytes(b"1234")
    before = cache.key(tmp_path / "checkpoint", "unet")
    os.utime(weights, ns=(1, 1))
    after = cache.key(tmp_path / "checkpoint", "unet")
    weights.write_bytes(b"12345")

    assert len({before, after, cache.key(tmp_path / "checkpoint", "unet")}) == 3
    assert before.split("-")[0] == after.split("-")[0]


def test_an_older_conversion_of_the_same_checkpoint_leaves_the_cache(tmp_path: Path) -> None:
    for name in ("same-old", "same-new", "other-one", ".part-begun"):
        (tmp_path / name).mkdir()
    ModelCache(tmp_path).tidy("same-new")

    assert sorted(path.name for path in tmp_path.iterdir()) == [".part-begun", "other-one", "same-new"]


def test_torch_draws_where_a_conversion_fails(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_self: InThisProcess) -> Path:
        raise ConversionFailed("no such operation")

    monkeypatch.setattr(InThisProcess, "result", fails)
    one = drawing("sd15", checkpoints("sd15"))
    for executor in ("openvino", "auto"):
        engine = Engine(options(tmp_path, executor=executor))
        drawn = draw(engine, one)
        facts = executor_of(engine)
        assert (facts["executor"], facts["why"]) == ("torch", "OpenVINO failed: no such operation")
        assert most_levels_apart(drawn, ours(one)[0]) == 0
        engine.close()


def test_another_process_says_why_it_cannot_convert(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    conversion = Conversion(tmp_path, "unet", part=tmp_path / "part", target=tmp_path / "target", niceness=0)

    with pytest.raises(ConversionFailed, match=r"model_index\.json"):
        conversion.result()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_process_converts_and_leaves_nothing_half_done(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    conversion = Conversion(
        checkpoints("sd3"), "transformer", part=tmp_path / "part", target=tmp_path / "target", niceness=0
    )

    assert conversion.result() == tmp_path / "target" / MODEL_FILE
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == ["model.bin", "model.xml"]


def test_a_checkpoint_that_leaves_takes_its_converted_weights_along(
    checkpoints: Checkpoints, cache_folder: Path
) -> None:
    folder = checkpoints("sd15")
    engine = Engine(options(cache_folder, executor="openvino"))
    draw(engine, drawing("sd15", folder))
    components = engine._residency.get(str(folder)).family.components
    whole = engine.facts()["resident_bytes"]
    weights = components.weights()
    assert whole == pytest.approx(weights.total, rel=0.02)

    components.put_away(["unet"])
    assert engine.facts()["resident_bytes"] == whole - weights.denoiser  # type: ignore[operator]
    engine._residency.drop_idle(busy=())
    assert engine.facts()["resident_bytes"] == 0
    assert most_levels_apart(draw(engine, drawing("sd15", folder)), ours(drawing("sd15", folder))[0]) <= 1
    engine.close()


def test_without_a_cache_folder_nothing_is_converted_unasked(checkpoints: Checkpoints, converted: list[str]) -> None:
    ours(drawing("sd15", checkpoints("sd15")), options=FLOAT32)
    assert converted == []


def test_forbidden_openvino_is_not_even_looked_for(
    checkpoints: Checkpoints, cache_folder: Path, converted: list[str]
) -> None:
    engine = Engine(options(cache_folder, executor="torch"))
    draw(engine, drawing("sd15", checkpoints("sd15")))
    assert (engine.facts()["executors"], converted) == ({}, [])
    engine.close()


def test_asking_for_what_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InvalidValue, match="OpenVINO is not installed"):
        Engine(replace(FLOAT32, executor="openvino"))
