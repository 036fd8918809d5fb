from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfleet.engine.prompt import (
    COMMA_BACKTRACK_TOKENS,
    MAX_NESTING,
    MAX_WEIGHT,
    Chunk,
    Prompt,
    parse_prompt,
    split_into_chunks,
    weights_by_character,
)
from sdfleet.errors import PromptSyntax


def pairs(source: str) -> list[tuple[str, float]]:
    (section,) = parse_prompt(source).sections
    return [(fragment.text, fragment.weight) for fragment in section]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain words", [("plain words", 1.0)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.21)]),
        ("(a:1.2)", [("a", 1.2)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(a:0)", [("a", 0.0)]),
        ("[a]", [("a", 0.909091)]),
        ("[(a)]", [("a", 1.0)]),
        ("((a:1.5) b)", [("a", 1.65), (" b", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 0.909091)]),
        ("", []),
        ("()", []),
    ],
)
def test_brackets_weigh_as_in_the_web_ui(source: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(source) == expected


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\(a\) \[b\] \\", "(a) [b] \\"),
        (r"C:\new", r"C:\new"),
        ("a smile :)", "a smile :)"),
        ("a ] b", "a ] b"),
        ("(style:retro)", "style:retro"),
        ("a:1.2)", "a:1.2)"),
        ("(a:1.2.3)", "a:1.2.3"),
        ("[a:1.2)", "a:1.2)"),
    ],
)
def test_what_is_no_syntax_stays_text(source: str, text: str) -> None:
    assert parse_prompt(source).text == text


def test_open_bracket_counts_to_the_end() -> None:
    assert pairs("a (b, c") == [("a ", 1.0), ("b, c", 1.1)]


def test_equal_neighbours_become_one_fragment() -> None:
    assert pairs(r"c\(at\) d [(og)]") == [("c(at) d og", 1.0)]


def test_break_parts_the_prompt_and_takes_its_blanks_with_it() -> None:
    prompt = parse_prompt("a sky  BREAK (a sea BREAK sand:1.3)")
    assert [[(f.text, f.weight) for f in section] for section in prompt.sections] == [
        [("a sky", 1.0)],
        [("a sea", 1.3)],
        [("sand", 1.3)],
    ]
    assert prompt.text == "a sky a sea sand"


@pytest.mark.parametrize("source", ["BREAKFAST", "break", "a BREAK-dance", "DAYBREAK", "BREAK's"])
def test_break_must_be_a_word_of_its_own_in_capitals(source: str) -> None:
    assert pairs(source) == [(source, 1.0)]


@pytest.mark.parametrize(
    ("source", "place"), [("a (cat:11)", 8), ("(cat:-1)", 6), ("(at 10:30)", 8), (f"({'a'}:{'9' * 400})", 4)]
)
def test_weight_out_of_range_is_refused_with_its_place(source: str, place: int) -> None:
    with pytest.raises(PromptSyntax, match=rf"at character {place} "):
        parse_prompt(source)


def test_weights_that_multiply_past_the_limit_are_refused_with_their_place() -> None:
    with pytest.raises(PromptSyntax, match="around character 8 multiply to a weight of 16"):
        parse_prompt("red, ((cat:4):4)")


def test_absurd_nesting_is_refused() -> None:
    with pytest.raises(PromptSyntax, match=f"more than {MAX_NESTING} brackets"):
        parse_prompt("([" * 5000 + "a")


def test_a_long_number_is_read_in_linear_time() -> None:
    # A backtracking pattern would take minutes here instead of a millisecond.
    assert parse_prompt(":" + "1" * 15_000 + "x").text.endswith("x")


symbols = st.sampled_from([*"abcd", *r"()[]\:.,-+ 019é猫", "BREAK", "\n", ":1.2)", ": 3 )"])
prompt_text = st.lists(symbols, max_size=40).map("".join)


def without_syntax(text: str) -> str:
    return re.sub(r"BREAK|[()\[\]\\:\s0-9.+-]", "", text)


