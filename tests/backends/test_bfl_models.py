"""What Black Forest Labs' models take: refused, or told, before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest

from sdfleet.backends.bfl_models import MODELS, cards, check
from sdfleet.catalog.cards import Card
from sdfleet.domain import ImageRequest
from sdfleet.errors import InvalidValue, UnsupportedByModel
from tests.backends.drawings import GREY, WHITE

BY_NAME = {card.name: card for card in cards()}


@pytest.mark.parametrize(
    ("model", "asked", "field"),
    [
        ("flux-dev", {"width_px": 1472, "height_px": 512}, "width"),
        ("flux-dev", {"width_px": 512, "height_px": 248}, "height"),
        ("flux-pro-1.1", {"width_px": 520, "height_px": 512}, "width"),
        ("flux-dev", {"steps": 51}, "steps"),
        ("flux-dev", {"guidance": 5.5}, "guidance"),
        ("flux-dev", {"guidance": 1.0}, "guidance"),
        ("flux-2-flex", {"guidance": 10.5}, "guidance"),
        ("flux-2-pro", {"width_px": 32, "height_px": 512}, "width"),
    ],
)
def test_what_the_service_would_refuse_is_refused_before_anything_is_sent(
    model: str, asked: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidValue) as caught:
        check(BY_NAME[model], ImageRequest(prompt="x", **asked))
    assert caught.value.field == field


def test_masks_are_for_the_model_that_fills_and_it_needs_one() -> None:
    with pytest.raises(UnsupportedByModel, match="takes no mask"):
        check(BY_NAME["flux-dev"], ImageRequest(prompt="x", image=GREY, mask=WHITE))
    with pytest.raises(UnsupportedByModel, match="send a picture and a mask"):
        check(BY_NAME["flux-pro-1.0-fill"], ImageRequest(prompt="x", image=GREY))
    assert check(BY_NAME["flux-pro-1.0-fill"], ImageRequest(prompt="x", image=GREY, mask=WHITE)) == ()


def test_what_has_no_effect_is_told() -> None:
    asked = ImageRequest(
        prompt="x", width_px=640, height_px=400, image=GREY, strength=0.5, reproducible=True, t5="keep"
    )
    assert check(BY_NAME["flux-kontext-pro"], asked) == (
        "flux-kontext-pro decides the size itself: it is told the ratio 3:2",
        "strength has no effect on flux-kontext-pro",
        "t5 has no effect on flux-kontext-pro",
        "reproducible has no effect on flux-kontext-pro",
    )


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
def test_every_card_draws_as_it_comes(card: Card) -> None:
    mask = WHITE if MODELS[card.name].takes_mask else None
    asked = ImageRequest(
        prompt="x", width_px=card.width_px, height_px=card.height_px,
        steps=None if "steps" in card.ignores else card.steps,
        guidance=None if "guidance" in card.ignores else card.guidance,
        image=None if mask is None else GREY, mask=mask,
    )  # fmt: skip
    assert all("decides the size" in told for told in check(card, asked))
