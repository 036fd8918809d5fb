"""What a model needs is said before it is loaded: which arrangement fits, in which format, and why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdfleet.catalog import architectures
from sdfleet.domain import Drawing, JobId
from sdfleet.engine.limits import count_work
from sdfleet.engine.needs import Need, needs
from sdfleet.engine.networks.choice import own_network
from sdfleet.engine.random_weights import on_meta, write_checkpoint
from tests.engine.drawing import drawing

GIB = 2**30


@pytest.fixture(scope="module")
def sd35_medium(tmp_path_factory: pytest.TempPathFactory) -> Drawing:
    folder = tmp_path_factory.mktemp("published") / "sd3.5-medium"
    write_checkpoint(architectures.load("sd3.5-medium"), folder)
    return Drawing(
        job_id=JobId("plan"), checkpoint=str(folder), family="sd3", prompt="a", negative_prompt="", width_px=1024,
        height_px=1024, steps=40, guidance=4.5, seed=0, n_images=1, sampler="euler",
    )  # fmt: skip


def on_a_card_of(free_bytes: int, asked: Drawing) -> dict[tuple[str, bool], Need]:
    found = needs(asked, device="cpu", dtype="bfloat16", free_bytes=free_bytes, all_formats=False)
    return {(need.mode, need.with_t5): need for need in found if need.weights is None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_gib", "fits"),
    [
        (24, {("fast", True): "all", ("eco", True): "by_phase", ("fast", False): "all", ("eco", False): "by_phase"}),
        (16, {("eco", True): "by_phase", ("fast", False): "all", ("eco", False): "by_phase"}),
        # T5 alone is 9.5 GB: it comes layer by layer.
        (8, {("eco", True): "by_layer", ("eco", False): "by_phase"}),
    ],
)
def test_sd35_medium_fits_a_card_with_or_without_t5(
    n_gib: int, fits: dict[tuple[str, bool], str], sd35_medium: Drawing
) -> None:
    found = on_a_card_of(n_gib * GIB, sd35_medium)
    assert {key: need.residency for key, need in found.items() if need.fits} == fits
    assert all(need.peak_bytes < 0.9 * n_gib * GIB for need in found.values() if need.fits)
    assert all(f"{n_gib * GIB * 0.9 / 1e9:.1f} GB" in need.why for need in found.values() if need.why is not None)


def test_other_formats_are_looked_at_where_the_one_in_use_does_not_fit(checkpoints: Callable[[str], Path]) -> None:
    asked = drawing("sd15", checkpoints("sd15"))

    def formats(free_bytes: int) -> set[tuple[str, str | None]]:
        found = needs(asked, device="cpu", dtype="auto", free_bytes=free_bytes, all_formats=False)
        return {(need.dtype, need.weights) for need in found}

    assert len(formats(8 * GIB)) == 1
    assert len(formats(1)) > 2


def test_prompts_of_unequal_length_are_counted(checkpoints: Callable[[str], Path]) -> None:
    asked = drawing("zimage", checkpoints("zimage"), prompt="a cat " * 40, negative_prompt="blurry")
    short = count_work(replace(asked, prompt="a cat"))
    assert count_work(asked).step > short.step > 0


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd21"])
def test_our_own_networks_have_the_published_names_and_shapes(name: str) -> None:
    for part in architectures.load(name).parts.values():
        if own_network(part.class_name, part.config) is None:
            continue
        library = __import__("transformers" if part.class_name.startswith("CLIP") else "diffusers")
        published = getattr(library, part.class_name)
        with torch.device("meta"):
            if library.__name__ == "diffusers":
                theirs = published.from_config(dict(part.config))
            else:
                theirs = published(published.config_class(**part.config))
        ours = {key: tensor.shape for key, tensor in on_meta(part).state_dict().items()}
        assert ours == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
