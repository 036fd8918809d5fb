"""Models that are not whole, at toy size."""

from __future__ import annotations

import shutil
from pathlib import Path

from sdfleet.catalog.store import Catalog
from tests.catalog.folders import write_sd, write_sd3
from tests.doctor.stage import cure, look, machine, write


def _imported(folder: Path, name: str = "toy") -> Path:
    weights = write_sd(folder / "weights" / name)
    Catalog(folder / "home/models").add(weights, name=name)
    return weights


def test_whole_models_are_well(tmp_path: Path) -> None:
    _imported(tmp_path)
    assert look("broken-model", machine(tmp_path)).what.startswith("2 models can be loaded")


def test_a_model_without_its_tokenizer_is_told_by_name_with_the_file_that_is_missing(tmp_path: Path) -> None:
    shutil.rmtree(_imported(tmp_path) / "tokenizer")
    there = machine(tmp_path)
    found = look("broken-model", there)
    assert found.what.startswith("toy: ")
    assert "the folder tokenizer/ is missing" in found.what
    assert "from where the checkpoint came" in cure("broken-model", there)


def test_every_fault_of_every_model_is_told_at_once(tmp_path: Path) -> None:
    (_imported(tmp_path, "one") / "tokenizer/merges.txt").unlink()
    unet = _imported(tmp_path, "two") / "unet/diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:-10])
    what = look("broken-model", machine(tmp_path)).what
    assert "one: " in what
    assert "tokenizer/merges.txt is missing" in what
    assert "two: " in what
    assert "truncated" in what


def test_a_t5_tokenizer_of_one_file_is_whole_while_its_packages_are_here(tmp_path: Path) -> None:
    Catalog(tmp_path / "home/models").add(write_sd3(tmp_path / "weights"), name="sd3")
    assert look("broken-model", machine(tmp_path)).verdict == "ok"


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    shutil.rmtree(_imported(tmp_path))
    assert "there is nothing at" in look("broken-model", machine(tmp_path)).what


def test_a_card_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    there = machine(tmp_path)
    write(tmp_path / "home/models/odd.toml", "name = [")
    assert "odd.toml cannot be read" in look("broken-model", there).what
    assert "import again" in cure("broken-model", there)


def test_a_broken_download_is_to_be_pulled_again(tmp_path: Path) -> None:
    weights = write_sd(tmp_path / "home/models/weights/sd15")
    write(weights / "sdfleet.json", "{}")
    (weights / "vae/config.json").unlink()
    assert cure("broken-model", machine(tmp_path)) == "sdfleet models pull sd15"


def test_a_default_model_that_is_not_here_is_told_with_how_to_get_it(tmp_path: Path) -> None:
    assert look("default-model", machine(tmp_path)).verdict == "ok"
    assert cure("default-model", machine(tmp_path, model="sd15")) == "get them: sdfleet models pull sd15"
    assert "did you mean 'starter'" in cure("default-model", machine(tmp_path, model="startr"))


def test_a_download_that_was_cut_off_is_told_with_how_it_goes_on(tmp_path: Path) -> None:
    assert look("unfinished-download", machine(tmp_path)).verdict == "not_applicable"
    write(tmp_path / "home/models/weights/.sd15.part/x")
    assert look("unfinished-download", machine(tmp_path)).cure == "sdfleet models pull sd15"
