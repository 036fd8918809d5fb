"""What the choice between backends is told of mflux and DiffusionKit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from sdfleet.backends.choice import OWN_RANK, Way
from sdfleet.backends.guests.backend import GuestBackend
from sdfleet.backends.guests.venv import GUESTS, GuestVenv
from sdfleet.catalog.cards import Card, Family
from sdfleet.domain import ImageRequest
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import fitting
from sdfleet.engine.guests.fitting import GuestId
from sdfleet.engine.prompt_tags import read_tags

# On a Mac, whoever installs it wants it to draw; elsewhere MLX has only the CPU, and is for trying it.
_RANK = 5 if sys.platform == "darwin" else 2 * OWN_RANK
# Its last release is of December 2024: ours first, it when it is named.
_DIFFUSIONKIT_RANK = 2 * OWN_RANK


def ways(home: Path, options: EngineOptions, *, folder_of: Callable[[Card], Path]) -> tuple[Way, ...]:
    """Both guests, installed below `home` or not. folder_of: of a card's weights; may raise a CheckpointError."""
    return tuple(_way(guest, home, options, folder_of) for guest in GUESTS)


def wish_of_request(card: Card, request: ImageRequest) -> fitting.Wish:
    """What a request asks of a guest, before it is filled in from the card."""
    prompt, tagged = read_tags(request.prompt)
    strength = request.strength if request.strength is not None else card.strength
    return fitting.Wish(
        prompt=prompt or request.prompt,
        negative_prompt="" if "negative_prompt" in card.ignores else request.negative_prompt,
        width_px=request.width_px,
        height_px=request.height_px,
        steps=card.steps if request.steps is None else request.steps,
        guidance=None if "guidance" in card.ignores else request.guidance,
        sampler=request.sampler,
        has_image=request.image is not None,
        has_mask=request.mask is not None,
        strength=strength,
        has_loras=bool(request.loras or tagged),
        t5=request.t5,
        step_cache=request.step_cache,
        allow_degraded=request.allow_degraded,
    )


def _way(guest: GuestId, home: Path, options: EngineOptions, folder_of: Callable[[Card], Path]) -> Way:
    venv = GuestVenv(home, guest)

    def check(card: Card, request: ImageRequest) -> tuple[str, ...]:
        fitted = fitting.fit(guest, folder_of(card))
        return fitting.remarks(fitted, wish_of_request(card, request))

    return Way(
        id=guest,
        backend=GuestBackend(venv, options),
        reason=venv.reason,
        families=cast("tuple[Family, ...]", fitting.FAMILIES[guest]),
        check=check,
        rank=_RANK if guest == "mflux" else _DIFFUSIONKIT_RANK,
    )
