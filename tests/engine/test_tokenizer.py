"""Our CLIP tokenizer gives the ids that transformers' gives, for every way in which checkpoints describe one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from sdfleet import starter
from sdfleet.engine.networks.tokenizer import ClipTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("o", "n</w>"), ("!", "!</w>")]
LETTERS = sorted(ByteLevel.alphabet())
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *(a + b for a, b in MERGES), BEGIN, END]

TEXTS = [
    "a cat on the moon, red sky",
    "Hello!! World! wow!no ! !!",
    f"{END} a {BEGIN}b{END}",
    f"{END.upper()} A",
    "it's we'll they'd don't STOP\u2014now\u2026",
    "\u00c0\u00c9 \u00f1  \t x\n\n y e\u0301 \u00e9 \u200b",
    "\u65e5\u672c\u8a9e \U0001f431 cat 123 4.5",
    "",
    "   ",
    "a" * 300,
    "the cat</w> on",
]


def _mark(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **flags}


def _marks(pad: str) -> dict[str, Any]:
    return {"bos_token": _mark(BEGIN), "eos_token": _mark(END), "unk_token": _mark(END), "pad_token": pad}


def _noted(pad: str) -> dict[str, Any]:
    """As tokenizer_config.json had them in 2022."""
    marks = {
        name: {"__type": "AddedToken", **mark} if isinstance(mark, dict) else mark for name, mark in _marks(pad).items()
    }
    return {"model_max_length": 77, "add_prefix_space": False, "do_lower_case": True, "errors": "replace", **marks}


def _decoder(*tokens: dict[str, Any]) -> dict[str, Any]:
    return {str(TOKENS.index(token["content"])): {**token, "special": True} for token in tokens}


LAYOUTS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "sd 1.5": (_noted(END), _marks(END)),
    "sd 2.1, the map has the word": (_noted(END), _marks("!")),
    "sdxl's second": (
        {
            "model_max_length": 77, "bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": "!",
            "added_tokens_decoder": _decoder(_mark("!", normalized=False), _mark(BEGIN), _mark(END)),
            "clean_up_tokenization_spaces": True, "tokenizer_class": "CLIPTokenizer",
        },
        _marks("!"),
    ),
    "nothing but the words": (None, None),
}  # fmt: skip


def _write(folder: Path, config: Mapping[str, Any] | None, noted: Mapping[str, Any] | None) -> Path:
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", noted)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def _assert_equal(folder: Path) -> None:
    ours, theirs = ClipTokenizer.read(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours is not None
    chance = random.Random(0)
    scribbles = ["".join(chance.choices("ab cT!,.<|>'\u00e9\u00df\u65e5\U0001f431\t\n0", k=40)) for _ in range(200)]
    for text in TEXTS + scribbles:
        expected = theirs(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        assert ours.ids(text) == expected, text
    marks = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(ours, name) for name in marks] == [getattr(theirs, name) for name in marks]
    assert ours.model_max_length == pytest.approx(theirs.model_max_length)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_marks_are_transformers_own(layout: str, tmp_path: Path) -> None:
    _assert_equal(_write(tmp_path / "tokenizer", *LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_transformers_saves_again_is_read_alike(layout: str, tmp_path: Path) -> None:
    first = _write(tmp_path / "tokenizer", *LAYOUTS[layout])
    CLIPTokenizer.from_pretrained(first).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").is_file()
    _assert_equal(tmp_path / "again")


def test_the_built_in_models_tokenizer_is_transformers_own() -> None:
    _assert_equal(starter.weights_path() / "tokenizer")


def _with_a_word_of_its_own(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<my-cat>": 900}')


def _with_a_mark_of_its_own(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({**_marks(END), "extra_special_tokens": ["<my-cat>"]}))


def _with_an_option_of_tomorrow(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({**_noted(END), "split_special_tokens": True}))


def _with_a_mark_outside_the_vocabulary(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps(_marks("<pad>")))


@pytest.mark.parametrize(
    "change",
    [
        _with_a_word_of_its_own,
        _with_a_mark_of_its_own,
        _with_an_option_of_tomorrow,
        _with_a_mark_outside_the_vocabulary,
    ],
)
def test_a_tokenizer_with_more_than_clips_own_is_left_to_transformers(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = _write(tmp_path / "tokenizer", *LAYOUTS["sd 1.5"])
    change(folder)
    assert ClipTokenizer.read(folder) is None
