"""Published models on random weights, what a picture costs, and what a report says."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdfleet import compose
from sdfleet.bench.measure import Case, Limit, Operations, Report, Timing, measure
from sdfleet.bench.plot import save_plot
from sdfleet.bench.random_model import random_folder, standing_in
from sdfleet.catalog import architectures
from sdfleet.catalog.architectures import Architecture, Part
from sdfleet.catalog.identify import identify
from sdfleet.domain import Drawing, JobId
from sdfleet.engine import random_weights
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobFailed, PictureDone
from sdfleet.engine.limits import count_work, measure_limit
from sdfleet.errors import BrokenCheckpoint, InvalidValue, OutOfMemory, UnknownName
from sdfleet.settings import Settings

ROOT = Path(__file__).parents[1]
# Counted by others too, in millions: SD 1.5 860, SDXL 2567, SD3-M 2028, SD3.5-M 2243, SD3.5-L 8057, FLUX.1-dev 11901.
MILLIONS = {
    "sd15": 860, "sd21": 866, "sdxl": 2567, "sd3-medium": 2028, "sd3.5-medium": 2243, "sd3.5-large": 8057,
    "flux-dev": 11901, "flux-schnell": 11891, "flux2-klein-4b": 3876, "z-image-turbo": 6155,
}  # fmt: skip
THIN = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 2}
SMALL: dict[str, dict[str, Any]] = {
    "sd15": {**THIN, "attention_head_dim": 2},
    "sdxl": {**THIN, "block_out_channels": [8, 8, 8], "attention_head_dim": 2, "transformer_layers_per_block": 1},
    "sd3.5-medium": {
        "num_layers": 2, "num_attention_heads": 1, "caption_projection_dim": 64, "pos_embed_max_size": 16,
        "dual_attention_layers": [0],
    },
    "flux-dev": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
    "flux2-klein-4b": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
    "z-image-turbo": {"n_layers": 1, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "dim": 128},
}  # fmt: skip


whole = architectures.load


def small(name: str) -> Architecture:
    """A published model made thin, with light text encoders."""
    architecture = whole(name).with_light_text_encoders()
    changes = {architecture.denoiser: SMALL[name], "vae": THIN}
    parts = {
        part_name: Part(class_name=part.class_name, config={**part.config, **changes.get(part_name, {})})
        for part_name, part in architecture.parts.items()
    }
    return replace(architecture, parts=parts)


def drawing(folder: Path, **changes: Any) -> Drawing:
    found = identify(folder)
    fields: dict[str, Any] = {
        "job_id": JobId("job"), "checkpoint": str(folder), "family": found.family, "prompt": "a cat",
        "negative_prompt": "", "width_px": 64, "height_px": 64, "steps": 2, "guidance": found.guidance, "seed": 7,
        "n_images": 1, "sampler": found.sampler,
    }  # fmt: skip
    return Drawing(**{**fields, **changes})


def drawn(asked: Drawing, **options: Any) -> bytes:
    """The pixels of the picture; raises why there is none."""
    engine = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1, executor="torch", **options))
    engine.submit(asked)
    pixels = b""
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, JobFailed):
                raise event.error
            if isinstance(event, PictureDone):
                pixels = event.finished.picture.data
    engine.close()
    return pixels


@pytest.fixture(scope="module", params=sorted(SMALL))
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The checkpoint of one thin model of each family."""
    with random_folder(small(request.param)) as (_, written):
        yield written


def test_every_published_model_is_named_once() -> None:
    assert set(architectures.names()) == set(MILLIONS)
    with pytest.raises(UnknownName, match="sd16"):
        architectures.load("sd16")


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_denoiser_has_as_many_parameters_as_published(name: str) -> None:
    architecture = architectures.load(name)
    module = random_weights.on_meta(architecture.parts[architecture.denoiser])
    n_parameters = sum(parameter.numel() for parameter in module.parameters())
    assert n_parameters == architecture.n_denoiser_parameters
    assert round(n_parameters / 1e6) == MILLIONS[name]


def test_an_architecture_file_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(BrokenCheckpoint, match="colour"):
        architectures.parse("mine", 'title = ""\npipeline = "FluxPipeline"\ncolour = 1\n[components]')


def test_a_model_of_24_gb_takes_no_room_on_the_disk() -> None:
    with random_folder(architectures.load("flux-dev"), with_text_encoders=False) as (_, written):
        assert identify(written).n_bytes > 23e9
        on_disk = sum(512 * file.stat().st_blocks for file in written.rglob("*") if file.is_file())
        assert on_disk < 10e6


def test_random_weights_draw_a_finite_picture_that_repeats(folder: Path) -> None:
    first = drawn(drawing(folder))
    assert len(first) == 64 * 64 * 3
    assert len(set(first)) > 10
    assert drawn(drawing(folder)) == first


def test_another_seed_gives_other_weights() -> None:
    with random_folder(small("sd15"), seed=1) as (_, one), random_folder(small("sd15"), seed=2) as (_, other):
        assert drawn(drawing(one)) != drawn(drawing(other))


