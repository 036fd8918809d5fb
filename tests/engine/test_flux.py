"""What is particular to FLUX.1: what it ignores is told, what it cannot do is refused, what it sees is seen.

That its pictures are diffusers' own is in test_equality.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdfleet.domain import Drawing, Picture
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import JobDone, JobFailed
from sdfleet.errors import InvalidValue, SdfleetError, UnsupportedByModel
from tests.engine.drawing import FLOAT32, drawing, most_levels_apart, ours, photo, run, square_mask, theirs

Checkpoints = Callable[[str], Path]

LONG_PROMPT = "a red robot painting the sea, " * 12


def _end(one: Drawing) -> JobDone | JobFailed:
    engine = Engine(FLOAT32)
    try:
        engine.submit(one)
        (end,) = [event for event in run(engine) if isinstance(event, JobDone | JobFailed)]
        return end
    finally:
        engine.close()


def _told(one: Drawing) -> tuple[str, ...]:
    end = _end(one)
    assert isinstance(end, JobDone), end
    return end.warnings


def _refusal(one: Drawing) -> SdfleetError:
    end = _end(one)
    assert isinstance(end, JobFailed), end
    return end.error


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("flux-dev", {}, ()),
        ("flux-dev", {"negative_prompt": "blurry"}, ("no negative prompt",)),
        ("flux-schnell", {"guidance": 0.0}, ()),
        ("flux-schnell", {"guidance": 3.5}, ("distilled without guidance",)),
        ("flux-kontext", {"image": photo(), "strength": 1.0}, ()),
        ("flux-kontext", {"image": photo(), "strength": 0.4}, ("strength has no effect",)),
        ("flux-kontext", {"image": photo(), "strength": 0.4, "mask": square_mask()}, ()),
        ("flux-dev", {"prompt": LONG_PROMPT}, (r"first 75 of \d+ tokens",)),
    ],
)
def test_what_has_no_effect_is_told(
    name: str, changes: dict[str, Any], told: tuple[str, ...], checkpoints: Checkpoints
) -> None:
    warnings = _told(drawing(name, checkpoints(name), **{"negative_prompt": "", "steps": 2, **changes}))
    assert len(warnings) == len(told)
    assert [bool(re.search(part, warning)) for part, warning in zip(told, warnings, strict=True)] == [True] * len(told)


def test_a_prompt_past_clips_window_equals_diffusers_own(checkpoints: Checkpoints) -> None:
    one = drawing("flux-dev", checkpoints("flux-dev"), prompt=LONG_PROMPT)
    assert most_levels_apart(ours(one)[0], theirs(one)) <= 1


def test_a_prompt_past_512_tokens_is_read_to_its_end(checkpoints: Checkpoints) -> None:
    folder = checkpoints("flux-schnell")
    prompts = [LONG_PROMPT * 3 + end for end in ("a blue castle", "a red castle")]
    blue, red = ours(*[drawing("flux-schnell", folder, job=prompt[-12:], prompt=prompt) for prompt in prompts])
    assert most_levels_apart(blue, red) > 1


def test_a_weight_in_the_prompt_shows(checkpoints: Checkpoints) -> None:
    folder = checkpoints("flux-dev")
    plain, weighted = ours(
        drawing("flux-dev", folder, job="plain"),
        drawing("flux-dev", folder, job="weighted", prompt="a (cat:1.5) on the moon"),
    )
    assert most_levels_apart(plain, weighted) > 1


def test_kontext_looks_at_the_picture_it_edits(checkpoints: Checkpoints) -> None:
    folder = checkpoints("flux-kontext")
    turned = Picture(width_px=64, height_px=64, mode="RGB", data=bytes(reversed(photo().data)))
    nothing, one, other = ours(
        drawing("flux-kontext", folder, job="nothing"),
        drawing("flux-kontext", folder, job="one", image=photo()),
        drawing("flux-kontext", folder, job="other", image=turned),
    )
    assert most_levels_apart(one, nothing) > 8
    assert most_levels_apart(one, other) > 8


def test_fill_sees_every_pixel_of_the_mask(checkpoints: Checkpoints) -> None:
    """Only the latent cells' corners are looked at where a mask is made as small as the latents."""
    folder = checkpoints("flux-fill")
    dotted = bytearray(square_mask().data)
    dotted[1] = 255
    masks = [square_mask(), Picture(width_px=64, height_px=64, mode="L", data=bytes(dotted))]
    # Grey is what masked pixels become, so that the masked pictures are the same and only the masks differ.
    grey = Picture(width_px=64, height_px=64, mode="RGB", data=bytes([127] * (64 * 64 * 3)))
    a, b = ours(*[drawing("flux-fill", folder, job=f"mask {i}", image=grey, mask=mask) for i, mask in enumerate(masks)])
    assert most_levels_apart(a, b) > 0


@pytest.mark.parametrize(
    ("name", "changes", "error", "says"),
    [
        ("flux-dev", {"t5": "skip"}, UnsupportedByModel, "cannot be left out"),
        ("flux-dev", {"width_px": 72}, InvalidValue, "multiple of 16"),
        ("flux-fill", {}, UnsupportedByModel, "only with an image and a mask"),
        ("flux-fill", {"image": photo()}, UnsupportedByModel, "only with an image and a mask"),
        ("sdxl-refiner", {}, UnsupportedByModel, "refiner"),
    ],
)
def test_what_it_cannot_do_is_refused(
    name: str, changes: dict[str, Any], error: type[SdfleetError], says: str, checkpoints: Checkpoints
) -> None:
    refusal = _refusal(drawing(name, checkpoints(name), **changes))
    assert isinstance(refusal, error)
    assert says in str(refusal)


def test_t5_may_be_insisted_on(checkpoints: Checkpoints) -> None:
    assert _told(drawing("flux-dev", checkpoints("flux-dev"), t5="keep", negative_prompt="", steps=1)) == ()


def test_a_control_network_is_not_taken_for_dev(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("flux-dev"), tmp_path / "control")
    config = folder / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 128}))
    assert "16 channels beside the latents" in str(_refusal(drawing("flux-dev", folder)))
