"""Our conditioning against `encode_prompt` of diffusers' own pipelines, on toy checkpoints.

The same modules run on the same ids, one window at a time on both sides, so the difference allowed is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sdfleet.engine.conditioning import (
    Conditioning,
    Room,
    room_for,
    sd3_conditioning,
    sd_conditioning,
    sdxl_conditioning,
)
from sdfleet.engine.prompt import Prompt, parse_prompt
from sdfleet.engine.text_encoders import ClipEncoder, T5Encoder, encode_clip, encode_t5, t5_length
from sdfleet.errors import InvalidValue
from tests import tiny, toys

Checkpoints = Callable[[str], Path]

PROMPT = "a cat on the moon, red sky"
NEGATIVE = "blurry, low quality"
# The toy CLIP spells most words: about one token a letter.
LONG = "a cat on the moon, " * 10
PLAIN = parse_prompt(PROMPT)


class Encoders(NamedTuple):
    pipe: Any
    clips: tuple[ClipEncoder, ...]
    t5: T5Encoder | None

    def join(self, prompt: Prompt, room: Room | None = None) -> Conditioning:
        if len(self.clips) == 1:
            return sd_conditioning(prompt, clip=self.clips[0], room=room)
        clip_l, clip_g = self.clips
        if self.pipe.components.get("transformer") is None:
            return sdxl_conditioning(prompt, clip_l=clip_l, clip_g=clip_g, room=room)
        return sd3_conditioning(prompt, clip_l=clip_l, clip_g=clip_g, t5=self.t5, width=toys.T5_WIDTH, room=room)

    def theirs(self, prompt: str, negative: str | None) -> tuple[Tensor | None, ...]:
        """Positive states, negative states, positive pooled, negative pooled, each for a batch of one."""
        asked: dict[str, Any] = {"prompt": prompt, "device": "cpu", "negative_prompt": negative}
        if self.pipe.components.get("transformer") is not None:
            asked |= {"prompt_2": None, "prompt_3": None}
        with torch.no_grad():
            out = self.pipe.encode_prompt(**asked, num_images_per_prompt=1, do_classifier_free_guidance=True)
        return out if len(out) == 4 else (*out, None, None)


@pytest.fixture(scope="module")
def encoders(checkpoints: Checkpoints) -> Callable[[str], Encoders]:
    loaded: dict[str, Encoders] = {}

    def of(name: str) -> Encoders:
        if name not in loaded:
            pipe = tiny.load(checkpoints(name))
            is_sd = name in ("sd15", "sd21")
            clips = [
                ClipEncoder(
                    name=label,
                    tokenizer=pipe.components[f"tokenizer{suffix}"],
                    module=pipe.components[f"text_encoder{suffix}"],
                    layer="last" if is_sd else "penultimate",
                )
                for label, suffix in (("clip_l", ""), ("clip_g", "_2"))
                if f"text_encoder{suffix}" in pipe.components
            ]
            module = pipe.components.get("text_encoder_3")
            t5 = None if module is None else T5Encoder(name="t5", tokenizer=pipe.tokenizer_3, module=module)
            loaded[name] = Encoders(pipe, tuple(clips), t5)
        return loaded[name]

    return of


@pytest.fixture
def sd15(encoders: Callable[[str], Encoders]) -> ClipEncoder:
    return encoders("sd15").clips[0]


@pytest.fixture
def t5(encoders: Callable[[str], Encoders]) -> T5Encoder:
    found = encoders("sd3").t5
    assert found is not None
    return found


def pair_of(made: Encoders, positive: Prompt, negative: Prompt) -> tuple[Conditioning, Conditioning]:
    """Both prompts with states of one length, as `LatentFamily.paired` makes them."""
    room = room_for([positive, negative], clips=made.clips, t5=made.t5)
    return made.join(positive, room), made.join(negative, room)


@pytest.mark.parametrize("prompt", [PROMPT, "", "x" * 75, r"a smile \(big\)"])
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sd3", "sd3-no-t5", "sd35"])
def test_prompt_of_one_window_is_bit_equal_to_the_pipeline(
    encoders: Callable[[str], Encoders], name: str, prompt: str
) -> None:
    made = encoders(name)
    read = parse_prompt(prompt)
    states, negative, pooled, negative_pooled = made.theirs(read.text, NEGATIVE)
    ours, ours_negative = pair_of(made, read, parse_prompt(NEGATIVE))
    for conditioning, their_states, their_pooled in (
        (ours, states, pooled),
        (ours_negative, negative, negative_pooled),
    ):
        assert their_states is not None
        assert torch.equal(conditioning.states, their_states[0])
        if their_pooled is None:
            assert conditioning.pooled is None
        else:
            assert conditioning.pooled is not None
            assert torch.equal(conditioning.pooled, their_pooled[0])


def test_empty_sdxl_negative_is_zero_exactly_where_the_pipeline_makes_it_zero(
    encoders: Callable[[str], Encoders],
) -> None:
    made = encoders("sdxl")
    assert made.pipe.config.force_zeros_for_empty_prompt
    _, left_out, _, left_out_pooled = made.theirs(PROMPT, None)
    clip_l, clip_g = made.clips
    ours = sdxl_conditioning(parse_prompt(""), clip_l=clip_l, clip_g=clip_g, is_zero_when_empty=True)
    assert left_out is not None
    assert left_out_pooled is not None
    assert ours.pooled is not None
    assert torch.equal(ours.states, left_out[0])
    assert torch.equal(ours.pooled, left_out_pooled[0])
    written = sdxl_conditioning(parse_prompt(NEGATIVE), clip_l=clip_l, clip_g=clip_g, is_zero_when_empty=True)
    assert written.states.abs().max() > 0


def test_sd3_without_t5_has_zeros_in_its_place(encoders: Callable[[str], Encoders]) -> None:
    ours = encoders("sd3-no-t5").join(PLAIN)
    assert ours.states.shape == (77 + 256, toys.T5_WIDTH)
    assert not ours.states[77:].any()
    assert [count.encoder for count in ours.tokens] == ["clip_l", "clip_g"]


def test_skipping_t5_changes_only_its_part(encoders: Callable[[str], Encoders]) -> None:
    made = encoders("sd3")
    clip_l, clip_g = made.clips
    skipped = sd3_conditioning(PLAIN, clip_l=clip_l, clip_g=clip_g, t5=None, width=toys.T5_WIDTH)
    assert torch.equal(skipped.states[:77], made.join(PLAIN).states[:77])
    assert not skipped.states[77:].any()


def test_ids_of_a_window_are_those_of_the_tokenizer(encoders: Callable[[str], Encoders]) -> None:
    seen: list[list[list[int]]] = []
    for name in ("sd15", "sd21"):
        clip = encoders(name).clips[0]
        hook = clip.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
        encode_clip(clip, PLAIN)
        hook.remove()
        assert seen[-1] == [clip.tokenizer(PROMPT, padding="max_length", max_length=77).input_ids]
    assert seen[0] != seen[1], "sd15 pads with its end mark, sd21 with '!'"


def test_long_prompt_takes_as_many_windows_as_it_needs(sd15: ClipEncoder) -> None:
    states, _, counted = encode_clip(sd15, parse_prompt(LONG))
    tokens = sd15.tokenizer(LONG, add_special_tokens=False, verbose=False).input_ids
    assert counted.n_tokens == len(tokens) > 75
    assert counted.n_chunks >= 2
    assert states.shape == (counted.n_chunks * 77, toys.CLIP_L_WIDTH)


def test_every_token_of_a_long_prompt_reaches_the_encoder_in_order(sd15: ClipEncoder) -> None:
    text = " ".join(f"word{i}" for i in range(60))
    read: list[int] = []
    hook = sd15.module.register_forward_pre_hook(lambda _, args: read.extend(args[0][0].tolist()))
    encode_clip(sd15, parse_prompt(text))
    hook.remove()
    marks = {sd15.tokenizer.bos_token_id, sd15.tokenizer.eos_token_id}
    tokens = sd15.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    assert [i for i in read if i not in marks] == tokens


def test_last_word_of_a_long_prompt_changes_the_states(sd15: ClipEncoder) -> None:
    one, other = (encode_clip(sd15, parse_prompt(LONG + word))[0] for word in ("castle", "sea"))
    assert not torch.equal(one, other)
    assert torch.equal(one[:77], other[:77])


def test_break_gives_each_part_its_own_window(sd15: ClipEncoder) -> None:
    states, _, counted = encode_clip(sd15, parse_prompt("a cat BREAK the moon"))
    assert counted.n_chunks == 2
    assert torch.equal(states[:77], encode_clip(sd15, parse_prompt("a cat"))[0])
    assert torch.equal(states[77:], encode_clip(sd15, parse_prompt("the moon"))[0])


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sd3-no-t5"])
def test_weight_of_one_changes_nothing_and_another_changes_the_states(
    encoders: Callable[[str], Encoders], name: str
) -> None:
    made = encoders(name)
    plain = made.join(parse_prompt("a cat on the moon")).states
    assert torch.equal(made.join(parse_prompt("a (cat:1.0) on the moon")).states, plain)
    raised = made.join(parse_prompt("a (cat:1.4) on the moon")).states
    assert raised.shape == plain.shape
    assert not torch.equal(raised, plain)
    assert raised.isfinite().all()


def test_weights_multiply_their_tokens_and_keep_the_mean(sd15: ClipEncoder) -> None:
    plain = encode_clip(sd15, parse_prompt("a cat moon"))[0]
    raised = encode_clip(sd15, parse_prompt("a (cat:1.5) moon"))[0]
    torch.testing.assert_close(raised.mean(), plain.mean(), rtol=1e-5, atol=0)
    ratio = (raised / plain).median(dim=-1).values
    torch.testing.assert_close(ratio[2] / ratio[1], torch.tensor(1.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[3:], ratio[1].expand(74), rtol=1e-5, atol=0)


def test_states_whose_mean_says_nothing_are_not_rescaled(encoders: Callable[[str], Encoders]) -> None:
    clip = encoders("sd21").clips[0]
    norm = clip.module.final_layer_norm
    bias = norm.bias.clone()
    try:
        # A layer norm without bias: every mean is zero up to rounding, and dividing by it would blow everything up.
        norm.bias.data.zero_()
        plain = encode_clip(clip, parse_prompt("a cat moon"))[0]
        raised = encode_clip(clip, parse_prompt("a (cat:1.5) moon"))[0]
    finally:
        norm.bias.data.copy_(bias)
    ratio = (raised / plain).median(dim=-1).values
    assert 1 / 1.5 - 1e-4 <= ratio.min() <= ratio.max() <= 1.5 + 1e-4


def test_pooled_vector_is_that_of_the_first_window(encoders: Callable[[str], Encoders]) -> None:
    clip = encoders("sdxl").clips[1]
    first = encode_clip(clip, parse_prompt("a cat"))[1]
    assert torch.equal(encode_clip(clip, parse_prompt("a (cat:1.4) BREAK the moon"))[1], first)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sd3-no-t5"])
@pytest.mark.parametrize(
    ("positive", "negative"), [(LONG, NEGATIVE), (PROMPT, LONG), (LONG, ""), ("castle " * 300, NEGATIVE)]
)
def test_pair_has_one_length_and_its_longer_half_is_as_if_alone(
    encoders: Callable[[str], Encoders], name: str, positive: str, negative: str
) -> None:
    made = encoders(name)
    pair = pair_of(made, parse_prompt(positive), parse_prompt(negative))
    assert pair[0].states.shape == pair[1].states.shape
    longer = max((positive, negative), key=len)
    alone = made.join(parse_prompt(longer))
    assert torch.equal(pair[0 if longer == positive else 1].states, alone.states)


def test_short_prompt_is_filled_up_with_empty_windows(sd15: ClipEncoder) -> None:
    states, _, counted = encode_clip(sd15, PLAIN, n_chunks=3)
    empty = encode_clip(sd15, parse_prompt(""))[0]
    assert torch.equal(states, torch.cat([encode_clip(sd15, PLAIN)[0], empty, empty]))
    assert counted.n_chunks == 1


def test_too_little_room_is_an_error_and_not_a_cut(sd15: ClipEncoder, t5: T5Encoder) -> None:
    with pytest.raises(ValueError, match="takes 2 windows of clip_l, not 1"):
        encode_clip(sd15, parse_prompt("a BREAK b"), n_chunks=1)
    with pytest.raises(ValueError, match="tokens of t5, not 4"):
        encode_t5(t5, PLAIN, length=4)


def test_every_encoder_counts_its_own_tokens(encoders: Callable[[str], Encoders]) -> None:
    counts = encoders("sd3").join(PLAIN).tokens
    assert [count.encoder for count in counts] == ["clip_l", "clip_g", "t5"]
    assert counts[0].window == 75
    assert counts[0].n_tokens != counts[2].n_tokens


def test_smaller_window_of_the_tokenizer_is_kept(encoders: Callable[[str], Encoders]) -> None:
    # The built-in model's tokenizer says 32; its chunks hold 30 tokens between the marks.
    clip = encoders("sd15").clips[0]
    tokenizer = type(clip.tokenizer).from_pretrained(clip.tokenizer.name_or_path, model_max_length=32)
    small = ClipEncoder(name="clip", tokenizer=tokenizer, module=clip.module, layer="last")
    states, _, counted = encode_clip(small, parse_prompt("a cat"))
    assert (counted.window, states.shape[0]) == (30, 32)
    theirs = tokenizer("a cat", padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(states, clip.module(theirs)[0][0])


def test_tokenizer_without_a_length_takes_the_encoders(sd15: ClipEncoder) -> None:
    tokenizer = type(sd15.tokenizer).from_pretrained(sd15.tokenizer.name_or_path, model_max_length=10**30)
    assert ClipEncoder(name="clip", tokenizer=tokenizer, module=sd15.module, layer="last").length == 77


def test_longer_t5_prompt_is_given_more_room_in_steps(t5: T5Encoder) -> None:
    words = parse_prompt("castle " * 300)
    assert t5_length(t5.tokenizer, PLAIN) == 256
    assert t5_length(t5.tokenizer, parse_prompt("castle " * 255)) == 256
    assert t5_length(t5.tokenizer, parse_prompt("castle " * 256)) == 320
    states, counted = encode_t5(t5, words)
    assert states.shape == (320, toys.T5_WIDTH)
    assert (counted.n_tokens, counted.n_chunks) == (300, 1)


def test_t5_prompt_past_the_limit_is_refused(t5: T5Encoder) -> None:
    assert t5_length(t5.tokenizer, parse_prompt("castle " * 2047)) == 2048
    with pytest.raises(InvalidValue, match="2049 T5 tokens long"):
        t5_length(t5.tokenizer, parse_prompt("castle " * 2048))


def test_weights_do_not_change_the_tokens_t5_reads(t5: T5Encoder) -> None:
    read: list[list[int]] = []
    hook = t5.module.register_forward_pre_hook(lambda _, args: read.append(args[0].tolist()))
    encode_t5(t5, parse_prompt("a cat, dog"))
    encode_t5(t5, parse_prompt("a (cat:1.3), [dog]"))
    hook.remove()
    assert read[0] == read[1]


def test_t5_weights_fall_on_the_tokens_of_their_words(t5: T5Encoder) -> None:
    plain, raised = (encode_t5(t5, parse_prompt(text))[0] for text in ("the cat, moon", "the (cat:1.5), moon"))
    ratio = (raised / plain).median(dim=-1).values
    torch.testing.assert_close(ratio / ratio[0], torch.tensor([1.0, 1.5, *[1.0] * 254]), rtol=1e-4, atol=0)


def test_break_is_a_space_for_t5(t5: T5Encoder) -> None:
    assert torch.equal(encode_t5(t5, parse_prompt("cat BREAK moon"))[0], encode_t5(t5, parse_prompt("cat moon"))[0])


def test_room_holds_the_longest_of_all_encoders(encoders: Callable[[str], Encoders]) -> None:
    made = encoders("sd3")
    room = room_for([PLAIN, parse_prompt("castle " * 300)], clips=made.clips, t5=made.t5)
    assert room.t5_length == 320
    assert room.n_chunks > 1


def test_room_follows_the_encoder_with_the_smallest_window(sd15: ClipEncoder) -> None:
    tokenizer = type(sd15.tokenizer).from_pretrained(sd15.tokenizer.name_or_path, model_max_length=12)
    small = ClipEncoder(name="clip_g", tokenizer=tokenizer, module=sd15.module, layer="last")
    prompt = parse_prompt("abcdef ghijklm")
    assert [room_for([prompt], clips=clips).n_chunks for clips in ([sd15], [small], [sd15, small])] == [1, 2, 2]


def test_float16_never_runs_on_a_cpu(encoders: Callable[[str], Encoders]) -> None:
    clip = encoders("sd15").clips[0]
    half = type(clip.module)(clip.module.config).half()
    with pytest.raises(InvalidValue, match="float16 does not run on a CPU"):
        encode_clip(ClipEncoder(name="clip", tokenizer=clip.tokenizer, module=half, layer="last"), PLAIN)


def test_bfloat16_encoder_gives_bfloat16_states(encoders: Callable[[str], Encoders]) -> None:
    clip = encoders("sd15").clips[0]
    module = type(clip.module)(clip.module.config).bfloat16().eval()
    low = ClipEncoder(name="clip", tokenizer=clip.tokenizer, module=module, layer="last")
    assert encode_clip(low, parse_prompt("a (cat:1.3)"))[0].dtype == torch.bfloat16
