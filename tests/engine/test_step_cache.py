"""Calls that are left out are guessed from the picture's own past, free their rows, and are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdfleet.domain import Progress, StepCache
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import JobDone
from sdfleet.engine.families.base import NetworkRows
from sdfleet.engine.families.sd import StableDiffusion
from sdfleet.engine.sampler_rules import Evaluation
from sdfleet.engine.step_cache import Forecast, left_out
from tests.engine.drawing import FLOAT32, drawing, most_levels_apart, ours, photo, pictures, run, square_mask

# diffusers 0.42.1 hands torch tensors to numpy 2 in DEIS and KDPM2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

Checkpoints = Callable[[str], Path]
MODES: tuple[StepCache, ...] = ("light", "strong")


def evaluation(alpha: float, sigma: float) -> Evaluation:
    return Evaluation(timestep=1.0, alpha=alpha, sigma=sigma, next=(0.0,) * 6, step=1)


def rows_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    real = StableDiffusion.predict

    def predict(self: StableDiffusion, rows: NetworkRows) -> Tensor:
        calls.append(len(rows.latents))
        return real(self, rows)

    monkeypatch.setattr(StableDiffusion, "predict", predict)
    return calls


@given(n=st.integers(1, 200))
def test_the_first_third_and_the_last_two_calls_are_always_made(n: int) -> None:
    light, strong = (left_out(mode, n) for mode in MODES)

    assert left_out("off", n) == frozenset()
    assert light | strong <= set(range(max(3, -(-n // 3)), n - 2))
    assert len(light) <= len(strong) <= n / 2


def test_an_answer_that_turns_evenly_is_guessed_exactly() -> None:
    """Noise that moves in a straight line over sigma / (alpha + sigma), at uneven places."""
    x, slope, noise = torch.randn(3, 1, 4, 8, 8).unbind()
    forecast = Forecast(left_out=frozenset({2}), draws_noise=False)
    places = [(0.4, 0.9), (0.5, 0.8), (0.9, 0.4)]
    denoised = []
    for alpha, sigma in places:
        seen = noise + sigma / (alpha + sigma) * slope
        denoised.append((x - sigma * seen) / alpha)
    for (alpha, sigma), answer in zip(places[:2], denoised, strict=False):
        forecast.learn(evaluation(alpha, sigma), x, answer)

    torch.testing.assert_close(forecast.denoised(evaluation(*places[2]), x), denoised[2], atol=1e-5, rtol=1e-5)


def test_with_noise_added_on_the_way_the_picture_is_held_and_not_the_noise() -> None:
    x, answer = torch.randn(2, 1, 4, 8, 8).unbind()
    forecast = Forecast(left_out=frozenset({2}), draws_noise=True)
    forecast.learn(evaluation(0.4, 0.9), x, torch.zeros_like(x))
    forecast.learn(evaluation(0.5, 0.8), x, answer)

    assert torch.equal(forecast.denoised(evaluation(0.9, 0.4), torch.randn_like(x)), answer)


def test_a_call_left_out_takes_no_row(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = rows_of_calls(monkeypatch)
    engine = Engine(FLOAT32)
    engine.submit(drawing("sd15", checkpoints("sd15"), steps=12, step_cache="strong"))
    events = run(engine)
    engine.close()

    assert calls == [2] * (12 - len(left_out("strong", 12)))
    assert [e.step for e in events if isinstance(e, Progress)] == [1, 2, 3, 4, 7, 10, 11, 12]


@pytest.mark.parametrize("mode", MODES)
def test_neighbours_with_other_plans_do_not_change_a_picture(mode: StepCache, checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd15")
    one = drawing("sd15", folder, steps=10, step_cache=mode)
    others = [
        drawing("sd15", folder, job="whole", steps=10, prompt="a robot"),
        drawing("sd15", folder, job="noisy", steps=13, step_cache="light", sampler="euler_a"),
        drawing("sd15", folder, job="unguided", steps=7, step_cache="strong", guidance=1.0, negative_prompt=""),
    ]
    alone, whole_alone = ours(one)[0], ours(others[0])[0]

    together = ours(one, *others)

    assert most_levels_apart(together[0], alone) <= 1
    assert most_levels_apart(together[1], whole_alone) <= 1


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *(("sd15", sampler) for sampler in ("ddim", "heun", "dpm++_2m karras", "euler_a", "lcm", "pndm", "unipc")),
        *(("sd15", sampler) for sampler in ("kdpm2_a", "deis")),
        ("sd21", "euler"),
        *(("sd3", sampler) for sampler in ("euler", "heun", "dpm++_2m")),
        ("flux-dev", "euler"),
        ("klein", "euler"),
        ("zimage", "euler"),
    ],
)
def test_the_guessed_picture_is_near_the_full_one(name: str, sampler: str, checkpoints: Checkpoints) -> None:
    """Toy networks answer wildly, so near is: nearer than the picture of another seed, and not the full one."""
    folder = checkpoints(name)
    few = {"steps": 16, "sampler": sampler, "guidance": 1.5}
    full, guessed, other = ours(
        drawing(name, folder, job="full", **few),
        drawing(name, folder, job="guessed", step_cache="light", **few),
        drawing(name, folder, job="other", **few, seed=8),
    )

    def apart(a: object, b: object) -> float:
        return float(abs(a.astype(float) - b.astype(float)).mean())  # type: ignore[attr-defined]

    assert 0 < apart(full, guessed) < 0.5 * apart(full, other)


def test_an_inpainted_picture_keeps_what_is_not_masked(checkpoints: Checkpoints) -> None:
    base = drawing("sd15", checkpoints("sd15"), steps=12, image=photo(), mask=square_mask(), strength=1.0)
    full, guessed = ours(base)[0], ours(drawing("sd15", checkpoints("sd15"), steps=12, image=photo(),
                                                mask=square_mask(), strength=1.0, step_cache="strong"))[0]  # fmt: skip

    assert abs(full.astype(int) - guessed.astype(int))[:8].mean() < 2


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (12, "step_cache 'light': 3 of 12 network calls were guessed: the picture differs from the full one"),
        (5, "step_cache 'light': 5 network calls are too few to leave any out"),
    ],
)
def test_what_was_left_out_is_told_once(steps: int, told: str, checkpoints: Checkpoints) -> None:
    engine = Engine(FLOAT32)
    engine.submit(drawing("sd15", checkpoints("sd15"), steps=steps, n_images=2, step_cache="light"))
    events = run(engine)
    engine.close()

    assert len(pictures(events)) == 2
    assert next(e for e in events if isinstance(e, JobDone)).warnings == (told,)
