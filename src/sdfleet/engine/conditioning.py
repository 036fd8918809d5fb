"""What a denoiser is told about a prompt: the join of its text encoders, one function for each family.

Each is checked against `encode_prompt` of the pipeline it names, diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdfleet.domain import TokenCount
from sdfleet.engine.prompt import Prompt
from sdfleet.engine.text_encoders import (
    T5_MIN_LENGTH,
    ClipEncoder,
    T5Encoder,
    clip_chunks,
    encode_clip,
    encode_clip_pooled,
    encode_t5,
    t5_length,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """One prompt, encoded. Nobody writes into the tensors: the cache lends the same ones to many jobs.

    states: [n_tokens, d]; pooled: [d'] for families that use one vector for the whole prompt.
    tokens: what each encoder read.
    """

    states: Tensor
    pooled: Tensor | None
    tokens: tuple[TokenCount, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much place prompts take: CLIP windows, and tokens with padding. Prompts of one room can share a batch.

    qwen_length: 0 where nothing is padded, or nobody reads with Qwen3.
    """

    n_chunks: int = 1
    t5_length: int = T5_MIN_LENGTH
    qwen_length: int = 0


def room_for(prompts: Sequence[Prompt], *, clips: Sequence[ClipEncoder], t5: T5Encoder | None = None) -> Room:
    """The least room that holds every prompt whole in every encoder. Tokenizes only; no network runs.

    Raises InvalidValue for a prompt past T5's limit.
    """
    n_chunks = max(
        (
            len(clip_chunks(clip.tokenizer, prompt, window=clip.length - 2, words=clip.words))
            for clip in clips
            for prompt in prompts
        ),
        default=1,
    )
    if t5 is None:
        return Room(n_chunks=n_chunks)
    lengths = [t5_length(t5.tokenizer, prompt, min_length=t5.min_length) for prompt in prompts]
    return Room(n_chunks=n_chunks, t5_length=max(lengths))


def sd_conditioning(prompt: Prompt, *, clip: ClipEncoder, room: Room | None = None) -> Conditioning:
    """For SD 1.x and 2.x, as StableDiffusionPipeline: CLIP's states [n, d], no pooled vector."""
    room = room or room_for([prompt], clips=[clip])
    states, _, counted = encode_clip(clip, prompt, n_chunks=room.n_chunks)
    return Conditioning(states=states, pooled=None, tokens=(counted,))


def sdxl_conditioning(
    prompt: Prompt,
    *,
    clip_l: ClipEncoder,
    clip_g: ClipEncoder,
    room: Room | None = None,
    is_zero_when_empty: bool = False,
) -> Conditioning:
    """For SDXL, as StableDiffusionXLPipeline: both CLIPs' states side by side [n, 2048], CLIP-G's projected vector.

    is_zero_when_empty: for a negative prompt in a checkpoint whose model_index.json has force_zeros_for_empty_prompt.
    All numbers are then zero if nothing was written. The pipeline tells None (zeros) from "" (encoded); a request
    here has only "", which means what leaving it out means there.
    """
    room = room or room_for([prompt], clips=[clip_l, clip_g])
    states_l, _, counted_l = encode_clip(clip_l, prompt, n_chunks=room.n_chunks)
    states_g, pooled, counted_g = encode_clip(clip_g, prompt, n_chunks=room.n_chunks)
    states = torch.cat([states_l, states_g], dim=-1)
    if is_zero_when_empty and prompt.is_empty:
        states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
    return Conditioning(states=states, pooled=pooled, tokens=(counted_l, counted_g))


def sdxl_refiner_conditioning(
    prompt: Prompt, *, clip_g: ClipEncoder, room: Room | None = None, is_zero_when_empty: bool = False
) -> Conditioning:
    """For the SDXL refiner, as StableDiffusionXLImg2ImgPipeline: CLIP-G's states [n, 1280], its projected vector."""
    room = room or room_for([prompt], clips=[clip_g])
    states, pooled, counted = encode_clip(clip_g, prompt, n_chunks=room.n_chunks)
    if is_zero_when_empty and prompt.is_empty:
        states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
    return Conditioning(states=states, pooled=pooled, tokens=(counted,))


def sd3_conditioning(
    prompt: Prompt,
    *,
    clip_l: ClipEncoder,
    clip_g: ClipEncoder,
    t5: T5Encoder | None,
    width: int,
    room: Room | None = None,
) -> Conditioning:
    """For SD3 and SD3.5, as StableDiffusion3Pipeline.

    CLIP-L and CLIP-G side by side, filled with zeros to `width`, then T5's states below them; without T5 its place is
    zeros. Returns states [n_chunks * 77 + t5_length, width] and both projected vectors joined [768 + 1280].
    width: the transformer's joint_attention_dim (4096), which is T5's d_model.
    """
    room = room or room_for([prompt], clips=[clip_l, clip_g], t5=t5)
    states_l, pooled_l, counted_l = encode_clip(clip_l, prompt, n_chunks=room.n_chunks)
    states_g, pooled_g, counted_g = encode_clip(clip_g, prompt, n_chunks=room.n_chunks)
    clip_states = torch.cat([states_l, states_g], dim=-1)
    clip_states = functional.pad(clip_states, (0, width - clip_states.shape[-1]))
    tokens: tuple[TokenCount, ...] = (counted_l, counted_g)
    if t5 is None:
        t5_states = clip_states.new_zeros(room.t5_length, width)
    else:
        t5_states, counted_t5 = encode_t5(t5, prompt, length=room.t5_length)
        tokens += (counted_t5,)
    return Conditioning(
        states=torch.cat([clip_states, t5_states]), pooled=torch.cat([pooled_l, pooled_g]), tokens=tokens
    )


def flux_conditioning(prompt: Prompt, *, clip: ClipEncoder, t5: T5Encoder, room: Room | None = None) -> Conditioning:
    """For FLUX.1, as FluxPipeline: T5's states [t5_length, 4096], and CLIP-L's plain pooled vector [768].

    The vector is of the first window only, as there; the states are of the whole prompt.
    """
    room = room or room_for([prompt], clips=(), t5=t5)
    pooled, counted_clip = encode_clip_pooled(clip, prompt)
    states, counted_t5 = encode_t5(t5, prompt, length=room.t5_length)
    return Conditioning(states=states, pooled=pooled, tokens=(counted_clip, counted_t5))
