"""Servers for the tests of dialects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.serving import Running, running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`server(api_key="k", is_loaded=False)` starts one of its own, with these settings and the fake backend."""
    with contextlib.ExitStack() as stack:
        n_started = 0

        def start(**settings: object) -> Running:
            nonlocal n_started
            n_started += 1
            return stack.enter_context(running(tmp_path / f"server-{n_started}", **settings))  # type: ignore[arg-type]

        yield start


@pytest.fixture(scope="module")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server with the fake backend for a whole file: for tests that leave nothing behind."""
    with running(tmp_path_factory.mktemp("fake")) as here:
        yield here


@pytest.fixture(scope="session")
def starter_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server that really draws, with the built-in model."""
    with running(tmp_path_factory.mktemp("starter"), backend="local", device="cpu", dtype="float32") as here:
        yield here
