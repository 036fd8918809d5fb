"""Errors keep their class and words across a process boundary, and every class can be told apart by its code."""

from __future__ import annotations

import re

import pytest

from sdfleet import errors
from sdfleet.errors import InvalidValue, PickleRefused, SdfleetError, UnknownName, from_wire

ALL = list(errors._subclasses(SdfleetError))


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    drawn: list[tuple[str, str]] = []
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"(    (?:[│├└─ ]{4})*)([A-Z]\w+)", line):
            depth, name = len(found[1]) // 4, found[2]
            above[depth] = name
            drawn.append((name, above.get(depth - 1, "Exception")))
    bases = [(cls.__name__, cls.__bases__[0].__name__) for cls in vars(errors).values() if cls in ALL]
    assert sorted(drawn) == sorted(bases)


def test_every_class_has_a_code_of_its_own() -> None:
    assert len({cls.code for cls in ALL}) == len(ALL)


@pytest.mark.parametrize("cls", ALL)
def test_every_class_comes_back_as_itself(cls: type[SdfleetError]) -> None:
    back = from_wire({"code": cls.code, "message": "what happened", "hint": "what to do"})

    assert type(back) is cls
    assert str(back) == "what happened; what to do"


def test_a_code_from_a_newer_version_is_still_an_error() -> None:
    assert type(from_wire({"code": "from_the_future", "message": "m", "hint": ""})) is SdfleetError


@pytest.mark.parametrize(
    "error",
    [InvalidValue("size", "it is odd", hint="make it even"), UnknownName("model", "x", ["y"]), PickleRefused("a")],
)
def test_what_is_sent_reads_the_same_on_the_other_side(error: SdfleetError) -> None:
    assert str(from_wire(error.to_wire())) == str(error)


def test_an_unknown_name_points_to_the_nearest_known_one() -> None:
    assert "did you mean 'starter'?" in str(UnknownName("model", "startre", ["starter", "sdxl"]))
    assert "known: sdxl, starter" in str(UnknownName("model", "zzz", ["starter", "sdxl"]))
