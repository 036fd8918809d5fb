"""How one weight of a component is cut out of a single file, as data: the engine does the cutting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sdfleet.catalog.headers import BITS
from sdfleet.errors import BrokenCheckpoint

# matrix: a 1x1 kernel [o, i, 1, 1] as [o, i]. halves_swapped: shift and scale change places along the rows.
# identity: no tensor of the file at all, but ones on the diagonal.
Then = Literal["as_it_is", "transposed", "matrix", "halves_swapped", "identity"]
# Bits of a block, and how many numbers are in it.
_BITS_OF_BLOCKS = {
    "Q8_0": (272, 32), "Q5_1": (192, 32), "Q5_0": (176, 32), "Q4_1": (160, 32), "Q4_0": (144, 32), "IQ4_NL": (144, 32),
    "Q6_K": (1680, 256), "Q5_K": (1408, 256), "Q4_K": (1152, 256), "Q3_K": (880, 256), "Q2_K": (672, 256),
    "IQ4_XS": (1088, 256),
}  # fmt: skip
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The tensor `source` of the file, or its rows [begin, end), and what is done to it then."""

    source: str
    rows: tuple[int, int] | None = None
    then: Then = "as_it_is"

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """What comes out of the file's tensor.

        >>> Piece(source="qkv", rows=(8, 16)).shape({"qkv": (24, 4)})
        (8, 4)
        >>> Piece(source="p", then="transposed").shape({"p": (4, 6)})
        (6, 4)
        """
        shape = shapes[self.source]
        if self.rows is not None:
            shape = (max(min(self.rows[1], shape[0]) - self.rows[0], 0), *shape[1:])
        match self.then:
            case "transposed":
                return shape[::-1]
            case "matrix":
                return shape[:2]
            case "identity":
                return (shape[-1], shape[-1])
            case _:
                return shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One component as a file holds it: its class, the config its shapes ask for, and its weights by their names."""

    class_name: str
    config: Mapping[str, Any]
    pieces: Mapping[str, Piece]

    def within(self, prefix: str) -> Part:
        """The same, where all names in the file begin with `prefix`."""
        return replace(
            self, pieces={name: replace(piece, source=prefix + piece.source) for name, piece in self.pieces.items()}
        )

    def n_parameters(self, shapes: Shapes) -> int:
        """Numbers in all of its weights."""
        return sum(math.prod(piece.shape(shapes)) for piece in self.pieces.values())


def split_rows(source: str, shapes: Shapes, n_rows: list[int], names: list[str]) -> dict[str, Piece]:
    """The pieces of a tensor that holds several weights one under the other; the last takes all that is left.

    >>> [piece.rows for piece in split_rows("qkv", {"qkv": (16, 4)}, [4, 4], ["q", "k", "v"]).values()]
    [(0, 4), (4, 8), (8, 16)]
    """
    pieces, begin = {}, 0
    for name, n in zip(names, [*n_rows, shapes[source][0] - sum(n_rows)], strict=True):
        pieces[name] = Piece(source=source, rows=(begin, begin + n))
        begin += n
    return pieces


def beneath(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def shape_at(shapes: Shapes, name: str, n_sides: int) -> tuple[int, ...]:
    """The shape of a tensor that decides the config. Raises BrokenCheckpoint where it is absent or of other rank."""
    shape = shapes.get(name)
    if shape is None:
        raise BrokenCheckpoint(f"the file has no {name!r}", hint="copy or download this file again")
    if len(shape) != n_sides or 0 in shape:
        raise BrokenCheckpoint(f"the file holds {name!r} as {list(shape)}, which makes no sense", hint="get it again")
    return shape


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbered blocks there are under `prefix`, from the highest number.

    >>> count({"blocks.0.weight": (1,), "blocks.11.weight": (1,)}, "blocks.")
    12
    """
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def n_bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes that so many numbers take in a file."""
    bits, n_numbers = _BITS_OF_BLOCKS.get(dtype, (BITS.get(dtype, 0), 1))
    return math.prod(shape) * bits // n_numbers // 8
