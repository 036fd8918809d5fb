"""The loop, on real toy checkpoints: who joins, who leaves, what is said, and what happens when something fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from sdfleet.domain import JobId, Progress
from sdfleet.engine.components import Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed, PictureDone
from sdfleet.engine.families.base import LatentFamily, NetworkRows
from sdfleet.engine.families.sd import StableDiffusion
from sdfleet.engine.vae import Vae
from sdfleet.errors import (
    BrokenCheckpoint,
    CheckpointNotFound,
    InvalidValue,
    JobCancelled,
    OutOfMemory,
    UnsupportedByModel,
)
from sdfleet.starter import weights_path
from tests.engine.drawing import FLOAT32, drawing, most_levels_apart, ours, photo, pictures, run, square_mask

Checkpoints = Callable[[str], Path]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1, max_rows=16))
    yield made
    made.close()


def done(events: list[Event], job: str) -> JobDone:
    return next(event for event in events if isinstance(event, JobDone) and event.job_id == job)


def failure(events: list[Event], job: str) -> JobFailed:
    return next(event for event in events if isinstance(event, JobFailed) and event.job_id == job)


def shrink_memory(monkeypatch: pytest.MonkeyPatch, *, most_rows: int) -> list[int]:
    """A device that has room for `most_rows` rows of SD: the network raises beyond. Rows of each call are noted."""
    calls: list[int] = []
    real = StableDiffusion.predict

    def predict(self: StableDiffusion, rows: NetworkRows) -> Tensor:
        calls.append(len(rows.latents))
        if len(rows.latents) > most_rows:
            raise torch.OutOfMemoryError("toy")
        return real(self, rows)

    monkeypatch.setattr(StableDiffusion, "predict", predict)
    return calls


def test_pictures_of_one_job_have_the_seeds_that_follow(engine: Engine, checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd15")
    engine.submit(drawing("sd15", folder, n_images=3, seed=2**64 - 2))

    drawn = pictures(run(engine))

    alone = ours(*(drawing("sd15", folder, job=str(i), seed=s) for i, s in enumerate((2**64 - 2, 2**64 - 1, 0))))
    assert [most_levels_apart(drawn["job", i], alone[i]) <= 1 for i in range(3)] == [True] * 3


def test_a_job_that_comes_later_joins_the_running_batch(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = shrink_memory(monkeypatch, most_rows=99)
    engine.submit(drawing("sd15", checkpoints("sd15"), job="first", steps=4))
    engine.step()
    engine.submit(drawing("sd15", checkpoints("sd15"), job="second", steps=2, guidance=1.0))
    run(engine)

    assert calls == [2, 3, 3, 2]


def test_one_picture_need_not_wait_for_all_of_a_big_job(checkpoints: Checkpoints) -> None:
    narrow = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1, max_rows=2))
    narrow.submit(drawing("sd15", checkpoints("sd15"), job="big", n_images=6, steps=4))
    events = [event for _ in range(6) for event in narrow.step()]
    narrow.submit(drawing("sd15", checkpoints("sd15"), job="single", seed=3, steps=4))
    order = [(e.job_id, e.image_index) for e in events + run(narrow) if isinstance(e, PictureDone)]

    assert order.index((JobId("single"), 0)) <= 3
    assert len(order) == 7


def test_progress_counts_every_step_and_ends_with_nothing_left(engine: Engine, checkpoints: Checkpoints) -> None:
    engine.submit(drawing("sd15", checkpoints("sd15"), steps=3))
    told = [event for event in run(engine) if isinstance(event, Progress)]

    assert [(p.step, p.n_steps) for p in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1].eta_s == pytest.approx(0.0)
    assert (told[0].eta_s or 0.0) > 0


def test_previews_come_only_when_somebody_looks(engine: Engine, checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd15")
    engine.submit(drawing("sd15", folder, job="unseen", steps=3))
    engine.submit(drawing("sd15", folder, job="seen", steps=3, wants_previews=True))
    told = [event for event in run(engine) if isinstance(event, Progress)]

    seen = [p.preview is not None for p in told if p.job_id == "seen"]
    assert seen == [True, True, False]  # the last step is followed by the picture itself
    assert all(p.preview is None for p in told if p.job_id == "unseen")


def test_a_preview_has_the_colours_of_the_picture() -> None:
    """The map from latents to colours is fitted, not tabled; the built-in VAE is the one trained VAE at hand."""
    device = choose_device("cpu", "float32")
    vae = Vae(Components(weights_path(), device).use("vae"), device)
    colours = torch.tensor([[0.8, -0.5, 0.1], [-0.9, -0.9, -0.2], [0.9, 0.9, 0.9]])
    flat = colours.view(3, 3, 1, 1).expand(3, 3, 64, 64)
    preview_map = vae.fit_preview()
    preview = torch.cat([preview_map.apply(vae.encode(image[None]).mean) for image in flat])

    assert preview.shape == (3, 3, 8, 8)
    assert float((preview[:, :, 2:6, 2:6].mean((2, 3)) - colours).abs().max()) < 0.15


def test_a_tiny_vae_beside_the_checkpoint_makes_the_previews(
    engine: Engine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = tmp_path / "with-tiny-vae"
    shutil.copytree(checkpoints("sd15"), folder)
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(folder / "tiny_vae")  # fmt: skip
    engine.submit(drawing("sd15", folder, steps=2, wants_previews=True))
    previews = [e.preview for e in run(engine) if isinstance(e, Progress) and e.preview is not None]

    assert [(p.width_px, p.height_px) for p in previews] == [(64, 64)]


def test_a_cancelled_job_leaves_at_the_next_step(engine: Engine, checkpoints: Checkpoints) -> None:
    engine.submit(drawing("sd15", checkpoints("sd15"), steps=50))
    engine.step()
    engine.cancel(JobId("job"))
    events = run(engine)

    assert isinstance(failure(events, "job").error, JobCancelled)
    assert not any(isinstance(event, Progress) for event in events)


def test_a_job_cancelled_before_it_was_prepared_never_starts(engine: Engine, checkpoints: Checkpoints) -> None:
    engine.submit(drawing("sd15", checkpoints("sd15")))
    engine.cancel(JobId("job"))

    assert isinstance(failure(run(engine), "job").error, JobCancelled)


def test_one_bad_row_fails_alone(engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    real = StableDiffusion.predict

    def predict(self: StableDiffusion, rows: NetworkRows) -> Tensor:
        if bool((rows.states == 0).flatten(1).all(dim=1).any()):
            raise ValueError("a row nobody can draw")
        return real(self, rows)

    monkeypatch.setattr(StableDiffusion, "predict", predict)
    folder = checkpoints("sd15")
    good = [drawing("sd15", folder, job="good", steps=14), drawing("sd15", folder, job="fine", seed=3, steps=16)]
    for one in good:
        engine.submit(one)
    engine.submit(drawing("sd15", folder, job="bad", prompt="a dog", steps=5))
    while len(engine._live) < 3:
        engine.step()
    for trajectory in engine._live.values():  # no request can poison a row on purpose
        if trajectory.job_id == "bad":
            with torch.inference_mode():
                trajectory.prompts.positive.states.zero_()
    engine._residency.prompts.clear()
    engine._batch = None
    events = run(engine)

    assert "a row nobody can draw" in str(failure(events, "bad").error)
    drawn = pictures(event for event in events if event.job_id != "bad")
    assert set(drawn) == {("good", 0), ("fine", 0)}


def test_out_of_memory_takes_fewer_rows_and_gives_the_same_pictures(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints("sd15")
    roomy = ours(*(drawing("sd15", folder, job=str(i), seed=i, steps=3) for i in range(4)))
    calls = shrink_memory(monkeypatch, most_rows=4)
    engine.submit(drawing("sd15", folder, n_images=4, seed=0, steps=3))
    events = run(engine)

    drawn = pictures(events)
    assert [most_levels_apart(drawn["job", i], roomy[i]) <= 1 for i in range(4)] == [True] * 4
    assert calls == [8, *[4] * 6]
    assert done(events, "job").rungs == ("fewer_rows",)


def test_out_of_memory_with_one_picture_left_puts_other_things_away_and_then_refuses(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.submit(drawing("sdxl", checkpoints("sdxl"), job="earlier"))
    run(engine)
    shrink_memory(monkeypatch, most_rows=0)
    engine.submit(drawing("sd15", checkpoints("sd15")))
    events = run(engine)

    assert isinstance(failure(events, "job").error, OutOfMemory)
    assert engine.facts()["checkpoints"] == [str(checkpoints("sd15"))]


def test_a_smaller_picture_is_drawn_only_when_the_request_allows_it(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StableDiffusion.predict

    def predict(self: StableDiffusion, rows: NetworkRows) -> Tensor:
        if rows.latents.shape[-1] > 12:
            raise torch.OutOfMemoryError("toy")
        return real(self, rows)

    monkeypatch.setattr(StableDiffusion, "predict", predict)
    big = {"width_px": 128, "height_px": 128, "steps": 2}
    engine.submit(drawing("sd15", checkpoints("sd15"), job="strict", **big))
    engine.submit(drawing("sd15", checkpoints("sd15"), job="lenient", seed=8, allow_degraded=True, **big))
    events = run(engine)

    assert isinstance(failure(events, "strict").error, OutOfMemory)
    drawn = pictures(event for event in events if event.job_id == "lenient")
    assert drawn["lenient", 0].shape == (128, 128, 3)
    assert "smaller_picture" in done(events, "lenient").rungs
    assert any("96x96" in text for text in done(events, "lenient").warnings)


def test_a_picture_too_big_to_decode_at_once_is_decoded_in_tiles(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LatentFamily.decode

    def decode(self: LatentFamily, latents: Tensor, *, tiled: bool) -> Tensor:
        if not tiled:
            raise torch.OutOfMemoryError("toy")
        return real(self, latents, tiled=tiled)

    monkeypatch.setattr(LatentFamily, "decode", decode)
    engine.submit(drawing("sd15", checkpoints("sd15"), width_px=256, height_px=192))
    events = run(engine)

    assert pictures(events)["job", 0].shape == (192, 256, 3)
    assert done(events, "job").rungs == ("tile_vae",)


def test_eco_mode_draws_the_same_picture_with_less_on_the_device(checkpoints: Checkpoints) -> None:
    one = drawing("sd3", checkpoints("sd3"), image=photo(), mask=square_mask(), strength=0.8)
    eco = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1, memory_mode="eco"))
    fast = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1, memory_mode="fast"))
    held = {}
    for name, made in (("eco", eco), ("fast", fast)):
        made.submit(one)
        made.step()
        held[name] = made.facts()["resident_bytes"]

    assert held["eco"] < held["fast"] / 2  # type: ignore[operator]
    assert most_levels_apart(pictures(run(eco))["job", 0], pictures(run(fast))["job", 0]) <= 1


def test_the_least_recently_used_checkpoint_leaves_when_another_needs_room(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    small = checkpoints("sd15")
    other = shutil.copytree(small, tmp_path / "other")
    measuring = Engine(FLOAT32)
    measuring.submit(drawing("sd15", small))
    run(measuring)
    family = measuring._residency.get(str(small)).family  # the size of the toy, to leave room for one
    most_bytes = family.components.weights().total + max(
        family.peak_bytes(width_px=64, height_px=64, n_rows=2), family.decode_bytes(width_px=64, height_px=64)
    )
    most_bytes += family.left_by_prompts_bytes(drawing("sd15", small))
    tight = Engine(
        EngineOptions(device="cpu", dtype="float32", n_threads=1, memory_limit_bytes=int(most_bytes / 0.9 * 1.05))
    )
    for folder in (small, other):
        tight.submit(drawing("sd15", folder, job=folder.name))
        pictures(run(tight))

    assert tight.facts()["checkpoints"] == [str(other)]


def test_a_checkpoint_that_cannot_fit_is_refused_with_the_numbers_before_it_is_loaded(
    checkpoints: Checkpoints,
) -> None:
    tight = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1, memory_limit_bytes=100_000))
    tight.submit(drawing("sd15", checkpoints("sd15")))
    error = failure(run(tight), "job").error

    assert isinstance(error, OutOfMemory)
    assert "GB at this size" in str(error)
    assert tight.facts()["resident_bytes"] == 0


def test_a_vae_that_overflows_in_half_precision_is_run_in_float32(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdfleet.engine.networks.autoencoder import AutoencoderKL

    real = AutoencoderKL.decode

    def decode(self: AutoencoderKL, z: Tensor, *, return_dict: bool = False) -> tuple[Tensor]:
        out = real(self, z, return_dict=return_dict)
        return (out[0] * float("nan"),) if z.dtype != torch.float32 else out

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    half = Engine(EngineOptions(device="cpu", dtype="bfloat16", n_threads=1))
    half.submit(drawing("sd15", checkpoints("sd15")))
    events = run(half)

    assert pictures(events)["job", 0].std() > 1
    assert done(events, "job").warnings == ("the VAE overflowed and was run in float32",)


def test_a_prompt_met_before_is_not_encoded_again(engine: Engine, checkpoints: Checkpoints) -> None:
    for seed in range(3):
        engine.submit(drawing("sd15", checkpoints("sd15"), job=str(seed), seed=seed))
        run(engine)
    cache = engine._residency.prompts  # the counters have no other reader yet

    assert (cache.n_misses, cache.n_hits) == (2, 4)


def test_an_unused_negative_prompt_is_told(engine: Engine, checkpoints: Checkpoints) -> None:
    engine.submit(drawing("sd15", checkpoints("sd15"), guidance=1.0, negative_prompt="blurry"))

    assert done(run(engine), "job").warnings == ("the negative prompt has no effect at guidance 1 or less",)


def test_tokens_used_are_reported_for_every_encoder(engine: Engine, checkpoints: Checkpoints) -> None:
    engine.submit(drawing("sd3", checkpoints("sd3"), prompt="a cat " * 60))
    tokens = done(run(engine), "job").tokens

    assert [t.encoder for t in tokens] == ["clip_l", "clip_g", "t5"]
    assert tokens[0].n_chunks > 1


@pytest.mark.parametrize(
    ("name", "changes", "error", "words"),
    [
        ("sd3", {"width_px": 72}, InvalidValue, "72 px is not a multiple of 16"),
        ("sd15", {"image": photo(128)}, InvalidValue, "it is 128x128, the picture to draw 64x64"),
        ("sd15", {"t5": "keep"}, UnsupportedByModel, "has no T5"),
        ("sd15-inpaint", {}, UnsupportedByModel, "inpainting model"),
        ("sd3", {"sampler": "euler_a"}, UnsupportedByModel, "flow matching"),
        ("sd15", {"image": photo(), "strength": 0.1, "steps": 4}, InvalidValue, "leaves no step"),
    ],
)
def test_what_a_model_cannot_do_is_said_and_nothing_else_stops(
    name: str,
    changes: dict[str, object],
    error: type[Exception],
    words: str,
    engine: Engine,
    checkpoints: Checkpoints,
) -> None:
    engine.submit(drawing(name, checkpoints(name), job="wrong", **changes))
    engine.submit(drawing("sd15", checkpoints("sd15"), job="right", steps=2))
    events = run(engine)

    assert isinstance(failure(events, "wrong").error, error)
    assert words in str(failure(events, "wrong").error)
    assert done(events, "right").tokens


def test_reproducible_rows_run_alone(engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = shrink_memory(monkeypatch, most_rows=99)
    for seed in range(3):
        engine.submit(drawing("sd15", checkpoints("sd15"), job=str(seed), seed=seed, steps=2, reproducible=True))
    run(engine)

    assert calls == [2] * 6


def test_a_picture_brought_to_another_shape_is_filled_up_at_the_edges(engine: Engine, checkpoints: Checkpoints) -> None:
    engine.submit(drawing("sd15", checkpoints("sd15"), resize_to=(128, 200)))
    drawn = pictures(run(engine))["job", 0]

    assert drawn.shape == (200, 128, 3)
    assert (drawn[:36] == drawn[36]).all()
    assert (drawn[164:] == drawn[163]).all()


def test_a_picture_made_from_another_is_stretched_back_to_its_shape(engine: Engine, checkpoints: Checkpoints) -> None:
    engine.submit(drawing("sd15", checkpoints("sd15"), image=photo(), strength=0.5, resize_to=(128, 200)))
    drawn = pictures(run(engine))["job", 0]

    assert drawn.shape == (200, 128, 3)
    assert not (drawn[:36] == drawn[36]).all()


def test_t5_is_neither_loaded_nor_counted_where_a_drawing_does_without(
    engine: Engine, checkpoints: Checkpoints
) -> None:
    engine.submit(drawing("sd3", checkpoints("sd3"), t5="skip"))
    tokens = done(run(engine), "job").tokens
    without = int(engine.facts()["resident_bytes"])  # type: ignore[call-overload]
    engine.submit(drawing("sd3", checkpoints("sd3")))
    run(engine)

    assert [t.encoder for t in tokens] == ["clip_l", "clip_g"]
    assert without < int(engine.facts()["resident_bytes"])  # type: ignore[call-overload]


def test_weights_that_cannot_be_read_fail_their_job_and_no_other(
    engine: Engine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints("sd15"), broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    engine.submit(drawing("sd15", broken, job="broken"))
    engine.submit(drawing("sd15", checkpoints("sd15"), job="whole"))
    events = run(engine)

    assert isinstance(failure(events, "broken").error, BrokenCheckpoint)
    assert done(events, "whole").tokens


def test_a_checkpoint_that_has_gone_is_said_to_be_gone(engine: Engine, tmp_path: Path) -> None:
    engine.submit(drawing("sd15", tmp_path / "gone"))

    assert isinstance(failure(run(engine), "job").error, CheckpointNotFound)