def test_weights_are_drawn_in_the_format_asked_for_and_keep_activations_in_size() -> None:
    with random_folder(small("sd15")) as (_, written):
        files = sorted((written / "unet").glob("*.safetensors"))
        tensors = random_weights.draw(files, dtype=torch.bfloat16, device=torch.device("cpu"))
    weight = tensors["mid_block.resnets.0.conv1.weight"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert float(weight.float().std()) == pytest.approx(weight[0].numel() ** -0.5, rel=0.1)
    assert len({tuple(row.flatten().tolist()) for row in weight}) == len(weight)


def test_what_does_not_fit_is_refused_with_the_numbers_before_anything_is_drawn() -> None:
    with (
        random_folder(architectures.load("flux-dev"), with_text_encoders=False) as (_, written),
        pytest.raises(OutOfMemory, match=r"needs [1-9]\.\d GB"),
    ):
        # Not even block by block: the largest of its layers alone takes more.
        drawn(drawing(written), memory_limit_bytes=2**28)


def test_operations_are_counted_for_every_family(folder: Path) -> None:
    asked = drawing(folder)
    work, wider = count_work(asked), count_work(replace(asked, width_px=256))
    assert min(work.encode, work.step, work.decode) > 0
    assert wider.step > work.step
    # Four times the area, up to the rims of kernels; attention in the middle grows faster.
    assert 3.9 < wider.decode / work.decode < 8
    assert work.picture(3) == work.encode + 3 * work.step + work.decode


def test_operations_of_stable_diffusion_are_the_known_ones() -> None:
    with random_folder(architectures.load("sd15")) as (_, written):
        work = count_work(drawing(written, width_px=512, height_px=512))
    # Guided, so two rows; the numbers are those of torch's counter on diffusers' own classes.
    assert [round(n / 1e9) for n in (work.step, work.decode)] == [1607, 2515]


def test_the_limit_is_measured() -> None:
    assert measure_limit("cpu", "float32") > 1e8


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", device="cpu", dtype="float32", threads=1)


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published models are thin, so that they can be drawn with here."""
    monkeypatch.setattr(architectures, "load", small)


def _report(settings: Settings, **options: Any) -> Report:
    async def measured() -> Report:
        async with compose.standalone(settings) as runtime:
            return await measure(runtime, model="sd15", sizes=((64, 64),), n_runs=1, limit=Limit(per_s=1e12), **options)

    return asyncio.run(measured())


@pytest.mark.usefixtures("thin")
def test_a_model_that_is_not_here_is_measured_through_the_ordinary_door(settings: Settings) -> None:
    with standing_in("sd15", settings, with_text_encoders=False) as staged:
        report = _report(staged, steps=(2,), batches=(1, 2))
    assert not staged.home.exists()
    told = json.loads(json.dumps(report.to_json()))
    assert [timing["n_images"] for timing in told["timings"]] == [1, 2]
    for timing in told["timings"]:
        assert timing["step_s"] > 0
        assert timing["phases_s"]["encode"] > 0
        assert timing["images_per_s"] == pytest.approx(timing["n_images"] / timing["best_s"], rel=0.01)
        assert 0 < timing["share_of_limit"]["step"] < 1
        assert "estimate" not in timing


@pytest.mark.usefixtures("thin")
def test_one_step_gives_an_estimate_that_is_called_one(settings: Settings) -> None:
    with standing_in("sd15", settings, with_text_encoders=False) as staged:
        report = _report(staged, steps=(50,), batches=(1,), is_one_step=True)
    (timing,) = report.to_json()["timings"]
    assert (timing["steps"], timing["estimate"]["steps"]) == (1, 50)
    assert timing["estimate"]["picture_s"] > 49 * timing["step_s"]


def report_of(*n_images: int, steps: int = 10) -> Report:
    timings = [
        Timing(
            case=Case(width_px=64, height_px=64, steps=steps, n_images=n),
            n_runs=1,
            best_s=2.0,
            worst_s=3.0,
            phases_s={"encode": 0.1, "denoise": 1.0, "decode": 0.5},
            operations=Operations(step=10**9, picture=2 * 10**10),
            limit=Limit(per_s=1e11),
            estimated_steps=30,
        )
        for n in n_images
    ]
    return Report(model="sd15", device="cpu", dtype="float32", first_s=1.0, timings=tuple(timings), weights="random")


def test_shares_and_estimates_follow_from_what_was_measured() -> None:
    timing = report_of(4).timings[0]
    assert timing.step_s == pytest.approx(0.1)
    assert timing.step_share == pytest.approx(4 * 1e9 / (1e11 * 0.1))
    assert timing.picture_share == pytest.approx(4 * 2e10 / (1e11 * 2.0))
    assert timing.estimated_picture_s == pytest.approx((0.6 + 30 * 0.1) / 4)


@pytest.mark.parametrize("n_images", [(1,), (1, 2, 8)])
def test_the_plot_is_a_picture(tmp_path: Path, n_images: tuple[int, ...]) -> None:
    save_plot(report_of(*n_images), tmp_path / "curve.svg")
    root = ET.parse(tmp_path / "curve.svg").getroot()  # noqa: S314 - we wrote it
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "64x64, 10 steps" in words
    assert {str(n) for n in n_images} <= set(words)
    save_plot(report_of(*n_images), tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        image.load()
        assert image.size == (720, 440)


def test_a_plot_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"curve\.pdf"):
        save_plot(report_of(1), tmp_path / "curve.pdf")


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_benchmark_for_cards_runs_whole_at_toy_size() -> None:
    done = _script("benchmarks/gpu.py", "--dry-run", "--requests", "2", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["cases"]) == {"sd15", "sdxl", "sd3.5-medium", "flux-dev"}
    for case in told["cases"].values():
        assert set(case["mixed"]) == {"diffusers", "server B", "server C", "ours"}
        assert (case["psnr_alone_against_company_db"] or 99) > 20


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_the_benchmark_for_cards_says_in_a_line_that_there_is_none() -> None:
    done = _script("benchmarks/gpu.py")
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "no CUDA device" in done.stdout


@pytest.mark.slow
def test_the_servers_are_compared_under_one_load() -> None:
    done = _script("benchmarks/serve_bench.py", "--servers", "C", "B", "--clients", "2", "--requests", "2")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {rows[0]["n_requests"] for rows in told.values()} == {2}
    assert all(rows[0]["images_per_s"] > 0 for rows in told.values())
