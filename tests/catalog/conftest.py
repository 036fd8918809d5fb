"""Hubs that the tests run themselves; no other address is ever reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdfleet.catalog.pulled import PulledWeights
from tests.catalog.hub_server import HubServer, serving
from tests.catalog.hubs import toy_hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hugging Face's library may download, from loopback and nowhere else; no login of this machine is found."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in {"127.0.0.1", "::1"}, f"{address} is another machine"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture
def hub(tmp_path: Path, online: None) -> Iterator[HubServer]:  # noqa: ARG001 - sets the stage
    """A hub with the model `Maker/Toy-1`."""
    with serving(toy_hub(tmp_path / "published")) as running:
        yield running


@pytest.fixture
def weights(tmp_path: Path) -> PulledWeights:
    """An empty folder of downloads."""
    return PulledWeights(tmp_path / "models/weights")
