"""Switches outlive the server, and a file that makes no sense is not taken for one that says yes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdfleet.errors import OutputNotWritable, StorageError
from sdfleet.storage.switches import SwitchBoard


def test_everything_is_on_until_it_is_switched_off_and_stays_so_after_a_restart(tmp_path: Path) -> None:
    board = SwitchBoard(tmp_path)
    assert board.now.image_generation
    assert not board.turn(image_generation=False).image_generation
    assert not SwitchBoard(tmp_path).now.image_generation
    board.turn(image_generation=True)
    assert SwitchBoard(tmp_path).now.image_generation


def test_switches_of_a_newer_version_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "switches.json").write_text('{"image_generation": false, "speech": true}', encoding="ascii")
    assert not SwitchBoard(tmp_path).now.image_generation


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"off"', "\x00", '{"image_generation": "off"}'])
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "switches.json").write_text(text, encoding="ascii")
    with pytest.raises(StorageError, match=r"switches\.json"):
        SwitchBoard(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="a folder in the file's place is an error everywhere, with other words")
def test_a_change_that_cannot_be_kept_is_refused_and_not_made(tmp_path: Path) -> None:
    board = SwitchBoard(tmp_path)
    (tmp_path / "switches.new").mkdir()
    with pytest.raises(OutputNotWritable, match=r"switches\.json"):
        board.turn(image_generation=False)
    assert board.now.image_generation
