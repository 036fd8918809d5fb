"""mflux itself, on the CPU: its loader, its classes, its callbacks; weights as thin as its code allows.

FLUX.1 is built in one size only (23 GB), so it is drawn by mflux's own loop around networks of ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdfleet.backends.guests.backend import GuestBackend
from sdfleet.backends.guests.venv import guest_environment
from sdfleet.backends.local import LocalBackend
from sdfleet.domain import Drawing, ImageResult, Progress
from sdfleet.engine.events import EngineOptions
from sdfleet.errors import BrokenCheckpoint, JobCancelled, UnsupportedByModel
from tests.backends.drawings import drawing, guest_command
from tests.backends.guest_homes import real_guest

pytestmark = pytest.mark.slow

Folder = Callable[[str], Path]
FAMILY = {"zimage": "zimage", "klein": "flux2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder("klein")` is that thin checkpoint."""
    root = tmp_path_factory.mktemp("thin")

    def made(name: str) -> Path:
        from tests.backends import thin_models

        path = root / f"thin-{name}"
        return path if path.exists() else thin_models.write(name, root)

    return made


def asked(folder: Folder, name: str, **fields: Any) -> Drawing:
    given: dict[str, Any] = {
        "checkpoint": str(folder(name)), "family": FAMILY[name], "prompt": "a cat", "width_px": 64, "height_px": 64,
        "steps": 3, "guidance": 0.0,
    }  # fmt: skip
    return replace(drawing(), **(given | fields))


def pixels(result: ImageResult) -> bytes:
    return result.images[0].picture.data


def tell(story: Callable[[GuestBackend], Awaitable[None]], options: EngineOptions | None = None) -> None:
    async def told() -> None:
        backend = real_guest("mflux", options)
        try:
            await story(backend)
        finally:
            await backend.close()

    asyncio.run(told())


@pytest.mark.parametrize("name", ["zimage", "klein"])
def test_seed_and_prompt_decide_the_pixels_and_nothing_else_does(folder: Folder, name: str) -> None:
    async def story(backend: GuestBackend) -> None:
        first, again, seed, prompt = [
            await backend.generate(asked(folder, name, **more))
            for more in ({}, {"n_images": 2}, {"seed": 2**63 + 8}, {"prompt": "a red cube"})
        ]
        assert pixels(first) == pixels(again)
        assert len({pixels(first), pixels(seed), pixels(prompt), again.images[1].picture.data}) == 4
        assert [image.seed for image in again.images] == [7, 8]
        assert np.frombuffer(pixels(first), np.uint8).std() > 10
        assert (first.device, first.dtype, first.unsaid) == ("cpu", "bfloat16", ("guidance",))
        assert first.tokens[0].n_tokens > 5
        facts = backend.capabilities().facts
        assert facts["checkpoints"] == [str(folder(name))]
        assert 1e6 < sum(facts["bytes_by_checkpoint"].values()) < 1e8  # type: ignore[attr-defined]
        assert int(str(facts["peak_bytes"])) > int(str(facts["active_bytes"])) > 1e6
        await backend.unload(str(folder(name)))
        assert backend.capabilities().state == "idle"

    tell(story)


@pytest.mark.parametrize("name", ["zimage", "klein"])
def test_every_step_is_told_with_a_preview_that_comes_closer_to_the_picture(folder: Folder, name: str) -> None:
    async def story(backend: GuestBackend) -> None:
        seen: list[Progress] = []
        result = await backend.generate(asked(folder, name, steps=4, wants_previews=True), seen.append)
        assert [(each.step, each.n_steps) for each in seen] == [(step, 4) for step in range(1, 5)]
        assert seen[-1].eta_s == 0
        shown = [each.preview for each in seen if each.preview is not None]
        assert {(one.width_px, one.height_px) for one in shown} == {(8, 8)}
        last = np.frombuffer(shown[-1].data, np.uint8).astype(int)
        distance = [abs(np.frombuffer(one.data, np.uint8).astype(int) - last).mean() for one in shown]
        assert distance[0] > distance[2]
        assert pixels(result) == pixels(await backend.generate(asked(folder, name, steps=4)))
        assert {"load", "encode", "denoise", "decode"} <= result.timings_s.keys()

    tell(story)


def test_a_cancelled_picture_stops_between_two_steps_and_the_model_is_as_before(folder: Folder) -> None:
    async def story(backend: GuestBackend) -> None:
        before = await backend.generate(asked(folder, "zimage"))
        begun = asyncio.Event()
        long = asked(folder, "zimage", steps=1000)
        task = asyncio.create_task(backend.generate(long, lambda _: begun.set()))
        await begun.wait()
        await backend.cancel(long.job_id)
        with pytest.raises(JobCancelled):
            await task
        after = await backend.generate(asked(folder, "zimage"))
        assert pixels(before) == pixels(after)
        assert after.timings_s["load"] < 0.1

    tell(story)


def test_a_killed_process_costs_nothing_but_time(folder: Folder) -> None:
    async def story(backend: GuestBackend) -> None:
        before = await backend.generate(asked(folder, "zimage", steps=200))
        begun = asyncio.Event()
        again = asked(folder, "zimage", steps=200)
        task = asyncio.create_task(backend.generate(again, lambda _: begun.set()))
        await begun.wait()
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGKILL)
        result = await task
        assert pixels(result) == pixels(before)
        assert "the engine process ended and the job was drawn again" in result.warnings

    tell(story)


