"""The prompt language people already write, read into weighted pieces and cut into windows; no torch here.

The syntax is the one AUTOMATIC1111's web UI made common (its wiki, page "Features", section "Attention/emphasis"):

    (word)        1.1 times the attention        ((word))  1.21 times: brackets multiply
    (word:1.3)    1.3 times                      [word]    divided by 1.1
    \\( \\) \\[ \\] \\\\   the character itself        BREAK     the rest starts a new window

Strange text is text, never an error:

- A bracket left open counts until the end of the prompt; a closing one without a partner is written as it stands.
- `(a:b)` is `a:b` in plain round brackets, because `b` is no number.
- A backslash before anything but a bracket or a backslash is kept (the web UI drops it).
- `[from:to:when]`, `[a|b]` and `AND` mean something to the web UI's other parts and nothing here: they are read by
  the rules above. `<lora:...>` is taken out before a prompt comes here, see engine/prompt_tags.py.

Only a weight outside 0 to 10, or brackets nested past all sense, is refused, with its place in the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdfleet.errors import PromptSyntax

ROUND_BRACKET_WEIGHT = 1.1
MAX_WEIGHT = 10.0
MAX_NESTING = 100
# The web UI's own setting ("comma padding backtrack"): a chunk may end this many tokens early to end at a comma.
COMMA_BACKTRACK_TOKENS = 20

_SYMBOL = re.compile(
    r"""\\[()\[\]\\]                  # an escaped character
      | :\s*(?P<weight>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)  # the end of (text:1.2)
      | (?<![\w'-])BREAK(?![\w'-])    # a word of its own
      | [()\[\]]
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A stretch of the prompt's own text that shares one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt that has been read. `sections` are the parts between BREAKs, each a tuple of fragments."""

    sections: tuple[tuple[Fragment, ...], ...]

    @property
    def text(self) -> str:
        """The prompt without its syntax; a BREAK is a space."""
        return " ".join("".join(fragment.text for fragment in section) for section in self.sections)

    @property
    def is_weighted(self) -> bool:
        """Some fragment has a weight other than 1."""
        return any(fragment.weight != 1.0 for section in self.sections for fragment in section)

    @property
    def is_empty(self) -> bool:
        """There is nothing to draw in it."""
        return not self.text.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one window of a text encoder reads: token ids without the begin and end marks, and a weight for each."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def parse_prompt(source: str) -> Prompt:
    r"""The prompt as weighted fragments. Raises PromptSyntax for a weight outside 0..10 or absurd nesting.

    >>> [(f.text, f.weight) for f in parse_prompt("a (cat:1.5), [blurry]").sections[0]]
    [('a ', 1.0), ('cat', 1.5), (', ', 1.0), ('blurry', 0.909091)]
    >>> [(f.text, f.weight) for f in parse_prompt("((a) b").sections[0]]
    [('a', 1.21), (' b', 1.1)]
    >>> parse_prompt(r"a smile :\) (style:retro)").text
    'a smile :) style:retro'
    >>> [[f.text for f in section] for section in parse_prompt("sky BREAK (sea:1.2)").sections]
    [['sky'], ['sea']]
    """
    pieces = _read(source)
    sections: list[list[Fragment]] = [[]]
    for at, piece in enumerate(pieces):
        if piece.is_break:
            sections.append([])
            continue
        text = piece.text
        # The blanks around a BREAK belong to it.
        if at and pieces[at - 1].is_break:
            text = text.lstrip()
        if at + 1 < len(pieces) and pieces[at + 1].is_break:
            text = text.rstrip()
        if not text:
            continue
        weight = _checked_weight(piece)
        section = sections[-1]
        if section and section[-1].weight == weight:
            # Tokenizers read "cat" and "c" + "at" differently: equal neighbours must be one text.
            section[-1] = Fragment(text=section[-1].text + text, weight=weight)
        else:
            section.append(Fragment(text=text, weight=weight))
    return Prompt(sections=tuple(map(tuple, sections)))


def split_into_chunks(
    prompt: Prompt,
    tokenize: Callable[[str], Sequence[int]],
    *,
    window: int,
    comma_id: int | None = None,
    goes_on: Callable[[int], bool] | None = None,
) -> tuple[Chunk, ...]:
    """The prompt's tokens in windows of at most `window`, in order, none lost; at least one chunk.

    tokenize: text -> ids without special tokens. Fragments are tokenized one by one, as the web UI does.
    A section longer than a window is cut after the last comma of its last 20 tokens if there is one.
    goes_on: whether an id belongs together with the one before it; no cut is made there unless a window holds no other.
    A BREAK always ends a chunk, so "BREAK a" begins with an empty one; a BREAK at the very end adds none.

    >>> words = {",": 0, "red": 1, "cat": 2, "moon": 3}
    >>> tokenize = lambda text: [words[w] for w in text.replace(",", " , ").split()]
    >>> [c.ids for c in split_into_chunks(parse_prompt("red cat, moon red"), tokenize, window=4, comma_id=0)]
    [(1, 2, 0), (3, 1)]
    >>> [c.ids for c in split_into_chunks(parse_prompt("red BREAK cat"), tokenize, window=4)]
    [(1,), (2,)]
    """
    if window < 1:
        raise ValueError(f"a window of {window} tokens holds nothing")
    chunks: list[Chunk] = []
    for section in prompt.sections:
        tokens = [(token, fragment.weight) for fragment in section for token in tokenize(fragment.text)]
        start = 0
        while len(tokens) - start > window:
            end = _end_of_chunk(tokens, start=start, window=window, comma_id=comma_id)
            while goes_on is not None and end > start and goes_on(tokens[end][0]):
                end -= 1
            end = end if end > start else start + window
            chunks.append(_chunk(tokens[start:end]))
            start = end
        chunks.append(_chunk(tokens[start:]))
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()
    return tuple(chunks)


