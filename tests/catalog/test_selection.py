"""Which files of a repository are taken: one set of weights for each component, and never a pickle."""

from __future__ import annotations

import pytest

from sdfleet.catalog.hubs.hub import Digest, HubFile
from sdfleet.catalog.selection import select
from sdfleet.errors import BrokenCheckpoint, PickleRefused, UnsupportedByModel

SMALL = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip
WEIGHTS = ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
UNET = "unet/diffusion_pytorch_model"
SHARDS = [*(f"{UNET}-0000{n}-of-00002.safetensors" for n in (1, 2)), f"{UNET}.safetensors.index.json"]


def _taken(*paths: str) -> set[str]:
    files = [HubFile(path=path, n_bytes=1, digest=Digest("sha256", "0" * 64)) for path in paths]
    return {file.path for file in select(files, family="sd", repo_id="a/b")}


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ([f"{UNET}.safetensors"], [f"{UNET}.safetensors"]),
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], [f"{UNET}.fp16.safetensors"]),
        ([f"{UNET}.non_ema.safetensors", f"{UNET}.safetensors"], [f"{UNET}.safetensors"]),
        ([f"{UNET}.bf16.safetensors"], [f"{UNET}.bf16.safetensors"]),
        (
            SHARDS,
            SHARDS,
        ),
        (
            [
                f"{UNET}-00001-of-00001.safetensors", f"{UNET}.safetensors.index.json",
                f"{UNET}.fp16-00001-of-00001.safetensors", f"{UNET}.safetensors.index.fp16.json",
            ],
            [f"{UNET}.fp16-00001-of-00001.safetensors", f"{UNET}.safetensors.index.fp16.json"],
        ),
        (
            [f"{UNET}.safetensors", f"{UNET}.bin", "v1-5.ckpt", "v1-5.safetensors"],
            [f"{UNET}.safetensors"],
        ),
    ],
)  # fmt: skip
def test_one_set_of_weights_is_taken(there: list[str], taken: list[str]) -> None:
    assert _taken(*SMALL, *WEIGHTS, *there) == {*SMALL, *WEIGHTS, *taken}


CHECKER = "safety_checker/model"
PREPARATION = "feature_extractor/preprocessor_config.json"


def test_the_safety_checker_comes_along_in_one_format_with_its_preparation() -> None:
    there = ("safety_checker/config.json", f"{CHECKER}.safetensors", f"{CHECKER}.fp16.safetensors", PREPARATION)
    taken = _taken(*SMALL, *WEIGHTS, f"{UNET}.safetensors", *there, "safety_checker/pytorch_model.bin")
    assert {path for path in taken if path.startswith(("safety_checker/", "feature_extractor/"))} == {
        "safety_checker/config.json", f"{CHECKER}.fp16.safetensors", PREPARATION
    }  # fmt: skip


def test_a_safety_checker_of_pickles_alone_is_left_where_it_is() -> None:
    there = ("safety_checker/config.json", "safety_checker/pytorch_model.bin", f"{UNET}.safetensors")
    assert _taken(*SMALL, *WEIGHTS, *there) == {*SMALL, *WEIGHTS, f"{UNET}.safetensors"}


def test_only_a_family_that_has_a_checker_takes_one() -> None:
    names = (
        *SMALL,
        *WEIGHTS,
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer_2/vocab.json",
    )
    files = [
        HubFile(path=path, n_bytes=1, digest=Digest("sha256", "0" * 64))
        for path in (*names, f"{UNET}.safetensors", "safety_checker/config.json", f"{CHECKER}.safetensors")
    ]
    taken = {file.path for file in select(files, family="sdxl", repo_id="a/b")}
    assert not any(path.startswith("safety_checker/") for path in taken)


def test_a_component_of_pickles_alone_is_refused() -> None:
    with pytest.raises(PickleRefused, match=r"unet/diffusion_pytorch_model\.bin"):
        _taken(*SMALL, *WEIGHTS, f"{UNET}.bin")


def test_a_repository_that_lacks_a_component_is_told() -> None:
    with pytest.raises(BrokenCheckpoint, match="lacks unet/"):
        _taken(*(path for path in SMALL if not path.startswith("unet/")), *WEIGHTS)


def test_a_repository_of_a_single_file_is_told_how_to_get_in() -> None:
    with pytest.raises(UnsupportedByModel, match="sdfleet models import"):
        _taken("model.safetensors", "README.md")
