"""Our pictures are diffusers' pictures, and a picture does not depend on its company.

Tolerance: 1 level of 255, in float32. The formulas are equal but not the order of operations: we keep latents
variance preserving where Euler's class keeps them unscaled, and a matrix product of another batch size is blocked
differently; both change the last bits (measured 1e-6 to 1e-5 of the latents), and a bit can tip a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions
from tests.engine.drawing import (
    FLOAT32,
    drawing,
    most_levels_apart,
    ours,
    photo,
    pictures,
    run,
    square_mask,
    theirs,
)

Checkpoints = Callable[[str], Path]

UNET_SAMPLERS = ("euler", "euler_a", "heun", "ddim", "dpm++_2m karras", "dpm++_2m_sde", "unipc", "pndm")
FLOW_SAMPLERS = ("euler", "heun", "dpm++_2m", "unipc")
IMAGE_TASKS = ("img2img", "inpaint")
CASES = [
    *[(name, "txt2img", s) for name in ("sd15", "sd21", "sdxl") for s in UNET_SAMPLERS],
    *[(name, "txt2img", s) for name in ("sd3", "sd35") for s in FLOW_SAMPLERS],
    ("sd3-no-t5", "txt2img", "euler"),
    *[(name, "img2img", s) for name in ("sd15", "sd21", "sdxl") for s in ("euler", "dpm++_2m", "euler_a")],
    *[(name, "inpaint", s) for name in ("sd15", "sd21", "sdxl") for s in ("euler", "ddim", "euler_a")],
    *[(name, "inpaint", "euler") for name in ("sd15-inpaint", "sdxl-inpaint")],
    *[(name, task, "euler") for name in ("sd3", "sd35") for task in ("img2img", "inpaint")],
    *[("sdxl-refiner", "img2img", s) for s in ("euler", "dpm++_2m", "euler_a")],
    ("sdxl-refiner", "inpaint", "euler"),
    *[("flux-dev", "txt2img", s) for s in FLOW_SAMPLERS],
    # No dpm++_2m: without a shift by size, FluxPipeline cannot drive diffusers' class.
    *[("flux-schnell", "txt2img", s) for s in ("euler", "heun", "unipc")],
    ("flux-kontext", "txt2img", "euler"),
    # The other tasks' pipelines drive no other class, and count the steps of one of second order twice.
    *[(name, task, "euler") for name in ("flux-dev", "flux-schnell", "flux-kontext") for task in IMAGE_TASKS],
    ("flux-kontext", "img2img", "heun"),
    ("flux-fill", "inpaint", "euler"),
]


def _given(name: str) -> dict[str, Any]:
    """The pictures without which a checkpoint draws nothing, or not what it is for."""
    match name:
        case "sdxl-refiner":
            return {"image": photo(), "strength": 0.9}
        case "flux-kontext":
            return {"image": photo()}
        case "flux-fill":
            return {"image": photo(), "mask": square_mask(), "strength": 1.0}
        case _:
            return {}


@pytest.mark.parametrize(("name", "task", "sampler"), CASES)
def test_alone_a_picture_equals_diffusers_own(name: str, task: str, sampler: str, checkpoints: Checkpoints) -> None:
    changes: dict[str, Any] = {
        "txt2img": {},
        "img2img": {"image": photo(), "strength": 0.7},
        "inpaint": {"image": photo(), "mask": square_mask(), "strength": 0.8},
    }[task]
    one = drawing(name, checkpoints(name), sampler=sampler, steps=5, **changes)

    assert most_levels_apart(ours(one)[0], theirs(one)) <= 1


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sd15-inpaint", "flux-dev", "flux-fill", "flux-kontext"])
def test_inpainting_at_full_strength_starts_from_noise_alone(name: str, checkpoints: Checkpoints) -> None:
    one = drawing(name, checkpoints(name), image=photo(), mask=square_mask(), strength=1.0)

    assert most_levels_apart(ours(one)[0], theirs(one)) <= 1


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sdxl-refiner", "flux-dev"])
def test_without_guidance_a_picture_equals_diffusers_own(name: str, checkpoints: Checkpoints) -> None:
    one = drawing(name, checkpoints(name), guidance=1.0, negative_prompt="", **_given(name))

    assert most_levels_apart(ours(one)[0], theirs(one)) <= 1


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sdxl-refiner"])
def test_without_a_negative_prompt_a_picture_equals_diffusers_own(name: str, checkpoints: Checkpoints) -> None:
    one = drawing(name, checkpoints(name), negative_prompt="", **_given(name))

    assert most_levels_apart(ours(one)[0], theirs(one)) <= 1


@pytest.mark.parametrize(
    "name",
    ["sd15", "sd21", "sdxl", "sd3", "sd35", "sdxl-refiner", "flux-dev", "flux-schnell", "flux-fill", "flux-kontext"],
)
def test_a_picture_is_the_same_in_mixed_company(name: str, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    samplers = FLOW_SAMPLERS if name.startswith(("sd3", "flux")) else UNET_SAMPLERS
    company = [
        drawing(
            name,
            folder,
            job=f"job {i}",
            prompt=f"a {('cat', 'dog', 'robot')[i % 3]} on the moon",
            negative_prompt=("", "blurry", "low quality")[i % 3],
            seed=100 + i,
            steps=3 + i % 4,
            guidance=(1.0, 4.0, 7.5)[i % 3],
            sampler=samplers[i % len(samplers)],
            **_given(name),
        )
        for i in range(8)
    ]
    together = ours(*company, options=EngineOptions(device="cpu", dtype="float32", n_threads=1, max_rows=16))

    alone = [ours(one)[0] for one in company]
    assert [most_levels_apart(a, b) <= 1 for a, b in zip(together, alone, strict=True)] == [True] * 8


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux-dev", "flux-kontext"])
def test_joining_late_and_losing_a_neighbour_changes_nothing(name: str, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    kept = drawing(name, folder, job="kept", steps=6)
    late = drawing(name, folder, job="late", steps=4, seed=9, guidance=2.0, image=photo(), strength=0.9)
    engine = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1, max_rows=8))
    engine.submit(kept)
    engine.submit(drawing(name, folder, job="gone", steps=9, seed=8))
    events = engine.step() + engine.step()
    engine.submit(late)
    events += engine.step()
    engine.cancel(drawing(name, folder, job="gone").job_id)
    events += run(engine)

    drawn = pictures(event for event in events if event.job_id != "gone")
    assert set(drawn) == {("kept", 0), ("late", 0)}
    assert most_levels_apart(drawn["kept", 0], ours(kept)[0]) <= 1
    assert most_levels_apart(drawn["late", 0], ours(late)[0]) <= 1


def test_every_seed_prompt_and_guidance_shows_in_the_picture(checkpoints: Checkpoints) -> None:
    """The equality tests above mean nothing on a toy that draws the same picture whatever it is asked."""
    for name in ("sd15", "sd21", "sdxl", "sd3", "sd35", "sdxl-refiner", "flux-dev", "flux-fill", "flux-kontext"):
        folder = checkpoints(name)
        base, seed, prompt, guidance = ours(
            drawing(name, folder, job="base", **_given(name)),
            drawing(name, folder, job="seed", seed=8, **_given(name)),
            drawing(name, folder, job="prompt", prompt="a red robot painting", **_given(name)),
            drawing(name, folder, job="guidance", guidance=1.0, **_given(name)),
            options=FLOAT32,
        )
        assert [most_levels_apart(base, other) > 8 for other in (seed, prompt, guidance)] == [True] * 3, name
