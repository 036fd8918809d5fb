"""The tokenizer: byte-pair pieces learned from captions, in the form every CLIP text encoder expects.

Every word of the world is one token; other words fall into smaller pieces, down to single bytes, so no prompt is
ever unknown.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdfleet.train.captions import caption
from sdfleet.train.world import sample_spec

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 32
N_PIECES = 1200
N_CAPTIONS = 60_000
# Pieces seen less often than this come from the random words of the captions, not from the world.
MIN_FREQUENCY = 60
WORD_PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_tokenizer(seed: int) -> CLIPTokenizer:
    """A tokenizer learned from random captions."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=N_PIECES,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    rng = random.Random(f"{seed} tokenizer")
    learner.train_from_iterator((caption(sample_spec(rng), rng) for _ in range(N_CAPTIONS)), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = dict.fromkeys([*alphabet, *(f"{letter}</w>" for letter in alphabet)])
    pieces |= dict.fromkeys("".join(pair) for pair in merges)
    names = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={name: index for index, name in enumerate(names)}, merges=merges, model_max_length=MAX_TOKENS
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer saved in a work folder."""
    from transformers import CLIPTokenizer

    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return tokenizer


def encode_captions(tokenizer: CLIPTokenizer, texts: list[str]) -> NDArray[np.int16]:
    """Token ids [n, 32] int16: start, words, end, padded with the end token, cut to 32."""
    encoded = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="np")
    ids: NDArray[np.int16] = encoded["input_ids"].astype(np.int16)
    return ids
