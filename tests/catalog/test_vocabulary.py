"""CLIP's vocabulary comes with the package, and is the published one."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sdfleet.catalog.single_file.importing import import_file
from sdfleet.catalog.single_file.vocabulary import (
    N_CLIP_TOKENS,
    clip_merges,
    clip_vocabulary,
    write_clip_vocabulary,
)
from sdfleet.catalog.store import Catalog
from sdfleet.engine.networks.tokenizer import ClipTokenizer
from tests import single_files

MARKS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
# Ids that OpenAI's own notebook and many a test of other programs show.
KNOWN = {"a photo of a cat": [320, 1125, 539, 320, 2368], "hello world!": [3306, 1002, 256]}
SCRIPTS = (
    range(32, 127), range(160, 592), range(880, 1328), range(0x600, 0x700), range(0x3040, 0x30FF),
    range(0x4E00, 0x4F00), range(0x1F300, 0x1F650), (9, 10, 0x200D, 0xFE0F, 0x301, 0xE000),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    write_clip_vocabulary(made)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    marks = MARKS | {"pad_token": "<|endoftext|>"}
    (made / "tokenizer_config.json").write_text(json.dumps(config | marks))
    (made / "special_tokens_map.json").write_text(json.dumps(marks))
    return made


def test_the_merges_are_the_published_ones() -> None:
    text = "\n".join(clip_merges()) + "\n"

    assert hashlib.sha256(text.encode()).hexdigest() == (
        "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    )


def test_every_token_has_an_id_and_the_marks_have_the_last() -> None:
    vocabulary = clip_vocabulary(clip_merges())

    assert sorted(vocabulary.values()) == list(range(N_CLIP_TOKENS))
    assert (vocabulary["!"], vocabulary["a</w>"]) == (0, 320)
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)


@pytest.mark.parametrize(("text", "ids"), KNOWN.items())
def test_known_texts_have_their_known_ids(folder: Path, text: str, ids: list[int]) -> None:
    tokenizer = ClipTokenizer.read(folder)

    assert tokenizer is not None
    assert tokenizer.ids(text) == ids


def test_any_text_is_read_as_transformers_reads_it(folder: Path) -> None:
    ours, theirs = (
        ClipTokenizer.read(folder),
        transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=10**6),
    )
    chance = random.Random(3)
    letters = [chr(code) for script in SCRIPTS for code in script]
    texts = ["".join(chance.choices(letters, k=chance.randint(1, 40))) for _ in range(1000)]
    texts += ["naïve café ﬁancé", "日本語の猫", "👩‍👩‍👧 family", "l'été, it's 12:30!!", "<|endoftext|> inside", ""]

    assert ours is not None
    assert [ours.ids(text) for text in texts] == [theirs(text, add_special_tokens=False).input_ids for text in texts]


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_a_single_file_with_clips_own_tokens_needs_no_base(tmp_path: Path, kind: str) -> None:
    _, file = single_files.write(kind, tmp_path)
    state = {name: _enlarged(name, weight) for name, weight in load_file(file).items()}
    save_file(state, file)

    entry = import_file(
        Catalog(tmp_path / "models"), file, name="mine", base=None, prediction=None, check=lambda _: None
    ).entry

    tokenizer: Any = ClipTokenizer.read(entry.folder / "tokenizer")
    assert tokenizer.ids("a photo of a cat") == KNOWN["a photo of a cat"]
    # Stable Diffusion 2.x fills up short prompts with "!".
    assert tokenizer.pad_token_id == (0 if kind == "sd21" else 49407)


def _enlarged(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A text encoder's table with a row for each of CLIP's tokens."""
    if not name.endswith("token_embedding.weight"):
        return weight
    return torch.nn.functional.pad(weight, (0, 0, 0, N_CLIP_TOKENS - len(weight)))
