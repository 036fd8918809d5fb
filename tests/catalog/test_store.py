"""Names and the folders they stand for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from sdfleet.catalog import store
from sdfleet.catalog.cards import Card
from sdfleet.catalog.identify import Identified, identify
from sdfleet.catalog.pulled import MANIFEST, Manifest, ManifestFile
from sdfleet.catalog.store import BuiltIn, Catalog, packaged
from sdfleet.errors import BrokenCheckpoint, CheckpointError, CheckpointNotFound, InvalidValue, UnknownName
from tests.catalog.folders import write_sd


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    card = Card(
        name="house", family="sd", aliases=("home",), width_px=64, height_px=64, steps=4, guidance=2.0, sampler="ddim"
    )
    return Catalog(tmp_path / "models", built_in=(BuiltIn(card, lambda: tmp_path / "house"),))


def test_the_packaged_card_is_valid_and_can_be_drawn_with() -> None:
    card = packaged()[0].card
    assert (card.name, card.width_px, card.height_px, card.steps, card.guidance) == ("starter", 128, 128, 20, 3.0)
    assert card.resizes


def test_a_built_in_model_answers_to_its_name_and_alias(catalog: Catalog) -> None:
    assert catalog.resolve("house") == catalog.resolve("home")
    assert catalog.resolve("house").is_built_in


def test_an_imported_folder_answers_to_its_name(catalog: Catalog, tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "weights")
    catalog.add(folder, name="mine")
    entry = catalog.resolve("mine")
    assert (entry.folder, entry.card.family, entry.card.width_px) == (folder, "sd", 512)
    assert [e.card.name for e in catalog.entries()] == ["house", "mine"]


def test_an_import_leaves_the_weights_as_they_were(catalog: Catalog, tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "weights")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}
    catalog.add(folder, name="mine")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))} == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine.toml"]


def test_an_alias_in_an_imported_card_works(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add(write_sd(tmp_path / "weights"), name="mine")
    card = tmp_path / "models/mine.toml"
    card.write_text('aliases = ["ours"]\n' + card.read_text())
    assert catalog.resolve("ours").card.name == "mine"


def test_an_unknown_name_tells_the_nearest(catalog: Catalog) -> None:
    with pytest.raises(UnknownName, match="did you mean 'house'"):
        catalog.resolve("huose")


@pytest.mark.parametrize(
    "name", ["", "UPPER", "a/b", "..", "../x", ".hidden", "a..b", "a b", "ü", "a\n", "x" * 65, "-x", "a\x00"]
)
def test_a_name_that_could_be_a_path_is_never_imported(catalog: Catalog, tmp_path: Path, name: str) -> None:
    folder = write_sd(tmp_path / "weights")
    with pytest.raises(InvalidValue):
        catalog.add(folder, name=name)
    assert not (tmp_path / "models").exists()


def test_a_name_from_a_request_never_reaches_the_disk(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add(write_sd(tmp_path / "weights"), name="mine")
    (tmp_path / "outside.toml").write_bytes((tmp_path / "models/mine.toml").read_bytes())
    for name in ("../outside", "../models/mine", str(tmp_path / "models/mine"), "mine.toml", "mine\x00"):
        with pytest.raises(UnknownName):
            catalog.resolve(name)


def test_a_taken_name_is_not_given_to_another_folder(catalog: Catalog, tmp_path: Path) -> None:
    first, second = write_sd(tmp_path / "one"), write_sd(tmp_path / "two")
    catalog.add(first, name="mine")
    with pytest.raises(InvalidValue, match="already stands for"):
        catalog.add(second, name="mine")
    with pytest.raises(InvalidValue, match="built-in"):
        catalog.add(second, name="home")
    assert catalog.add(first, name="mine").folder == first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not toml [",
        'name = "bad"\nsurprise = 1',
        "\x00",
        'name = "other"\nfamily="sd"\nwidth_px=64\nheight_px=64\nsteps=4\nguidance=1.0\nsampler="ddim"\nfolder="/x"',
        'name = "bad"\nfamily="sd"\nwidth_px=64\nheight_px=64\nsteps=4\nguidance=1.0\nsampler="ddim"\nfolder="rel"',
        'name = "bad"\nfamily="sd"\nwidth_px=64\nheight_px=64\nsteps=4\nguidance=nan\nsampler="ddim"\nfolder="/x"',
    ],
)
def test_a_broken_card_names_its_file_and_hides_no_other(catalog: Catalog, tmp_path: Path, text: str) -> None:
    folder = write_sd(tmp_path / "weights")
    catalog.add(folder, name="good")
    (tmp_path / "models/bad.toml").write_text(text)
    assert [e.card.name for e in catalog.entries()] == ["house", "good"]
    with pytest.raises(BrokenCheckpoint, match=r"bad\.toml"):
        catalog.resolve("bad")
    assert catalog.add(folder, name="bad").card.name == "bad"


def test_a_card_is_readable_toml_without_the_facts_that_are_absent(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add(write_sd(tmp_path / "weights"), name="mine")
    card = tomllib.loads((tmp_path / "models/mine.toml").read_text())
    assert card["folder"] == str(tmp_path / "weights")
    assert "native_area_px" not in card


def test_a_folder_that_went_away_is_told_when_looked_into(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add(write_sd(tmp_path / "weights"), name="mine")
    (tmp_path / "weights").rename(tmp_path / "moved")
    with pytest.raises(CheckpointNotFound):
        catalog.inspect(catalog.resolve("mine"))


def test_a_data_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    catalog = Catalog(tmp_path / "file/models", built_in=())
    with pytest.raises(CheckpointError, match="SD_HOME"):
        catalog.add(write_sd(tmp_path / "weights"), name="mine")


def test_a_broken_folder_is_not_imported(catalog: Catalog, tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "weights")
    (folder / "vae/config.json").unlink()
    with pytest.raises(BrokenCheckpoint):
        catalog.add(folder, name="mine")
    assert not (tmp_path / "models").exists()


def test_a_folder_is_read_again_when_a_file_of_it_has_changed_and_only_then(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = catalog.add(write_sd(tmp_path / "sd"), name="mine")
    read: list[Path] = []

    def noted(folder: Path) -> Identified:
        read.append(folder)
        return identify(folder)

    monkeypatch.setattr(store, "identify", noted)
    assert catalog.inspect(entry) == catalog.inspect(entry)
    assert len(read) == 1
    (tmp_path / "sd" / "unet" / "config.json").write_text("{", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(BrokenCheckpoint):
            catalog.inspect(entry)


def test_a_downloaded_file_of_another_size_than_announced_is_told_with_the_other_faults(tmp_path: Path) -> None:
    card = Card.model_validate(
        {"name": "toy", "family": "sd", "width_px": 64, "height_px": 64, "steps": 3, "guidance": 4.0,
         "sampler": "ddim", "hf": "someone/toy"}
    )  # fmt: skip
    catalog = Catalog(tmp_path / "models", built_in=(), published_cards=(card,))
    folder = write_sd(catalog.weights.path("toy"), sample_size=8)
    files = tuple(
        ManifestFile(path=str(path.relative_to(folder)), n_bytes=path.stat().st_size, digest_kind="git", digest="0")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    told = Manifest(name="toy", source="hf", endpoint="https://hub", repo_id="someone/toy", revision="1", files=files)
    (folder / MANIFEST).write_text(told.model_dump_json())
    assert catalog.inspect(catalog.resolve("toy")).family == "sd"

    (folder / "tokenizer/merges.txt").write_text("another")
    (folder / "tokenizer/vocab.json").unlink()
    with pytest.raises(BrokenCheckpoint) as caught:
        catalog.inspect(catalog.resolve("toy"))
    assert "has 2 faults: tokenizer/vocab.json is missing; tokenizer/merges.txt has 7 bytes, " in caught.value.message
    assert caught.value.hint == "get it again: sdfleet models rm toy, then sdfleet models pull toy"