def weights_by_character(prompt: Prompt) -> tuple[str, tuple[float, ...]]:
    """The text without syntax, and a weight for each of its characters: for encoders that read the text whole.

    >>> weights_by_character(parse_prompt("a (b:2)BREAK c"))
    ('a b c', (1.0, 1.0, 2.0, 1.0, 1.0))
    """
    weights: list[float] = []
    for at, section in enumerate(prompt.sections):
        if at:
            weights.append(1.0)
        for fragment in section:
            weights += [fragment.weight] * len(fragment.text)
    return prompt.text, tuple(weights)


@dataclass(slots=True, kw_only=True)
class _Piece:
    text: str
    start: int
    weight: float = 1.0
    is_break: bool = False


def _read(source: str) -> list[_Piece]:
    """Text and breaks in order; each bracket pair has multiplied the pieces it holds."""
    pieces: list[_Piece] = []
    # Two stacks, because the web UI lets "(a [b) c]" overlap: each kind of bracket finds its own partner.
    round_from: list[int] = []
    square_from: list[int] = []

    def add(text: str, start: int) -> None:
        if text:
            pieces.append(_Piece(text=text, start=start))

    def multiply(first_piece: int, factor: float) -> None:
        for piece in pieces[first_piece:]:
            piece.weight *= factor

    read_to = 0
    for symbol in _SYMBOL.finditer(source):
        add(source[read_to : symbol.start()], read_to)
        read_to = symbol.end()
        token, start = symbol.group(), symbol.start()
        if token in ("(", "["):
            stack = round_from if token == "(" else square_from
            stack.append(len(pieces))
            if len(round_from) + len(square_from) > MAX_NESTING:
                raise PromptSyntax(
                    f"more than {MAX_NESTING} brackets are open at character {start + 1}",
                    hint="give the weight as a number, like (cat:1.5)",
                )
        elif symbol["weight"] is not None and round_from:
            multiply(round_from.pop(), _stated_weight(symbol["weight"], at=symbol.start("weight")))
        elif token == ")" and round_from:
            multiply(round_from.pop(), ROUND_BRACKET_WEIGHT)
        elif token == "]" and square_from:
            multiply(square_from.pop(), 1 / ROUND_BRACKET_WEIGHT)
        elif token == "BREAK":
            pieces.append(_Piece(text="", start=start, is_break=True))
        elif token.startswith("\\"):
            add(token[1:], start)
        else:
            add(token, start)
    add(source[read_to:], read_to)

    for first_piece in round_from:
        multiply(first_piece, ROUND_BRACKET_WEIGHT)
    for first_piece in square_from:
        multiply(first_piece, 1 / ROUND_BRACKET_WEIGHT)
    return pieces


def _stated_weight(written: str, *, at: int) -> float:
    weight = float(written)
    if not 0 <= weight <= MAX_WEIGHT:
        raise PromptSyntax(
            f"the weight {written[:20]} at character {at + 1} is not between 0 and {MAX_WEIGHT:g}",
            hint=r"if no weight was meant, escape the brackets, like \(at 10:30\)",
        )
    return weight


def _checked_weight(piece: _Piece) -> float:
    # Rounded so that ((a)) is 1.21 and "[(a)]" is plain text again.
    weight = round(piece.weight, 6)
    if weight > MAX_WEIGHT:
        raise PromptSyntax(
            f"the brackets around character {piece.start + 1} multiply to a weight of {weight:g}",
            hint=f"keep it at {MAX_WEIGHT:g} or less; 1.1 to 1.5 is usual",
        )
    return weight


def _end_of_chunk(tokens: Sequence[tuple[int, float]], *, start: int, window: int, comma_id: int | None) -> int:
    end = start + window
    for at in range(end - 1, max(start, end - COMMA_BACKTRACK_TOKENS) - 1, -1):
        if tokens[at][0] == comma_id:
            return at + 1
    return end


def _chunk(tokens: Sequence[tuple[int, float]]) -> Chunk:
    return Chunk(ids=tuple(token for token, _ in tokens), weights=tuple(weight for _, weight in tokens))
