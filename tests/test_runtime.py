"""What the runtime decides before anything is drawn."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfleet.backends.fake import FakeBackend
from sdfleet.catalog.cards import Card
from sdfleet.catalog.store import BuiltIn, Catalog
from sdfleet.domain import MAX_SEED, Drawing, ImageRequest, ImageResult, Picture, Progress
from sdfleet.errors import (
    BrokenCheckpoint,
    EngineDied,
    InvalidValue,
    JobCancelled,
    OutOfMemory,
    UnknownName,
    UnsupportedByModel,
)
from sdfleet.runtime import Runtime, fit_size
from tests.catalog.folders import write_flux, write_sd, write_sd3

SMALL: dict[str, Any] = {"min_side_px": 96, "max_side_px": 192, "resizes": True}


def _runtime(tmp_path: Path, *, backend: FakeBackend | None = None, **facts: Any) -> Runtime:
    """A runtime with one model, `toy`, of the facts given."""
    folder = tmp_path / "toy"
    if not folder.exists():
        write_sd(folder)
    defaults = {"family": "sd", "width_px": 128, "height_px": 128, "steps": 4, "guidance": 3.0}
    card = Card.model_validate({"name": "toy", "sampler": "DPM++ 2M Karras", **defaults, **facts})
    catalog = Catalog(tmp_path / "models", built_in=(BuiltIn(card, lambda: folder),))
    return Runtime(catalog=catalog, backend=backend or FakeBackend())


def _generate(runtime: Runtime, **asked: Any) -> ImageResult:
    return asyncio.run(runtime.generate(ImageRequest(**{"prompt": "fox", "model": "toy", **asked})))


def _drawing(runtime: Runtime, **asked: Any) -> Drawing:
    return _generate(runtime, **asked).drawing


def _picture(width_px: int, height_px: int, *, mode: Any = "RGB") -> Picture:
    data = bytes(width_px * height_px * (3 if mode == "RGB" else 1))
    return Picture(width_px=width_px, height_px=height_px, mode=mode, data=data)


def test_what_a_request_leaves_open_comes_from_the_card(tmp_path: Path) -> None:
    drawing = _drawing(_runtime(tmp_path))
    assert (drawing.width_px, drawing.height_px, drawing.steps, drawing.guidance) == (128, 128, 4, 3.0)
    assert (drawing.sampler, drawing.family, drawing.checkpoint) == ("dpm++_2m karras", "sd", str(tmp_path / "toy"))
    assert drawing.resize_to is None


def test_what_a_request_says_wins_over_the_card(tmp_path: Path) -> None:
    drawing = _drawing(_runtime(tmp_path), width_px=64, height_px=72, steps=7, guidance=0.0, sampler="euler a", seed=9)
    assert (drawing.width_px, drawing.height_px, drawing.steps, drawing.guidance) == (64, 72, 7, 0.0)
    assert (drawing.sampler, drawing.seed) == ("euler_a", 9)


def test_the_result_bears_the_name_a_person_uses(tmp_path: Path) -> None:
    assert _generate(_runtime(tmp_path)).model == "toy"


def test_a_seed_nobody_chose_is_32_bits_and_new_each_time(tmp_path: Path) -> None:
    runtime = _runtime(tmp_path)

    async def seeds() -> list[int]:
        return [(await runtime.prepare(ImageRequest(prompt="fox", model="toy"))).drawing.seed for _ in range(8)]

    found = asyncio.run(seeds())
    assert len(set(found)) > 1
    assert all(0 <= seed < 2**32 for seed in found)


def test_the_last_picture_needs_a_seed_too(tmp_path: Path) -> None:
    runtime = _runtime(tmp_path)
    assert _drawing(runtime, seed=MAX_SEED).seed == MAX_SEED
    with pytest.raises(InvalidValue, match="no seeds for 2 pictures"):
        _generate(runtime, seed=MAX_SEED, n_images=2)


@pytest.mark.parametrize("asked", [{"model": "toyy"}, {"sampler": "eulr"}])
def test_a_wrong_name_reaches_no_backend(tmp_path: Path, asked: dict[str, Any]) -> None:
    backend = FakeBackend(script=[OutOfMemory("the backend was asked")])
    with pytest.raises(UnknownName):
        _generate(_runtime(tmp_path, backend=backend), **asked)


def test_a_truncated_checkpoint_reaches_no_backend(tmp_path: Path) -> None:
    backend = FakeBackend(script=[OutOfMemory("the backend was asked")])
    runtime = _runtime(tmp_path, backend=backend)
    weights = tmp_path / "toy/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(BrokenCheckpoint, match="3 of 576 bytes"):
        _generate(runtime)


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="prompt: character 2"):
        _generate(_runtime(tmp_path), prompt="a\udcff")


def test_a_size_out_of_range_is_drawn_smaller_and_resized_and_told(tmp_path: Path) -> None:
    result = _generate(_runtime(tmp_path, **SMALL), width_px=512, height_px=512)
    drawing = result.drawing
    assert (drawing.width_px, drawing.height_px, drawing.resize_to) == (128, 128, (512, 512))
    assert any("drawn at 128x128 and resized to 512x512" in warning for warning in result.warnings)


def test_a_size_in_range_is_drawn_as_it_is(tmp_path: Path) -> None:
    drawing = _drawing(_runtime(tmp_path, **SMALL), width_px=96, height_px=192)
    assert (drawing.width_px, drawing.height_px, drawing.resize_to) == (96, 192, None)


def test_a_card_that_does_not_resize_draws_any_size(tmp_path: Path) -> None:
    drawing = _drawing(_runtime(tmp_path), width_px=1024, height_px=64)
    assert (drawing.width_px, drawing.height_px, drawing.resize_to) == (1024, 64, None)


SIDES = st.integers(2, 512).map(lambda n: n * 8)


@given(SIDES, SIDES)
def test_a_fitted_size_can_always_be_drawn(width_px: int, height_px: int) -> None:
    fitted = fit_size(width_px, height_px, area_px=128 * 128, min_side_px=96, max_side_px=192)
    assert all(96 <= side <= 192 and side % 8 == 0 for side in fitted)
    assert (fitted[0] > fitted[1]) <= (width_px > height_px)
    if 0.5 <= width_px / height_px <= 2:
        assert abs(fitted[0] / fitted[1] - width_px / height_px) < 0.1 * width_px / height_px


def test_an_input_picture_decides_the_size(tmp_path: Path) -> None:
    result = _generate(_runtime(tmp_path), image=_picture(96, 64), strength=0.5)
    assert (result.drawing.width_px, result.drawing.height_px, result.drawing.strength) == (96, 64, 0.5)
    assert not any("resized" in warning for warning in result.warnings)


def test_an_input_picture_of_an_odd_size_is_resized_and_told(tmp_path: Path) -> None:
    result = _generate(_runtime(tmp_path), image=_picture(101, 59), mask=_picture(101, 59, mode="L"))
    drawing = result.drawing
    assert (drawing.width_px, drawing.height_px) == (104, 56)
    assert drawing.image is not None
    assert drawing.mask is not None
    assert (drawing.image.width_px, drawing.mask.height_px) == (104, 56)
    assert any("resized from 101x59 to 104x56" in warning for warning in result.warnings)


@pytest.mark.parametrize(("size", "expected"), [((3, 5), (16, 16)), ((5000, 2500), (4096, 2048))])
def test_an_input_picture_beyond_all_sizes_is_brought_in(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    runtime = _runtime(tmp_path)
    request = ImageRequest(prompt="fox", model="toy", image=_picture(*size))
    drawing = asyncio.run(runtime.prepare(request)).drawing
    assert (drawing.width_px, drawing.height_px) == expected


def test_an_input_picture_too_large_for_the_card_comes_back_at_its_size(tmp_path: Path) -> None:
    drawing = _drawing(_runtime(tmp_path, **SMALL), image=_picture(512, 256))
    assert (drawing.width_px, drawing.height_px, drawing.resize_to) == (192, 96, (512, 256))
    assert drawing.image is not None
    assert drawing.image.width_px == 192


def test_a_negative_prompt_without_guidance_is_told_to_do_nothing(tmp_path: Path) -> None:
    result = _generate(_runtime(tmp_path), negative_prompt="blur", guidance=1.0)
    assert any("negative prompt has no effect at guidance 1" in warning for warning in result.warnings)


def test_what_the_model_ignores_is_told(tmp_path: Path) -> None:
    result = _generate(_runtime(tmp_path, ignores=("negative_prompt",)), negative_prompt="blur")
    assert "toy ignores negative_prompt" in result.warnings


def test_what_the_model_ignores_is_not_noted_as_if_it_had_done_something(tmp_path: Path) -> None:
    runtime = _runtime(tmp_path, ignores=("negative_prompt", "guidance"), guidance=0.0)
    drawing = _drawing(runtime, negative_prompt="blur", guidance=9.0)
    assert (drawing.negative_prompt, drawing.guidance) == ("", 0.0)


def test_sd3_without_t5_skips_it_and_says_so(tmp_path: Path) -> None:
    write_sd3(tmp_path / "toy", has_t5=False)
    result = _generate(_runtime(tmp_path, family="sd3"))
    assert result.drawing.t5 == "skip"
    assert any("T5" in warning for warning in result.warnings)
    with pytest.raises(UnsupportedByModel, match="text_encoder_3"):
        _generate(_runtime(tmp_path, family="sd3"), t5="keep")


def test_sd3_with_t5_leaves_the_choice_to_the_request(tmp_path: Path) -> None:
    write_sd3(tmp_path / "toy")
    runtime = _runtime(tmp_path, family="sd3")
    assert [_drawing(runtime, t5=t5).t5 for t5 in ("auto", "keep", "skip")] == ["auto", "keep", "skip"]


def test_warnings_of_runtime_and_backend_come_together(tmp_path: Path) -> None:
    warnings = _generate(_runtime(tmp_path, **SMALL), width_px=256, height_px=256).warnings
    assert len(warnings) == 2
    assert "made up" in warnings[1]


def test_progress_is_passed_on(tmp_path: Path) -> None:
    seen: list[Progress] = []
    runtime = _runtime(tmp_path)
    asyncio.run(runtime.generate(ImageRequest(prompt="fox", model="toy"), on_progress=seen.append))
    assert [progress.step for progress in seen] == [1, 2, 3, 4]
    assert all(progress.preview is None for progress in seen)


def test_previews_come_when_somebody_looks(tmp_path: Path) -> None:
    seen: list[Progress] = []
    request = ImageRequest(prompt="fox", model="toy")
    asyncio.run(_runtime(tmp_path).generate(request, on_progress=seen.append, wants_previews=True))
    assert all(progress.preview is not None for progress in seen)


def test_an_error_of_the_backend_comes_through(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="no room"):
        _generate(_runtime(tmp_path, backend=FakeBackend(script=[OutOfMemory("no room")])))


def test_cancelling_by_id_ends_the_job(tmp_path: Path) -> None:
    async def story() -> None:
        held = asyncio.Event()

        async def hold(*_: object) -> None:
            held.set()
            await asyncio.Event().wait()

        async with _runtime(tmp_path, backend=FakeBackend(before_step=hold)) as runtime:
            prepared = await runtime.prepare(ImageRequest(prompt="fox", model="toy"))
            job = asyncio.ensure_future(runtime.draw(prepared))
            await held.wait()
            await runtime.cancel(prepared.drawing.job_id)
            with pytest.raises(JobCancelled):
                await job

    asyncio.run(story())


def test_leaving_closes_the_backend(tmp_path: Path) -> None:
    async def story() -> None:
        async with _runtime(tmp_path) as runtime:
            pass
        with pytest.raises(EngineDied):
            await runtime.generate(ImageRequest(prompt="fox", model="toy"))
        with contextlib.suppress(EngineDied):
            await runtime.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((512, 512), "drawn at 128x128 and resized to 512x512: starter draws sides of 128 px"),
        ((512, 256), "drawn at 128x128, resized to 256x256 and filled up at the edges to 512x256: starter draws"),
        ((256, 128), "drawn at 128x128 and filled up at the edges to 256x128: starter draws"),
    ],
)
def test_the_built_in_model_says_how_it_came_to_another_size(size: tuple[int, int], words: str, tmp_path: Path) -> None:
    request = ImageRequest(prompt="a red star", width_px=size[0], height_px=size[1])
    prepared = Runtime(catalog=Catalog(tmp_path), backend=FakeBackend())._prepare(request, wants_previews=False)

    assert (prepared.drawing.width_px, prepared.drawing.height_px, prepared.drawing.resize_to) == (128, 128, size)
    assert any(warning.startswith(words) for warning in prepared.warnings)


def test_an_input_picture_is_brought_to_what_a_transformer_can_take(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "models")
    catalog.add(write_sd3(tmp_path / "sd3"), name="sd3")
    request = ImageRequest(prompt="fox", model="sd3", image=_picture(1000, 504))
    runtime = Runtime(catalog=catalog, backend=FakeBackend())
    drawing = runtime._prepare(request, wants_previews=False).drawing

    assert (drawing.width_px, drawing.height_px) == (1008, 512)


def test_strength_is_the_requests_then_the_cards_then_three_quarters(tmp_path: Path) -> None:
    fill = Catalog(tmp_path / "models")
    fill.add(write_flux(tmp_path / "fill", pipeline="FluxFillPipeline"), name="fill")
    fill.add(write_sd(tmp_path / "sd"), name="sd")
    runtime = Runtime(catalog=fill, backend=FakeBackend())
    image, mask = _picture(512, 512), _picture(512, 512, mode="L")

    def strength(model: str, asked: float | None) -> float:
        request = ImageRequest(prompt="fox", model=model, image=image, mask=mask, strength=asked)
        return runtime._prepare(request, wants_previews=False).drawing.strength

    assert (strength("fill", None), strength("fill", 0.5), strength("sd", None)) == (1.0, 0.5, 0.75)
