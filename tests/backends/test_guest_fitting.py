"""Which folders and requests the engines of other projects take, read from small files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sdfleet.backends.choice import OWN_RANK
from sdfleet.backends.guests.ways import ways
from sdfleet.catalog.cards import Card
from sdfleet.domain import ImageRequest, LoraUse, Picture
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests.fitting import Fit, GuestId, Wish, fit, remarks, unsaid
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel


def folder(
    root: Path, pipeline: str, *, transformer: Mapping[str, Any] | None = None, without: str = "", **index: Any
) -> Path:
    """A folder in the diffusers layout whose weights are ten bytes each."""
    (root / "transformer").mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **index}))
    (root / "transformer" / "config.json").write_text(json.dumps(transformer or {}))
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (root / name).mkdir(exist_ok=True)
        if name != without:
            (root / name / "model.safetensors").write_bytes(b"0123456789")
    return root


@pytest.mark.parametrize(
    ("guest", "pipeline", "config", "index", "kind", "guidance"),
    [
        ("mflux", "ZImagePipeline", {}, {}, "zimage", False),
        ("mflux", "FluxPipeline", {"guidance_embeds": True}, {}, "flux_dev", True),
        ("mflux", "FluxPipeline", {"guidance_embeds": False}, {}, "flux_schnell", False),
        ("mflux", "Flux2KleinPipeline", {}, {"is_distilled": True}, "klein", False),
        ("mflux", "Flux2KleinPipeline", {}, {"is_distilled": False}, "klein_base", True),
        ("diffusionkit", "StableDiffusion3Pipeline", {}, {}, "sd3", True),
    ],
)
def test_the_kind_of_model_is_read_from_its_configs(
    tmp_path: Path, guest: GuestId, pipeline: str, config: dict[str, Any], index: dict[str, Any], kind: str,
    guidance: bool,  # noqa: FBT001
) -> None:  # fmt: skip
    found = fit(guest, folder(tmp_path / "it", pipeline, transformer=config, **index))
    assert (found.kind, found.takes_guidance) == (kind, guidance)
    assert found.weights_bytes in {30, 40}


@pytest.mark.parametrize(
    ("guest", "pipeline", "config", "why"),
    [
        ("mflux", "StableDiffusionXLPipeline", {}, "and it is a StableDiffusionXLPipeline"),
        ("mflux", "FluxFillPipeline", {}, "and it is a FluxFillPipeline"),
        ("mflux", "FluxPipeline", {"quantization_config": {}}, "quantised"),
        ("diffusionkit", "StableDiffusion3Pipeline", {"dual_attention_layers": [0]}, "3.5 medium"),
        ("diffusionkit", "FluxPipeline", {}, "and it is a FluxPipeline"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    tmp_path: Path, guest: GuestId, pipeline: str, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(UnsupportedByModel, match=why):
        fit(guest, folder(tmp_path / "it", pipeline, transformer=config))


def test_a_model_in_a_single_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedByModel, match="it/vae holds no safetensors file"):
        fit("mflux", folder(tmp_path / "it", "FluxPipeline", without="vae"))


def test_a_config_that_is_no_json_is_a_broken_checkpoint(tmp_path: Path) -> None:
    made = folder(tmp_path / "it", "FluxPipeline")
    (made / "model_index.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match=r"model_index\.json"):
        fit("mflux", made)


TURBO = Fit(guest="mflux", kind="zimage", takes_guidance=False, takes_negative_prompt=False, weights_bytes=1)
KLEIN = Fit(guest="mflux", kind="klein", takes_guidance=False, takes_negative_prompt=False, weights_bytes=1)
SD3 = Fit(guest="diffusionkit", kind="sd3", takes_guidance=True, takes_negative_prompt=True, weights_bytes=1)


@pytest.mark.parametrize(
    ("fitted", "wish", "why"),
    [
        (TURBO, Wish(prompt="x", has_loras=True), "LoRAs"),
        (TURBO, Wish(prompt="x", has_embeddings=True), "embeddings"),
        (TURBO, Wish(prompt="x", has_mask=True, has_image=True), "mask"),
        (TURBO, Wish(prompt="x", width_px=512, height_px=520), "the height is 520"),
        (TURBO, Wish(prompt="x", has_image=True, steps=1, strength=0.5), "leave none to draw"),
        (KLEIN, Wish(prompt="x", has_image=True, strength=1.0), "does not edit"),
        (KLEIN, Wish(prompt="x", has_image=True), "does not edit"),
        (SD3, Wish(prompt="x", has_image=True, width_px=80, height_px=64), "multiples of 64"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_not_drawn_otherwise(fitted: Fit, wish: Wish, why: str) -> None:
    with pytest.raises(UnsupportedByModel, match=why):
        remarks(fitted, wish)


def test_what_is_drawn_as_asked_has_no_remarks() -> None:
    plain = Wish(prompt="a cat", width_px=64, height_px=96, steps=8, guidance=0.0, sampler="euler")
    assert (remarks(TURBO, plain), unsaid(TURBO, plain)) == ((), ("guidance",))
    guided = Wish(prompt="a cat", negative_prompt="dog", guidance=7.0, sampler="euler", has_image=True, strength=0.5)
    assert (remarks(SD3, guided), unsaid(SD3, guided)) == ((), ())


def test_each_option_without_effect_is_told_and_left_out_of_the_metadata() -> None:
    wish = Wish(
        prompt="a (cat:1.3)", negative_prompt="dog", guidance=4.0, sampler="dpm++_2m karras", step_cache="light",
        t5="skip",
    )  # fmt: skip
    said = " / ".join(remarks(TURBO, wish))
    for word in ("guidance", "negative prompt", "dpm++_2m karras was not used", "weights", "step cache", "T5"):
        assert word in said
    assert unsaid(TURBO, wish) == ("guidance", "sampler")


CARD = Card(
    name="turbo", family="zimage", width_px=1024, height_px=1024, steps=8, guidance=0.0, sampler="euler",
    ignores=("negative_prompt",),
)  # fmt: skip


def test_the_choice_is_told_of_both_also_where_they_are_not_installed(tmp_path: Path) -> None:
    made = folder(tmp_path / "it", "ZImagePipeline")
    mflux, diffusionkit = ways(tmp_path, EngineOptions(), folder_of=lambda _: made)
    assert (mflux.id, mflux.families) == ("mflux", ("zimage", "flux", "flux2"))
    assert mflux.reason() == "mflux is not installed: sdfleet backend install mflux"
    assert mflux.backend.capabilities().state == "unavailable"
    assert diffusionkit.rank > OWN_RANK
    assert mflux.check(CARD, ImageRequest(prompt="a cat", negative_prompt="dog")) == ()
    assert mflux.check(CARD, ImageRequest(prompt="a cat", guidance=3.0)) == (
        "guidance was left out: this model takes none with mflux",
    )
    with pytest.raises(UnsupportedByModel, match="LoRAs"):
        mflux.check(CARD, ImageRequest(prompt="a cat <lora:ink:1>"))
    with pytest.raises(UnsupportedByModel, match="LoRAs"):
        mflux.check(CARD, ImageRequest(prompt="a cat", loras=(LoraUse(name="ink"),)))
    picture = Picture(width_px=16, height_px=16, mode="RGB", data=bytes(768))
    with pytest.raises(UnsupportedByModel, match="none to draw"):
        mflux.check(CARD, ImageRequest(prompt="a cat", image=picture, steps=1, strength=0.5))
    with pytest.raises(UnsupportedByModel, match="and it is a ZImagePipeline"):
        diffusionkit.check(CARD, ImageRequest(prompt="a cat"))
