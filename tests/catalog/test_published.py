"""The cards of published models, and what is said of a model whose weights are not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfleet.catalog import architectures
from sdfleet.catalog.cards import Card
from sdfleet.catalog.published import published
from sdfleet.catalog.pulled import MANIFEST, Manifest
from sdfleet.catalog.store import Catalog
from sdfleet.engine.sampler_names import parse_sampler
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, InvalidValue, UnknownName
from tests.catalog.folders import write_sd

PROMISED = {
    "sd15", "sd21", "sdxl", "sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo", "flux-dev",
    "flux-schnell", "flux2-klein-4b", "z-image-turbo",
}  # fmt: skip


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "models", built_in=())


def _pretend_pulled(catalog: Catalog, name: str) -> Path:
    folder = write_sd(catalog.weights.path(name))
    manifest = Manifest(name=name, source="hf", endpoint="e", repo_id="a/b", revision="r", files=())
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def test_every_promised_model_has_a_card() -> None:
    assert {card.name for card in published()} == PROMISED


@pytest.mark.parametrize("card", published(), ids=lambda card: card.name)
def test_a_card_says_where_the_model_is_and_under_which_licence(card: Card) -> None:
    assert card.hf
    assert card.modelscope
    assert card.licence
    assert card.licence_url
    assert card.licence_url.startswith("https://")
    assert card.title
    parse_sampler(card.sampler)


@pytest.mark.parametrize("card", published(), ids=lambda card: card.name)
def test_a_card_and_the_architecture_of_the_same_model_agree(card: Card) -> None:
    assert architectures.load(card.architecture or card.name).family == card.family


def test_every_architecture_has_a_card() -> None:
    assert {card.architecture or card.name for card in published()} == set(architectures.names())


def test_no_name_means_two_models() -> None:
    meant: dict[str, str] = {}
    for card in published():
        for name in (card.name, card.hf, card.modelscope, *card.aliases):
            assert name is not None
            assert meant.setdefault(name.casefold(), card.name) == card.name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sd3-medium:latest", "sd3-medium"),
        ("x/z-image-turbo", "z-image-turbo"),
        ("x/z-image-turbo:latest", "z-image-turbo"),
        ("runwayml/stable-diffusion-v1-5", "sd15"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15"),
        ("black-forest-labs/flux.1-schnell", "flux-schnell"),
        ("stabilityai/stable-diffusion-3-medium", "sd3-medium"),
        ("SDXL", "sdxl"),
    ],
)
def test_a_model_is_found_by_what_others_call_it(catalog: Catalog, name: str, meant: str) -> None:
    assert catalog.card(name).name == meant
    with pytest.raises(CheckpointNotFound, match=f"sdfleet models pull {meant}$"):
        catalog.resolve(name)


def test_a_model_without_weights_is_not_among_those_that_can_be_used(catalog: Catalog) -> None:
    assert catalog.entries() == ()
    assert {card.name for card in catalog.absent()} == PROMISED


def test_a_pulled_model_is_used_by_name_and_alias_at_once(catalog: Catalog) -> None:
    folder = _pretend_pulled(catalog, "sd15")
    assert catalog.resolve("sd15").folder == folder
    assert catalog.resolve("runwayml/stable-diffusion-v1-5").folder == folder
    assert [entry.card.name for entry in catalog.entries()] == ["sd15"]
    assert "sd15" not in {card.name for card in catalog.absent()}


def test_an_own_card_with_a_repository_can_be_pulled(catalog: Catalog, tmp_path: Path) -> None:
    card = 'name="own"\nfamily="sd"\nhf="Me/Mine"\nwidth_px=64\nheight_px=64\nsteps=4\nguidance=1.0\nsampler="ddim"\n'
    (tmp_path / "models").mkdir()
    (tmp_path / "models/own.toml").write_text(card)
    assert catalog.card("me/mine").name == "own"
    assert "own" in {card.name for card in catalog.absent()}
    (tmp_path / "models/own.toml").write_text(card.replace('hf="Me/Mine"\n', ""))
    with pytest.raises(BrokenCheckpoint, match="no repository on a hub"):
        catalog.card("own")


def test_an_own_card_wins_over_the_published_one_of_its_name(catalog: Catalog, tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "weights")
    catalog.add(folder, name="sd15")
    assert catalog.resolve("sd15").folder == folder


def test_a_name_of_downloaded_weights_is_not_given_to_an_import(catalog: Catalog, tmp_path: Path) -> None:
    _pretend_pulled(catalog, "sd15")
    with pytest.raises(InvalidValue, match="already stands for"):
        catalog.add(write_sd(tmp_path / "weights"), name="sd15")


def test_removing_an_import_leaves_its_folder(catalog: Catalog, tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "weights")
    before = sorted(folder.rglob("*"))
    catalog.add(folder, name="mine")
    assert catalog.forget("mine") == 0
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(UnknownName):
        catalog.resolve("mine")


def test_removing_a_download_frees_its_bytes_and_nothing_else(catalog: Catalog) -> None:
    kept, gone = _pretend_pulled(catalog, "sdxl"), _pretend_pulled(catalog, "sd15")
    n_bytes = sum(path.stat().st_size for path in gone.rglob("*") if path.is_file())
    assert catalog.forget("sd15") == n_bytes
    assert not gone.exists()
    assert kept.is_dir()
    with pytest.raises(CheckpointNotFound):
        catalog.forget("sd15")


def test_a_link_among_the_weights_is_removed_and_not_what_it_leads_to(catalog: Catalog, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "photo.png").write_bytes(b"dear")
    (_pretend_pulled(catalog, "sd15") / "link").symlink_to(outside)
    catalog.forget("sd15")
    assert (outside / "photo.png").read_bytes() == b"dear"


def test_a_changed_cut_or_missing_file_is_found_by_verify(catalog: Catalog) -> None:
    folder = _pretend_pulled(catalog, "sd15")
    paths = ("vae/config.json", "unet/config.json", "tokenizer/vocab.json", "model_index.json")
    facts = [
        {
            "path": path,
            "n_bytes": (folder / path).stat().st_size,
            "digest_kind": "git",
            "digest": _git_hash(folder / path),
        }
        for path in paths
    ]
    manifest = Manifest.model_validate(
        {"name": "sd15", "source": "hf", "endpoint": "e", "repo_id": "a/b", "revision": "r", "files": facts}
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    assert catalog.weights.verify("sd15") == ()
    (folder / paths[0]).write_bytes(bytes(reversed((folder / paths[0]).read_bytes())))
    (folder / paths[1]).write_bytes(b"")
    (folder / paths[2]).unlink()
    changed, cut, missing = catalog.weights.verify("sd15")
    assert changed.startswith("vae/config.json has changed")
    assert cut.startswith("unet/config.json has 0 bytes instead of")
    assert missing == "tokenizer/vocab.json is missing"


def _git_hash(path: Path) -> str:
    import hashlib

    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
