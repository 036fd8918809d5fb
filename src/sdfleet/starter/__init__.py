"""The built-in model: a small text-to-image model trained in this repository and shipped with it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def weights_path() -> Path:
    """The folder of the built-in model, a standard diffusers Stable Diffusion folder."""
    return Path(str(files(__package__))) / "weights"
