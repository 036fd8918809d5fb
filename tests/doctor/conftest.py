"""Examinations know no settings of the machine that the tests run on."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):  # noqa: TID251 - tests set the stage
        if name.startswith("SD_") or name in {"HF_TOKEN", "HF_ENDPOINT", "MODELSCOPE_ENDPOINT"}:
            monkeypatch.delenv(name)
