"""A request that exists is a request that can be drawn: everything else is refused when it is made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sdfleet.domain import ImageRequest, Picture
from sdfleet.errors import BrokenPicture, InvalidValue


def picture(width_px: int = 64, height_px: int = 64, *, is_mask: bool = False) -> Picture:
    n_bytes = width_px * height_px * (1 if is_mask else 3)
    return Picture(width_px=width_px, height_px=height_px, mode="L" if is_mask else "RGB", data=bytes(n_bytes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "it is empty"),
        ({"prompt": " \n\t "}, "it is empty"),
        ({"prompt": "x" * 100_000}, "100000 characters are too many"),
        ({"prompt": "a\x00b"}, "NUL"),
        ({"prompt": "caf\udce9"}, "character 4 is not valid text"),
        ({"negative_prompt": "x" * 100_000}, "100000 characters are too many"),
        ({"width_px": 0, "height_px": 64}, "0 px is not between"),
        ({"width_px": -64, "height_px": 64}, "-64 px is not between"),
        ({"width_px": 64, "height_px": 10**9}, "1000000000 px is not between"),
        ({"width_px": 100, "height_px": 64}, "100 px is not a multiple of 8; use 96 or 104"),
        ({"width_px": 64}, "width and height go together"),
        ({"steps": 0}, "0 is not between 1 and 1000"),
        ({"steps": 10**6}, "1000000 is not between"),
        ({"guidance": math.nan}, "nan is not a number"),
        ({"guidance": math.inf}, "inf is not a number"),
        ({"guidance": -1.0}, "-1.0 is not a number"),
        ({"seed": -1}, "-1 does not fit 64 bits"),
        ({"seed": 2**64}, "does not fit 64 bits"),
        ({"n_images": 0}, "0 pictures asked for"),
        ({"n_images": 1000}, "1000 pictures asked for"),
        ({"strength": 0.0}, "not above 0"),
        ({"strength": 1.5}, "at most 1"),
        ({"strength": math.nan}, "nan is not above 0"),
        ({"mask": picture(is_mask=True)}, "no image to apply it to"),
        ({"image": picture(), "mask": picture(32, 64, is_mask=True)}, "it is 32x64, the image is 64x64"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        ImageRequest(**{"prompt": "a cat", **changes})

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_pictures_that_come_along_decide_the_task() -> None:
    image, mask = picture(), picture(is_mask=True)

    assert ImageRequest(prompt="a").task == "txt2img"
    assert ImageRequest(prompt="a", image=image).task == "img2img"
    assert ImageRequest(prompt="a", image=image, mask=mask).task == "inpaint"


def test_a_picture_holds_as_many_bytes_as_its_size_says() -> None:
    with pytest.raises(BrokenPicture, match="has 12288 bytes, not 5"):
        Picture(width_px=64, height_px=64, mode="RGB", data=b"short")