@pytest.mark.parametrize("name", ["zimage", "klein"])
def test_an_input_picture_is_redrawn_as_far_as_it_is_asked(folder: Folder, name: str) -> None:
    async def story(backend: GuestBackend) -> None:
        picture = (await backend.generate(asked(folder, name, seed=99))).images[0].picture
        plain = await backend.generate(asked(folder, name, steps=8))
        seen: list[Progress] = []
        little, much = [
            await backend.generate(asked(folder, name, steps=8, image=picture, strength=strength), seen.append)
            for strength in (0.3, 0.9)
        ]
        assert [each.n_steps for each in seen if each.step == each.n_steps] == [3, 7]  # mflux skips one at least
        assert len({pixels(plain), pixels(little), pixels(much)}) == 3

    tell(story)


def test_weights_in_fewer_bits_are_smaller_and_draw(folder: Folder) -> None:
    n_bytes: dict[str, int] = {}

    async def story(backend: GuestBackend) -> None:
        result = await backend.generate(asked(folder, "klein"))
        n_bytes[result.dtype] = int(str(backend.capabilities().facts["resident_bytes"]))

    tell(story)
    tell(story, EngineOptions(weights="int8"))
    tell(story, EngineOptions(weights="nf4"))
    # Convolutions stay as they are, and the thin VAE is three quarters of it: 5.8 of 6.9 MB (2026-11-21).
    assert n_bytes["bfloat16, weights in 8 bits"] < 0.9 * n_bytes["bfloat16"]
    assert n_bytes["bfloat16, weights in 4 bits"] < 0.95 * n_bytes["bfloat16, weights in 8 bits"]


def test_a_long_prompt_is_told_to_be_cut(folder: Folder) -> None:
    async def story(backend: GuestBackend) -> None:
        result = await backend.generate(asked(folder, "zimage", prompt="cat " * 300))
        assert result.tokens[0].n_tokens == result.tokens[0].window == 512
        assert any("read 512 of the prompt's" in text for text in result.warnings)

    tell(story)


def test_what_mflux_cannot_draw_is_refused_and_told_before_anything_is_loaded(folder: Folder, tmp_path: Path) -> None:
    async def story(backend: GuestBackend) -> None:
        result = await backend.generate(
            asked(folder, "zimage", guidance=5.0, negative_prompt="dog", sampler="heun", prompt="a (cat:1.2)")
        )
        plain = await backend.generate(asked(folder, "zimage"))
        assert pixels(result) == pixels(plain)
        assert len(result.warnings) == 4
        with pytest.raises(UnsupportedByModel, match=r"model_index\.json"):
            await backend.generate(asked(folder, "zimage", checkpoint=str(tmp_path)))
        (tmp_path / "model_index.json").write_text("{")
        with pytest.raises(BrokenCheckpoint, match="cannot be read"):
            await backend.generate(asked(folder, "zimage", checkpoint=str(tmp_path)))

    tell(story)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_flux_is_drawn_by_the_loop_of_mflux_around_networks_of_ours(
    checkpoints: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """See flux_stand_in.py for what is made up."""
    folder = tmp_path / name
    shutil.copytree(checkpoints(name), folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    published = {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096}
    (folder / "transformer" / "config.json").write_text(json.dumps(config | published))

    def flux(**fields: Any) -> Drawing:
        given: dict[str, Any] = {"checkpoint": str(folder), "family": "flux", "width_px": 64, "height_px": 96}
        return drawing(fields.pop("prompt", "a cat"), **(given | fields))

    async def told() -> None:
        python = real_guest("mflux")._venv.python
        command = guest_command("flux_stand_in:open_engine", python=str(python))
        backend = LocalBackend(EngineOptions(), command=command, env=guest_environment())
        try:
            seen: list[Progress] = []
            first = await backend.generate(flux(wants_previews=True), seen.append)
            again, seed, prompt, guided = [
                await backend.generate(flux(**more))
                for more in ({}, {"seed": 8}, {"prompt": "a red cube"}, {"guidance": 9.0})
            ]
            assert pixels(first) == pixels(again)
            assert len({pixels(first), pixels(seed), pixels(prompt)}) == 3
            assert (pixels(guided) == pixels(first)) == (name == "flux-schnell")
            assert [count.encoder for count in first.tokens] == ["clip", "t5"]
            assert first.tokens[1].window == (512 if name == "flux-dev" else 256)
            assert [(each.step, each.n_steps) for each in seen] == [(step, 4) for step in range(1, 5)]
            # The last preview is the picture itself, one pixel for each cell: its VAE keeps colours.
            assert seen[-1].preview is not None
            shown, drawn = (
                np.frombuffer(one.data, np.uint8).reshape(one.height_px, one.width_px, 3).astype(int)
                for one in (seen[-1].preview, first.images[0].picture)
            )
            assert abs(shown - drawn[4::8, 4::8]).mean() < 10
            picture = first.images[0].picture
            redrawn = await backend.generate(flux(image=picture, strength=0.5, seed=8))
            assert len({pixels(redrawn), pixels(first), pixels(seed)}) == 3
        finally:
            await backend.close()

    asyncio.run(told())
