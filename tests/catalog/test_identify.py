"""What a folder is told to be, and how its faults are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdfleet.catalog.component import TO_READ_PIECES
from sdfleet.catalog.identify import identify
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, PickleRefused, SdfleetError, UnsupportedByModel
from tests.catalog.folders import (
    safetensors,
    write_flux,
    write_klein,
    write_refiner,
    write_sd,
    write_sd3,
    write_sdxl,
    write_zimage,
)

KLEINS = ("distilled", "base")


@pytest.mark.parametrize(
    ("write", "family", "side_px", "steps", "guidance", "sampler"),
    [
        (write_sd, "sd", 512, 30, 7.5, "ddim"),
        (write_sdxl, "sdxl", 1024, 30, 5.0, "euler"),
        (write_refiner, "sdxl", 1024, 30, 5.0, "euler"),
        (write_sd3, "sd3", 1024, 28, 7.0, "euler"),
        (write_flux, "flux", 1024, 28, 3.5, "euler"),
        (write_klein, "flux2", 1024, 4, 1.0, "euler"),
        (write_zimage, "zimage", 1024, 8, 0.0, "euler"),
    ],
)
def test_family_and_defaults_come_from_the_configs(
    tmp_path: Path,
    write: Callable[[Path], Path],
    family: str,
    side_px: int,
    steps: int,
    guidance: float,
    sampler: str,
) -> None:
    found = identify(write(tmp_path / "x"))
    assert (found.family, found.width_px, found.height_px) == (family, side_px, side_px)
    assert (found.steps, found.guidance, found.sampler) == (steps, guidance, sampler)


@pytest.mark.parametrize(
    ("pipeline", "steps", "guidance"),
    [
        ("FluxPipeline", 28, 3.5),
        ("FluxImg2ImgPipeline", 28, 3.5),
        ("FluxFillPipeline", 50, 30.0),
        ("FluxKontextPipeline", 28, 2.5),
    ],
)
def test_each_flux_1_is_drawn_with_as_its_authors_do(
    tmp_path: Path, pipeline: str, steps: int, guidance: float
) -> None:
    found = identify(write_flux(tmp_path / "x", pipeline=pipeline))
    assert (found.steps, found.guidance, found.t5) == (steps, guidance, "here")
    assert found.ignores == ("negative_prompt",)


def test_schnell_is_told_by_a_network_that_takes_no_guidance(tmp_path: Path) -> None:
    found = identify(write_flux(tmp_path / "x", takes_guidance=False))
    assert (found.steps, found.guidance) == (4, 0.0)
    assert found.ignores == ("negative_prompt", "guidance")


def test_klein_base_is_guided_and_only_the_distilled_ignores_guidance(tmp_path: Path) -> None:
    distilled, base = (identify(write_klein(tmp_path / name, is_distilled=name == "distilled")) for name in KLEINS)
    assert distilled.ignores == ("negative_prompt", "guidance")
    assert (base.steps, base.guidance, base.ignores) == (50, 4.0, ())


def test_stable_diffusion_2_1_draws_at_768(tmp_path: Path) -> None:
    assert identify(write_sd(tmp_path / "x", sample_size=96)).width_px == 768


def test_an_inpaint_pipeline_is_the_same_family(tmp_path: Path) -> None:
    assert identify(write_sd(tmp_path / "x", pipeline="StableDiffusionInpaintPipeline")).family == "sd"


def test_sizes_are_told_per_component_and_dtype(tmp_path: Path) -> None:
    found = identify(write_sd(tmp_path / "x"))
    sizes = {part.name: dict(part.bytes_by_dtype) for part in found.components}
    assert sizes["unet"] == {"F16": 8 * 4 * 3 * 3 * 2}
    assert sizes["tokenizer"] == {}
    assert found.n_bytes == sum(n for dtypes in sizes.values() for n in dtypes.values())


@pytest.mark.parametrize("name", ["Flux2Pipeline", "StableDiffusionUpscalePipeline", "QwenImagePipeline"])
def test_a_class_we_do_not_serve_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedByModel, match=f"{name} is not served yet"):
        identify(write_sd(tmp_path / "x", pipeline=name))


def test_an_sdxl_that_only_lacks_its_first_encoder_is_no_refiner(tmp_path: Path) -> None:
    folder = write_sdxl(tmp_path / "x")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenCheckpoint, match="names no text_encoder"):
        identify(folder)


def test_every_fault_is_in_one_message(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    shutil.rmtree(folder / "scheduler")
    (folder / "tokenizer/merges.txt").unlink()
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(
        safetensors({"conv_in.weight": (8, 4, 3, 3)})[:-7]
    )
    (folder / "vae/config.json").write_text("{")
    (folder / "text_encoder/model.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint) as caught:
        identify(folder)
    text = str(caught.value)
    for part in (
        "5 faults",
        "folder scheduler/ is missing",
        "tokenizer/merges.txt is missing",
        "unet/diffusion_pytorch_model.safetensors is truncated: 7 of 576 bytes",
        "vae/config.json is not JSON",
        "text_encoder/ has no weights",
    ):
        assert part in text
    assert "\n" not in text


def test_weights_of_another_config_are_found_out(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(safetensors({"conv_in.weight": (8, 9, 3, 3)}))
    with pytest.raises(BrokenCheckpoint, match="says in_channels 4, its weights have 9"):
        identify(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"conv_in.weight": names[0], "other": names[1]}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenCheckpoint, match=f"unet/{names[1]} is missing"):
        identify(folder)
    (folder / "unet" / names[1]).write_bytes(safetensors({"other": (2,)}))
    assert identify(folder).family == "sd"


def test_a_shard_of_another_checkpoint_is_found_out(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    weights.rename(folder / "unet" / shard)
    index = {"weight_map": {"conv_in.weight": shard, "conv_out.weight": shard, "mid.weight": shard}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenCheckpoint, match=f"unet/{shard} lacks 'conv_out.weight' and 1 more tensors of"):
        identify(folder)


def test_a_pickle_is_told_among_other_faults_with_its_own_cure(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    (folder / "tokenizer/vocab.json").unlink()
    with pytest.raises(BrokenCheckpoint) as caught:
        identify(folder)
    assert "2 faults: tokenizer/vocab.json is missing; " in caught.value.message
    assert "is a pickle" in caught.value.message
    assert "convert it to .safetensors" in caught.value.message


def test_a_table_of_positions_limits_the_size_that_is_suggested(tmp_path: Path) -> None:
    folder = write_sd3(tmp_path / "x")
    file = folder / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pos_embed_max_size": 24, "patch_size": 2}))
    assert identify(folder).width_px <= 24 * 2 * 8


def test_a_shard_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "unet/inside.safetensors").write_bytes(safetensors({"other": (2,)}))
    index = {"weight_map": {"other": "inside.safetensors", "conv_in.weight": "../../outside.safetensors"}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenCheckpoint, match="no shards that can be read"):
        identify(folder)


def test_an_fp16_variant_alone_is_enough(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert identify(folder).family == "sd"


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_weights_that_exist_only_as_a_pickle_are_refused(tmp_path: Path, suffix: str) -> None:
    folder = write_sd(tmp_path / "x")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(suffix))
    with pytest.raises(PickleRefused, match="can run any code"):
        identify(folder)


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    assert identify(folder).family == "sd"


def test_a_path_to_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(PickleRefused):
        identify(path)


def test_a_single_file_among_folders_is_told_how_to_become_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"a": (2,)}))
    with pytest.raises(UnsupportedByModel, match="sdfleet models import FILE"):
        identify(path)


def test_one_component_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "x")
    with pytest.raises(BrokenCheckpoint, match="AutoencoderKL, a part of a checkpoint; give the folder above it"):
        identify(folder / "vae")


def test_nothing_at_the_path_is_told_as_that(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        identify(tmp_path / "nowhere")


def test_sd3_may_come_without_t5(tmp_path: Path) -> None:
    assert identify(write_sd3(tmp_path / "with")).t5 == "here"
    assert identify(write_sd3(tmp_path / "without", has_t5=False)).t5 == "left_out"
    assert identify(write_sd(tmp_path / "sd")).t5 == "never_had"


@pytest.mark.parametrize("text", ["", "[]", '{"_class_name": 5}', '{"_class_name": null}', "{", "\x00"])
def test_a_broken_index_is_an_error_of_ours(tmp_path: Path, text: str) -> None:
    folder = write_sd(tmp_path / "x")
    (folder / "model_index.json").write_text(text)
    with pytest.raises(SdfleetError):
        identify(folder)


# Slow for the import of torch and diffusers alone.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sd15", "sd21", "sdxl", "sd3", "klein", "zimage", "sdxl-refiner", "flux-dev", "flux-fill"]
)
def test_what_diffusers_itself_saves_is_identified(checkpoints: Callable[[str], Path], name: str) -> None:
    found = identify(checkpoints(name))
    assert found.family == {"sd15": "sd", "sd21": "sd", "klein": "flux2"}.get(name, name.partition("-")[0])
    assert found.n_bytes > 0


def test_a_package_that_a_tokenizer_needs_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_flux(tmp_path / "x")
    identify(folder)
    monkeypatch.setitem(TO_READ_PIECES, "sentencepiece", "no_such.module")
    with pytest.raises(BrokenCheckpoint, match=r"tokenizer_2 needs the package sentencepiece, .*pip install"):
        identify(folder)
    # With the whole tokenizer in one file, nobody has to read the pieces.
    (folder / "tokenizer_2/tokenizer.json").write_text("{}")
    identify(folder)
