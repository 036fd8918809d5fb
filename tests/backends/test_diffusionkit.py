"""DiffusionKit itself, on the CPU under Linux: its networks, tokenised text, sampler and decoder, with thin weights.

What cannot run here are its own loaders, which know fixed repositories of a hub; ours read diffusers' folders, and are
held to what diffusers' networks answer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdfleet.backends.guests.backend import GuestBackend
from sdfleet.backends.guests.venv import guest_environment
from sdfleet.domain import Drawing, ImageResult, Progress
from sdfleet.engine.events import EngineOptions
from sdfleet.errors import JobCancelled
from tests.backends.drawings import SRC, drawing
from tests.backends.guest_homes import real_guest

pytestmark = pytest.mark.slow

PROBE = Path(__file__).with_name("diffusionkit_probe.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thin Stable Diffusion 3 in diffusers' layout."""
    from tests.backends import thin_models

    return thin_models.write("sd3", tmp_path_factory.mktemp("thin"))


def asked(folder: Path, **fields: Any) -> Drawing:
    given: dict[str, Any] = {
        "checkpoint": str(folder),
        "family": "sd3",
        "prompt": "a cat",
        "width_px": 64,
        "height_px": 64,
        "steps": 3,
    }
    return replace(drawing(), **(given | fields))


def pixels(result: ImageResult) -> bytes:
    return result.images[0].picture.data


def tell(story: Callable[[GuestBackend], Awaitable[None]], options: EngineOptions | None = None) -> None:
    async def told() -> None:
        backend = real_guest("diffusionkit", options)
        try:
            await story(backend)
        finally:
            await backend.close()

    asyncio.run(told())


def test_seed_prompt_guidance_and_negative_prompt_decide_the_pixels(folder: Path) -> None:
    async def story(backend: GuestBackend) -> None:
        first, again, *others = [
            await backend.generate(asked(folder, **more))
            for more in (
                {}, {"wants_previews": True}, {"seed": 8}, {"seed": 2**32 + 7}, {"prompt": "a red cube"},
                {"guidance": 1.0}, {"guidance": 0.0}, {"negative_prompt": "dog"},
            )
        ]  # fmt: skip
        assert pixels(first) == pixels(again)
        # Guidance of 1 and of less both mean none.
        assert pixels(others[3]) == pixels(others[4])
        assert len({pixels(each) for each in (first, *others)}) == len(others)
        assert np.frombuffer(pixels(first), np.uint8).std() > 10
        assert [count.encoder for count in first.tokens] == ["clip_l", "clip_g", "t5"]
        assert (first.device, first.dtype, first.warnings, first.unsaid) == ("cpu", "float16", (), ())

    tell(story)


def test_steps_are_told_with_previews_and_a_cancelled_picture_leaves_the_network_whole(folder: Path) -> None:
    async def story(backend: GuestBackend) -> None:
        seen: list[Progress] = []
        before = await backend.generate(asked(folder, steps=4, wants_previews=True), seen.append)
        assert [(each.step, each.n_steps) for each in seen] == [(step, 4) for step in range(1, 5)]
        assert all(each.preview is not None and each.preview.width_px == 8 for each in seen)
        begun = asyncio.Event()
        long = asked(folder, steps=500)
        task = asyncio.create_task(backend.generate(long, lambda _: begun.set()))
        await begun.wait()
        await backend.cancel(long.job_id)
        with pytest.raises(JobCancelled):
            await task
        after = await backend.generate(asked(folder, steps=4))
        assert pixels(before) == pixels(after)
        assert after.timings_s["load"] < 0.1

    tell(story)


def test_a_killed_process_costs_nothing_but_time(folder: Path) -> None:
    async def story(backend: GuestBackend) -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(backend.generate(asked(folder, steps=30), lambda _: begun.set()))
        await begun.wait()
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGKILL)
        result = await task
        assert "the engine process ended and the job was drawn again" in result.warnings
        assert pixels(result) == pixels(await backend.generate(asked(folder, steps=30)))

    tell(story)


def test_an_input_picture_is_redrawn_as_far_as_it_is_asked(folder: Path) -> None:
    async def story(backend: GuestBackend) -> None:
        picture = (await backend.generate(asked(folder, seed=99))).images[0].picture
        seen: list[Progress] = []
        little, much = [
            await backend.generate(asked(folder, steps=8, image=picture, strength=strength), seen.append)
            for strength in (0.25, 0.75)
        ]
        assert [each.n_steps for each in seen if each.step == each.n_steps] == [2, 6]
        assert pixels(little) != pixels(much)

    tell(story)


def test_its_networks_answer_as_those_of_diffusers_do(folder: Path, tmp_path: Path) -> None:
    """The proof of the names and layouts in diffusionkit_weights.py, of every network, in float32."""
    real_guest("diffusionkit")
    given = _inputs(folder)
    np.savez(tmp_path / "in.npz", **given)
    script = f"import runpy, sys; sys.path.append({str(SRC)!r}); runpy.run_path({str(PROBE)!r}, run_name='__main__')"
    python = real_guest("diffusionkit")._venv.python
    command = [str(python), "-I", "-c", script, str(folder), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, env=guest_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = np.load(tmp_path / "out.npz")
    for name, expected in _answers(folder, given).items():
        # Rounding: 5e-4 of 4.8 was the most of any network (2026-11-21).
        np.testing.assert_allclose(made[name], expected, atol=1e-3 * abs(expected).max(), rtol=0, err_msg=name)


def _inputs(folder: Path) -> dict[str, Any]:
    import transformers

    drawn = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return drawn.standard_normal(shape).astype(np.float32)

    def ids(part: str) -> Any:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder / part))
        return tokenizer("a cat", padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids

    return {
        "latents": normal(1, 8, 8, 16), "context": normal(1, 9, 4096), "pooled": normal(1, 96),
        "timestep": np.array([500.0], np.float32), "image": normal(1, 64, 64, 3).clip(-1, 1),
        "ids_l": ids("tokenizer"), "ids_g": ids("tokenizer_2"), "words": np.array([[5, 6, 7, 1]]),
    }  # fmt: skip


def _answers(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    import diffusers
    import torch

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(str(folder))
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    latents, image = (tensors[name].permute(0, 3, 1, 2) for name in ("latents", "image"))
    with torch.no_grad():
        found = {
            "velocity": pipe.transformer(
                hidden_states=latents, encoder_hidden_states=tensors["context"],
                pooled_projections=tensors["pooled"], timestep=tensors["timestep"],
            ).sample.permute(0, 2, 3, 1),
            "picture": pipe.vae.decode(latents).sample.permute(0, 2, 3, 1),
            "mean": pipe.vae.encode(image).latent_dist.mean.permute(0, 2, 3, 1),
            "t5": pipe.text_encoder_3(tensors["words"]).last_hidden_state,
        }  # fmt: skip
        for name, encoder in (("l", pipe.text_encoder), ("g", pipe.text_encoder_2)):
            read = encoder(tensors[f"ids_{name}"], output_hidden_states=True)
            found |= {f"hidden_{name}": read.hidden_states[-2], f"pooled_{name}": read.text_embeds}
    return {name: array.numpy() for name, array in found.items()}