@given(prompt_text)
def test_no_text_is_ever_lost(source: str) -> None:
    try:
        prompt = parse_prompt(source)
    except PromptSyntax:
        stated = [float(found) for found in re.findall(r":\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)", source)]
        assert any(weight < 0 or weight > 1 for weight in stated), (
            "only a stated weight makes a short prompt unreadable"
        )
        return
    assert without_syntax(prompt.text) == without_syntax(source)
    assert all(0 <= f.weight <= MAX_WEIGHT and f.text for section in prompt.sections for f in section)


def escaped(text: str) -> str:
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


leaves = st.text(alphabet="ab é,()[]\\", min_size=1).map(lambda text: (escaped(text), [(c, 1.0) for c in text]))


def wrapped(tree: tuple[str, list[tuple[str, float]]], form: str) -> tuple[str, list[tuple[str, float]]]:
    source, characters = tree
    factor = {"({})": 1.1, "[{}]": 1 / 1.1, "({}:1.3)": 1.3, "({}: 0.5)": 0.5}[form]
    return form.format(source), [(c, weight * factor) for c, weight in characters]


trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(wrapped, inner, st.sampled_from(["({})", "[{}]", "({}:1.3)", "({}: 0.5)"])),
        st.lists(inner, min_size=1, max_size=4).map(
            lambda parts: ("".join(part[0] for part in parts), [pair for part in parts for pair in part[1]])
        ),
    ),
    max_leaves=12,
)


@given(trees)
def test_nested_brackets_give_every_character_its_product(tree: tuple[str, list[tuple[str, float]]]) -> None:
    source, characters = tree
    text, weights = weights_by_character(parse_prompt(source))
    assert text == "".join(c for c, _ in characters)
    assert weights == pytest.approx([weight for _, weight in characters], abs=1e-5)


def letters(text: str) -> list[int]:
    """A tokenizer with a token for each character; a comma is 44."""
    return [ord(c) for c in text if not c.isspace()]


def cut(source: str, window: int) -> list[str]:
    chunks = split_into_chunks(parse_prompt(source), letters, window=window, comma_id=ord(","))
    return ["".join(map(chr, chunk.ids)) for chunk in chunks]


@given(prompt_text, st.integers(min_value=1, max_value=40))
def test_chunks_hold_every_token_in_order_within_the_window(source: str, window: int) -> None:
    try:
        prompt = parse_prompt(source)
    except PromptSyntax:
        return
    chunks = split_into_chunks(prompt, letters, window=window, comma_id=ord(","))
    expected = [(t, f.weight) for section in prompt.sections for f in section for t in letters(f.text)]
    assert [pair for chunk in chunks for pair in zip(chunk.ids, chunk.weights, strict=True)] == expected
    assert all(len(chunk.ids) <= window for chunk in chunks)


def test_prompt_that_fills_the_window_exactly_is_not_split_at_its_comma() -> None:
    assert cut("aaa,bbbbbb", 10) == ["aaa,bbbbbb"]


def test_long_prompt_is_cut_after_a_late_comma() -> None:
    assert cut("a" * 20 + "," + "b" * 15, 30) == ["a" * 20 + ",", "b" * 15]


def test_comma_too_far_back_is_no_place_to_cut() -> None:
    early = "aa," + "b" * (30 + COMMA_BACKTRACK_TOKENS)
    assert cut(early, 30) == [early[:30], early[30:]]


def test_the_last_twenty_tokens_are_searched_and_not_one_more() -> None:
    assert cut("a" * 10 + "," + "b" * 25, 30)[0] == "a" * 10 + ","
    assert cut("a" * 9 + "," + "b" * 25, 30)[0] == "a" * 9 + "," + "b" * 20


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a BREAK b", ["a", "b"]),
        ("BREAK b", ["", "b"]),
        ("a BREAK", ["a"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("", [""]),
    ],
)
def test_break_ends_a_chunk(source: str, expected: list[str]) -> None:
    assert cut(source, 10) == expected


def test_empty_prompt_is_one_empty_chunk() -> None:
    assert split_into_chunks(Prompt(sections=((),)), letters, window=5) == (Chunk(),)
