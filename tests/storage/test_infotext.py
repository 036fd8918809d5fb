"""The text line that AUTOMATIC1111 and we write into pictures."""

from __future__ import annotations

import string

from hypothesis import given
from hypothesis import strategies as st

from sdfleet.storage.infotext import Metadata, from_json, parse, write

# Any text without what ends a line in other ways than "\n", and without a line that reads as a negative prompt.
TEXT = st.text(
    alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\x00"),
    max_size=60,
)
NEGATIVE = TEXT.filter(lambda text: "Negative prompt:" not in text)
FLOAT = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 4))

METADATA = st.builds(
    Metadata,
    source=st.just("a1111"),
    version=st.sampled_from([None, "0.1.0"]),
    prompt=TEXT,
    negative_prompt=NEGATIVE,
    model=st.none() | st.text(string.ascii_letters + string.digits + ",:\" '._-é", min_size=1, max_size=20),
    width_px=st.just(512),
    height_px=st.integers(16, 4096),
    steps=st.integers(1, 1000),
    guidance=FLOAT,
    seed=st.integers(0, 2**64 - 1),
    sampler=st.sampled_from(["ddim", "DPM++ 2M Karras", "euler_a"]),
    strength=st.none() | FLOAT,
)


@given(METADATA)
def test_what_is_written_is_read_back(metadata: Metadata) -> None:
    assert parse(write(metadata)) == metadata


@given(st.builds(Metadata, prompt=TEXT, negative_prompt=TEXT, seed=st.integers(0, 2**64 - 1)))
def test_json_gives_back_everything(metadata: Metadata) -> None:
    assert from_json(metadata.to_json()) == metadata
    assert from_json(metadata.to_json(is_ascii=True)) == metadata


@given(TEXT)
def test_any_text_at_all_can_be_parsed(text: str) -> None:
    assert isinstance(parse(text), Metadata)
    assert from_json(text) is None  # only JSON of our own making is ours


def test_a_prompt_that_holds_a_negative_prompt_line_stays_whole() -> None:
    metadata = Metadata(source="a1111", prompt="a\nNegative prompt: no\nb", steps=3)
    assert parse(write(metadata)).prompt == metadata.prompt


def test_a_picture_of_automatic1111_is_understood() -> None:
    text = (
        "a (red:1.2) fox,\nin snow\nNegative prompt: blurry,\nlow: quality\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Lora hashes: "a: b, c: d", '
        "Version: v1.9.4"
    )
    found = parse(text)
    assert found.prompt == "a (red:1.2) fox,\nin snow"
    assert found.negative_prompt == "blurry,\nlow: quality"
    assert (found.steps, found.guidance, found.seed) == (20, 7.5, 965400086)
    assert (found.width_px, found.height_px, found.strength) == (512, 768, 0.7)
    assert (found.sampler, found.model, found.source) == ("DPM++ 2M Karras", "v1-5-pruned-emaonly", "a1111")


def test_an_automatic_schedule_is_no_part_of_the_sampler() -> None:
    found = parse("fox\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1")
    assert found.sampler == "Euler a"


def test_a_prompt_alone_is_a_prompt_even_with_a_colon() -> None:
    assert parse("style: watercolour, a fox").prompt == "style: watercolour, a fox"


def test_the_line_reads_as_automatic1111_writes_it() -> None:
    metadata = Metadata(
        version="0.1.0", prompt="fox", negative_prompt="blur", steps=20, guidance=7.0, seed=5, sampler="dpm++_2m",
        sampler_label="DPM++ 2M", width_px=512, height_px=768, model="a, b",
    )  # fmt: skip
    assert write(metadata) == (
        "fox\nNegative prompt: blur\n"
        'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 5, Size: 512x768, Model: "a, b", Version: sdfleet 0.1.0'
    )
