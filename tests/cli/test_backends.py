"""`sdfleet generate --backend`, and models that only another backend has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdfleet.backends import bfl
from sdfleet.storage.pictures import read_metadata
from tests.backends.bfl_server import KEY, BflServer
from tests.backends.services import QUICK
from tests.backends.stand_in import serving
from tests.cli.conftest import Run

SIZE = ("--size", "512x256", "--seed", "5", "-o", "x.png")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, run: Run) -> Iterator[BflServer]:  # noqa: ARG001 - sets the stage first
    """A service with a key for it, quick to ask again."""
    with serving(BflServer()) as server:
        monkeypatch.setenv("SD_BFL_API_KEY", KEY)
        monkeypatch.setenv("SD_BFL_ENDPOINT", server.url)
        monkeypatch.setattr(bfl, "Pace", lambda: QUICK)
        yield server


def test_a_service_draws_where_it_is_named_and_the_answer_says_so(run: Run, service: BflServer, tmp_path: Path) -> None:
    answer = run("generate", "a fox", "--backend", "flux-api", "--model", "flux-pro-1.1", *SIZE)
    assert answer.code == 0, answer.err
    assert "what was asked for has left this machine" in answer.err
    noted = read_metadata((tmp_path / "x.png").read_bytes())
    assert noted is not None
    assert (noted.backend, noted.cost_credits, noted.model) == ("flux-api", 4.0, "flux-pro-1.1")
    assert service.n_asked["submit"] == 1


def test_repeating_such_a_picture_is_no_word_to_send_it_away_again(
    run: Run, service: BflServer, tmp_path: Path
) -> None:
    run("generate", "a fox", "--backend", "flux-api", "--model", "flux-pro-1.1", *SIZE)
    again = run("generate", "--like", str(tmp_path / "x.png"), "-o", "y.png")
    assert again.code != 0
    assert "flux-api" in again.err
    assert service.n_asked["submit"] == 1


def test_a_backend_that_is_not_set_up_or_not_known_is_told(run: Run) -> None:
    absent = run("generate", "a fox", "--backend", "flux-api", "-o", "x.png")
    assert absent.code != 0
    assert "SD_BFL_API_KEY" in absent.err
    unknown = run("generate", "a fox", "--backend", "dall-e", "-o", "x.png")
    assert unknown.code == 2
    assert "is not one of sd, flux-local, flux-api" in unknown.err


@pytest.mark.usefixtures("service")
def test_models_that_a_service_has_are_listed_with_it(run: Run) -> None:
    listed = run("models", "list").out
    assert "drawn by flux-api" in next(line for line in listed.splitlines() if line.startswith("flux-pro-1.1 "))
    assert "is missing" not in listed
