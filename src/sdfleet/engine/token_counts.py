"""How much of a prompt each text encoder of a checkpoint will read, counted while somebody writes it; no torch here.

The same tokenizers, cut into the same windows, as when the picture is drawn. Where only transformers can read a
tokenizer's files (T5's spiece.model), or the files are on another machine, nothing is counted for that encoder.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from sdfleet.catalog.cards import Family
from sdfleet.domain import TokenCount
from sdfleet.engine.networks.tokenizer import ClipTokenizer
from sdfleet.engine.prompt import parse_prompt, split_into_chunks
from sdfleet.engine.prompt_tags import read_tags
from sdfleet.errors import CheckpointError

# Of each family: what TokenCount calls an encoder, the folder of its tokenizer, and the ids of a window without marks.
# Those that are no CLIP take a prompt of any sensible length in one piece; their window is what they were trained on.
_ENCODERS: dict[Family, tuple[tuple[str, str, int], ...]] = {
    "sd": (("clip", "tokenizer", 75),),
    "sdxl": (("clip_l", "tokenizer", 75), ("clip_g", "tokenizer_2", 75)),
    "sd3": (("clip_l", "tokenizer", 75), ("clip_g", "tokenizer_2", 75), ("t5", "tokenizer_3", 255)),
    "flux": (("clip_l", "tokenizer", 75), ("t5", "tokenizer_2", 511)),
    "flux2": (("qwen", "tokenizer", 512),),
    "zimage": (("qwen", "tokenizer", 512),),
    # Whoever draws it reads the prompt by a tokenizer that is not here.
    "other": (),
}
_IN_ONE_PIECE = frozenset({"t5", "qwen"})
# A Tokenizer is not meant for several threads at once.
_ONE_AT_A_TIME = threading.Lock()

Tokenize = Callable[[str], Sequence[int]]


def count_tokens(folder: Path, family: Family, prompt: str) -> tuple[TokenCount, ...]:
    """What each encoder will read of a prompt, as far as its tokenizer is here. Raises PromptSyntax."""
    text, _ = read_tags(prompt)
    parsed = parse_prompt(text)
    counts = []
    for name, part, window in _ENCODERS[family]:
        tokenize = _tokenizer(folder / part, is_clip=name not in _IN_ONE_PIECE)
        if tokenize is None:
            continue
        with _ONE_AT_A_TIME:
            if name in _IN_ONE_PIECE:
                n_tokens, n_chunks = len(tokenize(parsed.text)), 1
            else:
                comma = tokenize(",")
                chunks = split_into_chunks(
                    parsed, tokenize, window=window, comma_id=comma[0] if len(comma) == 1 else None
                )
                n_tokens, n_chunks = sum(len(chunk.ids) for chunk in chunks), len(chunks)
        counts.append(TokenCount(encoder=name, n_tokens=n_tokens, window=window, n_chunks=n_chunks))
    return tuple(counts)


@functools.lru_cache(maxsize=16)
def _tokenizer(folder: Path, *, is_clip: bool) -> Tokenize | None:
    """What turns text into ids; None where it is not here, or not in a form that is read without transformers."""
    if is_clip and (folder / "tokenizer_config.json").is_file():
        try:
            clip = ClipTokenizer.read(folder)
        except (CheckpointError, OSError, ValueError, KeyError):
            # A broken folder is told of, with its cure, when somebody draws with it.
            return None
        if clip is not None:
            return clip.ids
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    whole = Tokenizer.from_file(str(file))
    return lambda text: whole.encode(text, add_special_tokens=False).ids
