"""Prompts into the states that CLIP and T5 make of them, through our own CLIP or transformers' modules.

A prompt that fits one window and has no weights gives, bit for bit, what diffusers' pipelines compute. A longer one
is read in as many windows as it takes (CLIP) or with more room (T5): nothing is ever cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from sdfleet.domain import TokenCount
from sdfleet.engine.networks.tokenizer import ClipTokenizer
from sdfleet.engine.prompt import Chunk, Prompt, split_into_chunks, weights_by_character
from sdfleet.engine.textual_inversion import Words
from sdfleet.errors import InvalidValue

# Which of CLIP's layers is read. "last": after the final layer norm, as StableDiffusionPipeline does.
# "penultimate": hidden_states[-2], no layer norm after it, as the SDXL and SD3 pipelines do.
ClipLayer = Literal["last", "penultimate"]

# StableDiffusion3Pipeline's max_sequence_length: SD3 was trained with T5 padded to this.
T5_MIN_LENGTH = 256
# One window with its begin and end marks, in every checkpoint of the field.
CLIP_LENGTH = 77
T5_LENGTH_STEP = 64
# T5's positions are relative, so it has no length of its own; past this a prompt is a mistake, and attention in both
# T5 and the denoiser grows with the square of it.
T5_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClipEncoder:
    """A CLIP text encoder and its tokenizer. `name` is what TokenCount calls it, like "clip_l".

    tokenizer: a ClipTokenizer, or transformers'.
    module: CLIPTextModel or CLIPTextModelWithProjection, see text_weights.load_clip_text_encoder.
    layer: which of its states the checkpoint's denoiser was trained on.
    words: embeddings, which are read where a prompt names them.
    """

    name: str
    tokenizer: Any
    module: Any
    layer: ClipLayer
    words: Words | None = None

    @property
    def length(self) -> int:
        """Tokens in one window with its begin and end marks: 77 in every checkpoint of the field, 32 in ours."""
        # A tokenizer saved without its config claims a length of 10^30.
        return min(int(self.tokenizer.model_max_length), int(self.module.config.max_position_embeddings))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class T5Encoder:
    """A T5 encoder and its tokenizer. `min_length`: tokens, with padding, that the denoiser was trained to be given."""

    name: str
    tokenizer: Any
    module: Any
    min_length: int = T5_MIN_LENGTH


def clip_chunks(tokenizer: Any, prompt: Prompt, *, window: int, words: Words | None = None) -> tuple[Chunk, ...]:
    """The prompt in windows of `window` tokens, see prompt.split_into_chunks."""
    tokenize = partial(_plain_ids, tokenizer)
    comma = tokenize(",")
    comma_id = comma[0] if len(comma) == 1 else None
    if words is None:
        return split_into_chunks(prompt, tokenize, window=window, comma_id=comma_id)
    return split_into_chunks(
        prompt, partial(words.ids, tokenize), window=window, comma_id=comma_id, goes_on=Words.goes_on
    )


def encode_clip(clip: ClipEncoder, prompt: Prompt, *, n_chunks: int | None = None) -> tuple[Tensor, Tensor, TokenCount]:
    """The states of every token, the pooled vector, and how much was read.

    n_chunks: windows to fill up to with empty ones, so that two prompts get one length; None takes what is needed.
    The count is of the prompt itself, without that filling.
    Returns states [n_chunks * clip.length, d] and pooled [d'] in the module's dtype and device. `pooled` is the
    projected vector (CLIPTextModelWithProjection) or the plain one (CLIPTextModel) of the first window.
    Raises ValueError when n_chunks is too small for the prompt: cutting it is not an option.
    """
    _refuse_float16_on_cpu(clip.module)
    window = clip.length - 2
    chunks = clip_chunks(clip.tokenizer, prompt, window=window, words=clip.words)
    counted = TokenCount(
        encoder=clip.name, n_tokens=sum(len(chunk.ids) for chunk in chunks), window=window, n_chunks=len(chunks)
    )
    if n_chunks is None:
        n_chunks = len(chunks)
    if n_chunks < len(chunks):
        raise ValueError(f"the prompt takes {len(chunks)} windows of {clip.name}, not {n_chunks}")

    states: list[Tensor] = []
    pooled: list[Tensor] = []
    # One window at a time: a CPU's matrix product rounds differently for another batch size, and a prompt's numbers
    # must not depend on the length of the prompt it is paired with. An empty window is encoded once.
    encoded: dict[Chunk, tuple[Tensor, Tensor]] = {}
    for chunk in chunks + (Chunk(),) * (n_chunks - len(chunks)):
        if chunk not in encoded:
            encoded[chunk] = _encode_window(clip, chunk, window=window)
        states.append(encoded[chunk][0])
        pooled.append(encoded[chunk][1])
    return torch.cat(states), pooled[0], counted


def encode_clip_pooled(clip: ClipEncoder, prompt: Prompt) -> tuple[Tensor, TokenCount]:
    """The plain pooled vector [d'] of the first window, for denoisers that look at nothing else of CLIP (FLUX.1).

    A BREAK is a space here and weights play no part. The count is of what was read; `n_clip_tokens` is of all.
    """
    _refuse_float16_on_cpu(clip.module)
    window = clip.length - 2
    ids = _plain_ids(clip.tokenizer, prompt.text)[:window]
    _, pooled = _encode_window(clip, Chunk(ids=tuple(ids), weights=(1.0,) * len(ids)), window=window)
    return pooled, TokenCount(encoder=clip.name, n_tokens=len(ids), window=window, n_chunks=1)


def n_clip_tokens(clip: ClipEncoder, prompt: Prompt) -> int:
    """Tokens of the whole prompt, without begin and end mark."""
    return len(_plain_ids(clip.tokenizer, prompt.text))


def t5_length(tokenizer: Any, prompt: Prompt, *, min_length: int = T5_MIN_LENGTH) -> int:
    """The room the prompt needs: `min_length`, or more in steps of 64. Raises InvalidValue past 2048 tokens."""
    n_ids = len(_t5_tokens(tokenizer, prompt)[0]) + 1
    if n_ids > T5_MAX_LENGTH:
        raise InvalidValue(
            "prompt",
            f"it is {n_ids} T5 tokens long, and {T5_MAX_LENGTH} is the limit",
            hint="shorten it; nothing of a prompt is ever cut off silently",
        )
    return max(min_length, -(-n_ids // T5_LENGTH_STEP) * T5_LENGTH_STEP)


def encode_t5(
    t5: T5Encoder, prompt: Prompt, *, length: int | None = None, min_length: int = T5_MIN_LENGTH
) -> tuple[Tensor, TokenCount]:
    """The states of every token, padded to `length`, and how much was read. A BREAK is a space here.

    length: None takes what `t5_length` says. Returns states [length, d] in the module's dtype and device.
    Like StableDiffusion3Pipeline, padding is not masked, so another length gives other states.
    Raises InvalidValue past 2048 tokens, ValueError when `length` is too small for the prompt.
    """
    _refuse_float16_on_cpu(t5.module)
    needed = t5_length(t5.tokenizer, prompt, min_length=min_length)
    length = needed if length is None else length
    ids, weights = _t5_tokens(t5.tokenizer, prompt)
    if len(ids) + 1 > length:
        raise ValueError(f"the prompt takes {len(ids) + 1} tokens of {t5.name}, not {length}")

    n_pads = length - len(ids) - 1
    row = [*ids, t5.tokenizer.eos_token_id, *[t5.tokenizer.pad_token_id] * n_pads]
    with torch.no_grad():
        states: Tensor = t5.module(torch.tensor([row], device=t5.module.device))[0][0]
    states = _weighted(states.to(t5.module.dtype), [*weights, *[1.0] * (n_pads + 1)])
    return states, TokenCount(encoder=t5.name, n_tokens=len(ids), window=length - 1, n_chunks=1)


def _encode_window(clip: ClipEncoder, chunk: Chunk, *, window: int) -> tuple[Tensor, Tensor]:
    """One window: begin mark, tokens, end mark, padding, as the tokenizer's padding="max_length" lays them out."""
    tokenizer, n_pads = clip.tokenizer, window - len(chunk.ids)
    ids = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * n_pads]
    # The pipelines mask the padding for CLIP only where the config asks for it; no checkpoint we serve does.
    reading = contextlib.nullcontext(ids) if clip.words is None else clip.words.in_place(ids, clip.module)
    with torch.no_grad(), reading as ids:
        out = clip.module(
            torch.tensor([ids], device=clip.module.device), output_hidden_states=clip.layer == "penultimate"
        )
    states: Tensor
    match clip.layer:
        case "last":
            states = out.last_hidden_state[0]
        case "penultimate":
            states = out.hidden_states[-2][0]
        case _:
            assert_never(clip.layer)
    projected = getattr(out, "text_embeds", None)
    pooled: Tensor = out.pooler_output[0] if projected is None else projected[0]
    return _weighted(states, [1.0, *chunk.weights, *[1.0] * (n_pads + 1)]), pooled


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without begin and end mark, however many."""
    if isinstance(tokenizer, ClipTokenizer):
        return tokenizer.ids(text)
    # verbose=False: transformers would log that the text is too long for one window, which is dealt with here.
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return ids


def _t5_tokens(tokenizer: Any, prompt: Prompt) -> tuple[list[int], list[float]]:
    """Ids and weights of the whole text.

    The text is tokenized in one piece and each token takes the weight of its first character: SentencePiece puts a
    blank before every piece of text it is given, so reading the fragments one by one would add tokens.
    """
    text, weight_at = weights_by_character(prompt)
    if not prompt.is_weighted:
        ids = _plain_ids(tokenizer, prompt.text)
        return ids, [1.0] * len(ids)
    read = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    return list(read.input_ids), [weight_at[start] if start < end else 1.0 for start, end in read.offset_mapping]


def _weighted(states: Tensor, weights: Sequence[float]) -> Tensor:
    """States [n, d] times their weights [n], with the mean of all of them restored; untouched when all weights are 1.

    This is the web UI's emphasis "Original". Its restoring divides by the new mean, which is only a measure of scale
    if the tokens' means agree in sign: then new/old lies between the smallest and the largest weight. Where it does
    not (a layer norm without bias makes every mean zero up to rounding; T5's states scatter around zero), the web UI
    multiplies everything by an arbitrary number; here the restoring is left out.
    """
    if all(weight == 1.0 for weight in weights):
        return states
    factors = torch.tensor(weights, dtype=torch.float32, device=states.device)
    raised = states.float() * factors[:, None]
    growth = (raised.mean() / states.float().mean()).item()
    if min(weights) <= growth <= max(weights) and growth > 0:
        raised = raised / growth
    return raised.to(states.dtype)


def _refuse_float16_on_cpu(module: Any) -> None:
    if module.dtype == torch.float16 and module.device.type == "cpu":
        raise InvalidValue("dtype", "float16 does not run on a CPU", hint="use bfloat16 or float32")
