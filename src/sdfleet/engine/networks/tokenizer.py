"""CLIP's tokenizer: lower case, bytes, pairs merged by rank, as its authors published it (arXiv:1508.07909).

Built on the `tokenizers` package as transformers' class is, without the second that importing transformers takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sdfleet.catalog.headers import read_json

_MARKS = ("bos_token", "eos_token", "unk_token", "pad_token")
_DEFAULT_MARKS = dict.fromkeys(_MARKS, "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
# Words, single digits, runs of signs, and English endings, each on its own.
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# What transformers takes for "no limit" where the config names none.
_NO_LIMIT = 10**30
# Of tokenizer_config.json: what is read, and what changes no token of a prompt.
_KNOWN_OPTIONS = frozenset(
    (
        *_MARKS, "model_max_length", "added_tokens_decoder", "tokenizer_class", "name_or_path", "do_lower_case",
        "special_tokens_map_file", "errors", "add_prefix_space", "clean_up_tokenization_spaces", "backend", "is_local",
        "local_files_only", "processor_class",
    )
)  # fmt: skip


class ClipTokenizer:
    """Texts into ids. bos_token_id, eos_token_id, pad_token_id: what a window begins, ends and is filled up with.

    model_max_length: ids in a window with both marks; 10^30 where the checkpoint does not say.
    """

    def __init__(self, tokenizer: Tokenizer, *, marks: Mapping[str, str], model_max_length: int) -> None:
        self._tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.bos_token_id, self.eos_token_id, _, self.pad_token_id = (
            cast("int", tokenizer.token_to_id(marks[name])) for name in _MARKS
        )

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The tokenizer of a checkpoint; None where it has tokens or options besides CLIP's own.

        Raises as `read_json` for files that are no JSON, OSError and ValueError for those that are absent or wrong.
        """
        config = _json(folder / "tokenizer_config.json")
        vocabulary, merges = _vocabulary(folder)
        added = _added(folder, config)
        if vocabulary is None or added is None or not config.keys() <= _KNOWN_OPTIONS:
            return None
        marks = {name: added[name].content for name in _MARKS}
        if any(token.content not in vocabulary for token in added.values()):
            return None
        tokenizer = Tokenizer(
            BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=marks["unk_token"])
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        # A mark is found in a text before anything else is: "!" is one in SD 2.x and SDXL, where it is the padding.
        tokenizer.add_tokens(list({token.content: token for token in added.values()}.values()))
        return cls(tokenizer, marks=marks, model_max_length=int(config.get("model_max_length") or _NO_LIMIT))

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without begin and end mark, however many."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    return dict(read_json(path)) if path.is_file() else {}


def _vocabulary(folder: Path) -> tuple[dict[str, int] | None, list[tuple[str, str]]]:
    if (folder / "tokenizer.json").is_file():
        model = _json(folder / "tokenizer.json").get("model", {})
        vocabulary, merges = model.get("vocab"), model.get("merges")
        if not isinstance(vocabulary, dict) or not isinstance(merges, list):
            return None, []
        return vocabulary, [_pair(merge) for merge in merges]
    vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return vocabulary, merges


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _added(folder: Path, config: Mapping[str, Any]) -> dict[str, AddedToken] | None:
    """The marks by their names; None where others were added, or one is not told in full."""
    if (folder / "added_tokens.json").is_file():
        return None
    told = {name: config.get(name) or default for name, default in _DEFAULT_MARKS.items()}
    flags: dict[str, dict[str, Any]] = {}
    if "added_tokens_decoder" in config:
        flags = {token["content"]: token for token in config["added_tokens_decoder"].values()}
    else:
        noted = _json(folder / "special_tokens_map.json")
        if not noted.keys() <= set(_MARKS):
            return None
        told |= noted
        flags = {token["content"]: token for token in _json(folder / "tokenizer.json").get("added_tokens", [])}
    added = {}
    for name, token in told.items():
        content = token if isinstance(token, str) else token["content"]
        said = flags.get(content) or ({} if isinstance(token, str) else token)
        added[name] = AddedToken(
            content,
            special=True,
            **{flag: said[flag] for flag in ("lstrip", "rstrip", "single_word", "normalized") if flag in said},
        )
    return added if flags.keys() <= {token.content for token in added.values()} else None
