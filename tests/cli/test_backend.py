"""`sdfleet backend install|list|remove`, as far as nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from sdfleet.backends.guests.venv import GuestVenv
from tests.backends.test_guest_venvs import pretend
from tests.cli.conftest import Run


def test_the_list_says_how_to_install_each(run: Run) -> None:
    answer = run("backend", "list")
    assert answer.code == 0, answer.err
    assert "mflux          0.24.0   mflux is not installed: sdfleet backend install mflux" in answer.out
    facts = run("backend", "list", "--json").json["backends"]
    assert [(one["name"], one["is_installed"]) for one in facts] == [("mflux", False), ("diffusionkit", False)]


def test_an_installation_shows_what_comes_and_does_nothing_without_a_yes(run: Run, home: Path) -> None:
    answer = run("backend", "install", "mflux")
    assert answer.code == 1
    assert "say it with `sdfleet backend install mflux --yes`" in answer.err
    for words in ("mflux 0.24.0", "github.com/filipstrand/mflux", "transformers", "Apache-2.0", "MB or a little more"):
        assert words in answer.out
    assert not (home / "backends").exists()


def test_what_is_installed_needs_no_yes(run: Run, home: Path) -> None:
    pretend(GuestVenv(home, "mflux"))
    answer = run("backend", "install", "mflux")
    assert answer.code == 0, answer.err
    assert "is installed already" in answer.err
    assert "mflux          0.24.0   installed" in run("backend", "list").out


def test_removing_asks_and_gives_back_the_disk(run: Run, home: Path) -> None:
    pretend(GuestVenv(home, "mflux"))
    assert "sdfleet backend remove mflux --yes" in run("backend", "remove", "mflux").err
    answer = run("backend", "remove", "mflux", "--yes", "--json")
    assert (answer.json["name"], answer.json["n_freed_bytes"] > 0) == ("mflux", True)
    assert "mflux is not here" in run("backend", "remove", "mflux").out


def test_an_unknown_name_is_refused_with_the_nearest(run: Run) -> None:
    answer = run("backend", "install", "mflx", "--yes")
    assert answer.code == 2
    assert "did you mean 'mflux'" in answer.err
