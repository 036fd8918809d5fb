"""Prompts into the states that Qwen3 makes of them: a language model reads the prompt as a message in a chat.

Such a model knows no windows and no weights. A plain prompt gives the states that diffusers' pipelines compute; a
longer one than theirs (512 tokens) is given more room and never cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdfleet.domain import TokenCount
from sdfleet.errors import BrokenCheckpoint, InvalidValue, UnsupportedByModel

# max_sequence_length of Flux2KleinPipeline and ZImagePipeline.
QWEN_MIN_LENGTH = 512
QWEN_LENGTH_STEP = 64
# As for T5: past this a prompt is a mistake, and attention grows with the square of it.
QWEN_MAX_LENGTH = 2048

_MAX_WEIGHT = 10.0
_SHOWN_CHARACTERS = 40
_OPEN_BRACKET = re.compile(r"(?<!\\)\(")
_STATED_WEIGHT = re.compile(r":\s*\+?(?P<weight>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*\)")
_NESTED_BRACKETS = re.compile(r"(?<!\\)(\(\s*\(|\[\s*\[)")
_ESCAPED_BRACKET = re.compile(r"\\([()\[\]])")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QwenEncoder:
    """A Qwen3 and its tokenizer, with the chat template that came along.

    thinks: whether the template leaves the answer open for thinking, or shows that there was none.
    max_length: most tokens, template and all, that encoder and denoiser stand.
    """

    tokenizer: Any
    module: Any
    thinks: bool
    max_length: int = QWEN_MAX_LENGTH
    name: str = "qwen3"


def plain_prompt(source: str) -> str:
    r"""The prompt as a language model should read it: as written, but for brackets that were escaped.

    Weights are refused: the denoisers behind Qwen3 normalise its states first, so a state times 1.3 is the same state.

    >>> plain_prompt(r"a sign (in red) with a smile :\)")
    'a sign (in red) with a smile :)'
    """
    opened = _OPEN_BRACKET.search(source)
    for found in _STATED_WEIGHT.finditer(source, opened.end()) if opened else ():
        if float(found["weight"]) <= _MAX_WEIGHT:
            begin = max(source.rfind("(", 0, found.start()), found.end() - _SHOWN_CHARACTERS)
            raise UnsupportedByModel(
                f"this model's text encoder (Qwen3) has no weights like {source[begin : found.end()]!r}",
                hint=r"say it in words; for brackets that are only text, write \( and \)",
            )
    return _ESCAPED_BRACKET.sub(r"\1", source)


def bracket_warnings(source: str) -> tuple[str, ...]:
    """What to tell somebody who meant ((this)) as a weight."""
    if _NESTED_BRACKETS.search(source):
        return ("brackets are read as written: this model's text encoder (Qwen3) has no weights",)
    return ()


def qwen_length(qwen: QwenEncoder, prompt: str) -> int:
    """Tokens of the whole message, template and all. Raises InvalidValue past `max_length`: nothing is cut."""
    n_ids = len(_ids(qwen, prompt))
    if n_ids > qwen.max_length:
        raise InvalidValue(
            "prompt",
            f"it is {n_ids} Qwen3 tokens long with what surrounds it, and {qwen.max_length} is this model's limit",
            hint="shorten it; nothing of a prompt is ever cut off silently",
        )
    return n_ids


def padded_length(n_tokens: int) -> int:
    """The room that is filled up with padding: 512 tokens, or more in steps of 64."""
    return max(QWEN_MIN_LENGTH, -(-n_tokens // QWEN_LENGTH_STEP) * QWEN_LENGTH_STEP)


def encode_qwen(
    qwen: QwenEncoder, prompt: str, *, layers: Sequence[int], length: int | None = None
) -> tuple[Tensor, TokenCount]:
    """The states of every token from the named layers side by side, and how much was read.

    length: padded to this, which must hold the message; padding is masked in the encoder and has states all the same.
    None pads nothing: attention looks only back, so the message's states are the same up to rounding, for less work.
    Returns states [length, len(layers) * d] in the module's dtype and device.
    """
    _refuse_float16_on_cpu(qwen.module)
    n_ids = qwen_length(qwen, prompt)
    padding: dict[str, Any] = {} if length is None else {"padding": "max_length", "max_length": length}
    read = qwen.tokenizer(_message(qwen, prompt), return_tensors="pt", truncation=False, verbose=False, **padding)
    with torch.no_grad():
        out = qwen.module(
            input_ids=read.input_ids.to(qwen.module.device),
            attention_mask=read.attention_mask.to(qwen.module.device),
            output_hidden_states=True,
            use_cache=False,
        )
    states = torch.cat([out.hidden_states[layer][0] for layer in layers], dim=-1)
    n_template = len(_ids(qwen, ""))
    window = (padded_length(n_ids) if length is None else length) - n_template
    return states, TokenCount(encoder=qwen.name, n_tokens=n_ids - n_template, window=window, n_chunks=1)


def _ids(qwen: QwenEncoder, prompt: str) -> list[int]:
    ids: list[int] = qwen.tokenizer(_message(qwen, prompt), truncation=False, verbose=False).input_ids
    return ids


def _message(qwen: QwenEncoder, prompt: str) -> str:
    if qwen.tokenizer.chat_template is None:
        raise BrokenCheckpoint(
            "the tokenizer has no chat template, which decides how Qwen3 reads a prompt",
            hint="get tokenizer_config.json or chat_template.jinja of the checkpoint's tokenizer",
        )
    written: str = qwen.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=qwen.thinks
    )
    return written


def _refuse_float16_on_cpu(module: Any) -> None:
    if module.dtype == torch.float16 and module.device.type == "cpu":
        raise InvalidValue("dtype", "float16 does not run on a CPU", hint="use bfloat16 or float32")
