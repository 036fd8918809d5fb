"""CLIP's vocabulary, which no single file holds and each with CLIP inside needs. Source: vocabularies/README.md."""

from __future__ import annotations

import json
import lzma
from importlib import resources
from pathlib import Path

# Of every published CLIP; a text encoder with another number of tokens was given more of them by whoever trained it.
N_CLIP_TOKENS = 49_408
CLIP_MARKS = ("<|startoftext|>", "<|endoftext|>")
_WORD_END = "</w>"
# Bytes that stand for themselves in Latin-1: what is seen on paper. The others are moved past them.
_SEEN = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))


def write_clip_vocabulary(folder: Path) -> None:
    """Put vocab.json and merges.txt into a tokenizer's folder, as transformers and our own tokenizer read them."""
    merges = clip_merges()
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def clip_merges() -> list[str]:
    """Pairs of tokens that become one, each as its two parts with a space between, best first."""
    packed = resources.files("sdfleet.catalog").joinpath("vocabularies", "clip_merges.txt.xz").read_bytes()
    return lzma.decompress(packed).decode().splitlines()


def clip_vocabulary(merges: list[str]) -> dict[str, int]:
    """Every token and its id: the bytes, the bytes that end a word, the merges, the marks."""
    letters = _letters()
    tokens = [*letters, *(letter + _WORD_END for letter in letters)]
    tokens += [merge.replace(" ", "", 1) for merge in merges]
    return {token: i for i, token in enumerate((*tokens, *CLIP_MARKS))}


def _letters() -> list[str]:
    """A letter that can be seen for each of the 256 bytes: those of Latin-1 first, then those that have none."""
    n_unseen = 2**8 - len(_SEEN)
    return [chr(byte) for byte in (*_SEEN, *range(2**8, 2**8 + n_unseen))]
