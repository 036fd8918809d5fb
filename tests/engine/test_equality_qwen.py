"""As test_equality.py, for the families that read prompts with Qwen3: FLUX.2 klein and Z-Image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdfleet.domain import Drawing, Picture
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobDone, JobFailed
from sdfleet.engine.families.flux2 import reference_pixels
from tests import tiny
from tests.engine.drawing import (
    Pixels,
    drawing,
    most_levels_apart,
    ours,
    photo,
    pictures,
    run,
    square_mask,
)

Checkpoints = Callable[[str], Path]

NAMES = ("klein", "klein-base", "zimage")
TASKS: dict[str, dict[str, Any]] = {
    "txt2img": {},
    "img2img": {"image": photo(), "strength": 0.7},
    "inpaint": {"image": photo(), "mask": square_mask(), "strength": 0.8},
}
PIPELINES = {
    ("flux2", "txt2img"): diffusers.Flux2KleinPipeline,
    # An input picture without a mask is a reference to edit.
    ("flux2", "img2img"): diffusers.Flux2KleinPipeline,
    ("flux2", "inpaint"): diffusers.Flux2KleinInpaintPipeline,
    ("zimage", "txt2img"): diffusers.ZImagePipeline,
    ("zimage", "img2img"): diffusers.ZImageImg2ImgPipeline,
    ("zimage", "inpaint"): diffusers.ZImageInpaintPipeline,
}
TOGETHER = EngineOptions(device="cpu", dtype="float32", n_threads=1, max_rows=32)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_alone_a_picture_equals_diffusers_own(name: str, task: str, checkpoints: Checkpoints) -> None:
    one = drawing(name, checkpoints(name), steps=5, **TASKS[task])

    assert most_levels_apart(ours(one)[0], theirs(one)) <= 1


@pytest.mark.parametrize("name", ["klein-base", "zimage"])
def test_without_guidance_a_picture_equals_diffusers_own(name: str, checkpoints: Checkpoints) -> None:
    one = drawing(name, checkpoints(name), guidance=0.0, negative_prompt="")

    assert most_levels_apart(ours(one)[0], theirs(one)) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_that_is_no_square_equals_diffusers_own(name: str, checkpoints: Checkpoints) -> None:
    one = drawing(name, checkpoints(name), width_px=96, height_px=48, prompt="", steps=2)

    assert most_levels_apart(ours(one)[0], theirs(one)) <= 1


def test_a_reference_above_a_megapixel_is_shrunk_as_diffusers_does() -> None:
    width_px, height_px = 1168, 912
    wide = Picture(
        width_px=width_px,
        height_px=height_px,
        mode="RGB",
        data=bytes(width_px * height_px) + b"\x80" * (2 * width_px * height_px),
    )
    processor = diffusers.pipelines.flux2.image_processor.Flux2ImageProcessor(vae_scale_factor=16)
    shrunk = processor._resize_to_target_area(_image(wide))
    expected = processor.preprocess(
        shrunk, width=shrunk.width // 16 * 16, height=shrunk.height // 16 * 16, resize_mode="crop"
    )

    torch.testing.assert_close(reference_pixels(wide, multiple_px=16), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_the_same_in_mixed_company(name: str, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    company = [
        drawing(
            name,
            folder,
            job=f"job {i}",
            prompt=("a cat", "a dog on the moon " * (1 + 4 * i), "")[i % 3],
            negative_prompt=("", "blurry, low quality " * 6)[i % 2],
            seed=100 + i,
            steps=2 + i % 3,
            guidance=(1.0, 4.0, 7.5)[i % 3],
            sampler=("euler", "heun", "dpm++_2m", "unipc")[i % 4],
            **(TASKS["img2img"] if i % 4 == 3 else {}),
        )
        for i in range(6)
    ]
    together = ours(*company, options=TOGETHER)

    alone = [ours(one)[0] for one in company]
    assert [most_levels_apart(a, b) <= 1 for a, b in zip(together, alone, strict=True)] == [True] * len(company)


@pytest.mark.parametrize("name", ["klein-base", "zimage"])
def test_joining_late_and_losing_a_neighbour_changes_nothing(name: str, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    kept = drawing(name, folder, job="kept", steps=5)
    late = drawing(name, folder, job="late", prompt="a red robot " * 9, steps=3, seed=9, guidance=2.0)
    engine = Engine(TOGETHER)
    engine.submit(kept)
    engine.submit(drawing(name, folder, job="gone", steps=9, seed=8))
    events = engine.step() + engine.step()
    engine.submit(late)
    events += engine.step()
    engine.cancel(drawing(name, folder, job="gone").job_id)
    events += run(engine)

    drawn = pictures(event for event in events if event.job_id != "gone")
    assert most_levels_apart(drawn["kept", 0], ours(kept)[0]) <= 1
    assert most_levels_apart(drawn["late", 0], ours(late)[0]) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_different_lengths_may_share_a_step(name: str, checkpoints: Checkpoints) -> None:
    """Whether they do is decided by the clock. FLUX.2 klein is given its padding: one length up to 512 tokens."""
    engine = Engine(TOGETHER)
    for i, prompt in enumerate(("a cat", "a dog on the moon " * 12, "a cat " * 60)):
        engine.submit(drawing(name, checkpoints(name), job=f"job {i}", prompt=prompt, steps=2))
    keys = set()
    while not engine.is_idle:
        engine.step()
        keys |= set(engine._keys.values())
    assert len(keys) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_seed_prompt_and_guidance_shows_in_the_picture(name: str, checkpoints: Checkpoints) -> None:
    """Guidance not on the distilled klein, which is what it is."""
    folder = checkpoints(name)
    base, seed, prompt, edit, guidance = ours(
        drawing(name, folder, job="base"),
        drawing(name, folder, job="seed", seed=8),
        drawing(name, folder, job="prompt", prompt="a red robot painting"),
        drawing(name, folder, job="edit", image=photo()),
        drawing(name, folder, job="guidance", guidance=1.0),
    )
    assert [most_levels_apart(base, other) > 8 for other in (seed, prompt, edit)] == [True] * 3
    assert (most_levels_apart(base, guidance) > 8) == (name != "klein")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("klein", {"negative_prompt": "", "guidance": 1.0}, ()),
        ("klein", {"guidance": 1.0}, ("the negative prompt has no effect: this checkpoint is distilled",)),
        ("klein", {"negative_prompt": ""}, ("guidance 5 has no effect: this checkpoint is distilled",)),
        ("klein-base", {"guidance": 1.0}, ("the negative prompt has no effect at guidance 1 or less",)),
        ("klein-base", {"image": photo(), "strength": 0.3}, ("strength has no effect",)),
        ("klein-base", {"image": photo(), "strength": 1.0}, ()),
        ("zimage", {"guidance": 0.0}, ("the negative prompt has no effect at guidance 1 or less",)),
        ("zimage", {"prompt": "((masterpiece)), a cat"}, ("brackets are read as written",)),
    ],
)
def test_what_has_no_effect_is_said(
    name: str, changes: dict[str, Any], said: tuple[str, ...], checkpoints: Checkpoints
) -> None:
    engine = Engine(TOGETHER)
    engine.submit(drawing(name, checkpoints(name), steps=1, **changes))
    done = next(event for event in run(engine) if isinstance(event, JobDone))

    assert [warning.startswith(begin) for warning, begin in zip(done.warnings, said, strict=True)] == [True] * len(said)
    (counted,) = done.tokens
    assert counted.encoder == "qwen3"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("klein", {"width_px": 72}, "72 px is not a multiple of 16"),
        ("zimage", {"width_px": 72}, "72 px is not a multiple of 16"),
        ("klein", {"prompt": "a (cat:1.3)"}, "has no weights like '(cat:1.3)'"),
        ("zimage", {"negative_prompt": "(low:0.5)"}, "has no weights like '(low:0.5)'"),
        ("zimage", {"sampler": "euler_a"}, "flow matching"),
        ("klein", {"prompt": "x " * 600}, "1024 is this model's limit"),
        # The table of positions holds the prompt and one place for the picture.
        ("zimage", {"prompt": "x " * 600}, "992 is this model's limit"),
        ("klein", {"t5": "keep"}, "no T5 text encoder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    name: str, changes: dict[str, Any], reason: str, checkpoints: Checkpoints
) -> None:
    engine = Engine(TOGETHER)
    engine.submit(drawing(name, checkpoints(name), **changes))
    failed = next(event for event in run(engine) if isinstance(event, JobFailed))

    assert reason in failed.error.message


def theirs(one: Drawing) -> Pixels:
    """The picture by diffusers' own pipeline. Its klein pipelines take a negative prompt only when it is encoded."""
    base = tiny.load(Path(one.checkpoint))
    more = {"is_distilled": base.config.is_distilled} if one.family == "flux2" else {}
    pipe = PIPELINES[one.family, one.task](**base.components, **more)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": one.prompt,
        "num_inference_steps": one.steps,
        "guidance_scale": one.guidance,
        "generator": torch.Generator().manual_seed(one.seed),
        "output_type": "np",
    }
    if one.image is not None:
        arguments["image"] = _image(one.image)
    if one.image is not None and (one.family, one.task) != ("flux2", "img2img"):
        arguments["strength"] = one.strength
    if one.mask is not None:
        arguments["mask_image"] = _image(one.mask)
    if one.task != "img2img":
        arguments |= {"width": one.width_px, "height": one.height_px}
    with torch.inference_mode():
        if one.family == "zimage":
            arguments["negative_prompt"] = one.negative_prompt
        else:
            arguments["negative_prompt_embeds"] = pipe.encode_prompt(one.negative_prompt)[0]
        drawn = pipe(**arguments).images[0]
    return np.asarray((drawn * 255).round(), np.uint8)


def _image(picture: Picture) -> Image.Image:
    return Image.frombytes(picture.mode, (picture.width_px, picture.height_px), picture.data)
