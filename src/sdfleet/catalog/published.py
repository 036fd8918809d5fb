"""Models that somebody has published: what is known of them before any weight is here. Facts lie in data/*.toml."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources

from sdfleet.catalog.cards import Card

# The model inside the package, which nobody has to pull.
_BUILT_IN = "starter.toml"


@cache
def published() -> tuple[Card, ...]:
    """The cards that come with sdfleet, by name; a card says nothing about whether its weights are on this machine."""
    folder = resources.files("sdfleet.catalog").joinpath("data")
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".toml") and file.name != _BUILT_IN),
        key=lambda file: file.name,
    )
    return tuple(Card.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))) for file in files)
