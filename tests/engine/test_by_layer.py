"""Networks whose blocks come one by one draw the same picture to the byte, and hold no more than a block of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdfleet.catalog.single_file.importing import import_file
from sdfleet.catalog.store import Catalog
from sdfleet.engine.by_layer import from_file, from_host, n_bytes_held
from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobDone, JobFailed
from sdfleet.engine.memory import Weights, plan
from sdfleet.engine.repeated import blocks
from sdfleet.engine.single_file import check
from sdfleet.engine.weight_files import WeightSource
from sdfleet.errors import OutOfMemory
from tests import single_files, tiny
from tests.engine.drawing import FLOAT32, Pixels, drawing, pictures, run

Checkpoints = Callable[[str], Path]
KINDS = ["sd15", "sdxl", "sd3", "sd35", "flux-dev", "klein", "zimage"]
INT8 = replace(FLOAT32, weights="int8")


def opened(folder: Path, options: EngineOptions = FLOAT32) -> Components:
    return Components(folder, choose_device("cpu", options.dtype, options.weights, options.text_weights))


def by_layer(engine: Engine, name: str, folder: Path) -> None:
    """From the first picture on, as if nothing else had fitted."""
    loaded = engine._residency._open(drawing(name, folder))
    engine._residency._rearrange(loaded, "by_layer")
    engine._residency._loaded[str(folder)] = loaded


def drawn(
    folder: Path, options: EngineOptions, *, is_by_layer: bool, name: str | None = None
) -> tuple[Pixels, JobDone]:
    engine = Engine(options)
    name = name or folder.name
    if is_by_layer:
        by_layer(engine, name, folder)
    engine.submit(drawing(name, folder))
    events = run(engine)
    engine.close()
    return pictures(events)["job", 0], next(event for event in events if isinstance(event, JobDone))


@pytest.mark.parametrize("options", [FLOAT32, INT8], ids=["full", "int8"])
@pytest.mark.parametrize("name", KINDS)
def test_the_picture_is_the_same_to_the_byte(name: str, options: EngineOptions, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)

    whole, _ = drawn(folder, options, is_by_layer=False)
    in_parts, told = drawn(folder, options, is_by_layer=True)

    assert np.array_equal(whole, in_parts)
    assert told.rungs == ("offload_layers",)
    assert any("its blocks are brought in one by one" in warning for warning in told.warnings)


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux-dev"])
def test_a_single_file_is_read_block_by_block_too(kind: str, tmp_path: Path) -> None:
    base, file = single_files.write(kind, tmp_path)
    catalog = Catalog(tmp_path / "models", built_in=(), published_cards=())
    folder = import_file(catalog, file, name="mine", base=str(base), prediction=None, check=check).entry.folder

    whole, _ = drawn(folder, FLOAT32, is_by_layer=False, name=kind)
    in_parts, told = drawn(folder, FLOAT32, is_by_layer=True, name=kind)

    assert np.array_equal(whole, in_parts)
    assert told.rungs == ("offload_layers",)


@pytest.mark.parametrize(("name", "part"), [("sd15", "unet"), ("flux-dev", "transformer"), ("sd3", "text_encoder_3")])
def test_between_calls_blocks_have_no_numbers_and_all_else_has(
    name: str, part: ComponentName, checkpoints: Checkpoints
) -> None:
    components = opened(checkpoints(name))
    whole = components.use(part)
    n_whole = components.resident_bytes()
    components.bring_by_layer()
    network = components.use(part)
    inside = {id(p) for block in blocks(network) for p in block.parameters()}

    assert network is not whole
    assert all(p.is_meta == (id(p) in inside) for p in network.parameters())
    assert components.resident_bytes() < n_whole
    assert network.dtype == torch.float32


@pytest.mark.parametrize("name", KINDS)
def test_the_plan_counts_what_is_held(name: str, checkpoints: Checkpoints) -> None:
    components = opened(checkpoints(name))
    planned = components.weights(by_layer=True)
    components.bring_by_layer()
    part: ComponentName = "unet" if components.has("unet") else "transformer"
    network = components.use(part)
    tables = sum(buffer.nbytes for buffer in network.buffers())

    assert planned.denoiser_by_layer == components.resident_bytes() + components.coming_bytes() + tables
    assert (planned.denoiser_by_layer or 0) <= planned.denoiser


def test_it_is_the_last_arrangement() -> None:
    weights = Weights(text=900, denoiser=4000, vae=100, denoiser_by_layer=700)
    free = {"activation_bytes": 100, "decode_bytes": 300}

    assert plan(weights, **free, free_bytes=10_000, mode="eco").residency == "by_phase"
    assert plan(weights, **free, free_bytes=2_000, mode="auto").residency == "by_layer"
    assert plan(weights, **free, free_bytes=2_000, mode="eco").residency == "by_layer"
    with pytest.raises(OutOfMemory):
        plan(weights, **free, free_bytes=2_000, mode="fast")
    with pytest.raises(OutOfMemory):
        plan(replace(weights, denoiser_by_layer=None), **free, free_bytes=2_000, mode="auto")


def test_what_fits_in_no_other_way_is_drawn_so(checkpoints: Checkpoints) -> None:
    """With room for the networks in parts, and not for the larger of them whole."""
    folder = checkpoints("zimage")
    weights = opened(folder).weights(by_layer=True)
    assert weights.denoiser_by_layer is not None
    whole, _ = drawn(folder, FLOAT32, is_by_layer=False)
    engine = Engine(FLOAT32)
    family = engine._residency._open(drawing("zimage", folder)).family
    peak = family.peak_bytes(width_px=64, height_px=64, n_rows=2)
    engine.close()
    assert weights.denoiser_by_layer < weights.denoiser

    engine = Engine(replace(FLOAT32, memory_limit_bytes=int((weights.denoiser + peak - 1) / 0.9)))
    engine.submit(drawing("zimage", folder))
    events = run(engine)

    assert engine.facts()["n_by_layer"] == 1
    assert np.array_equal(pictures(events)["job", 0], whole)
    engine.close()


def test_it_is_the_rung_before_a_smaller_picture(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds a whole network's weights has no room for its step."""
    folder = checkpoints("sd15")
    whole, _ = drawn(folder, FLOAT32, is_by_layer=False)
    engine = Engine(FLOAT32)
    family_class = type(engine._residency._open(drawing("sd15", folder)).family)
    predict = family_class.predict

    def short(self: Any, rows: Any) -> Any:
        if not any(p.is_meta for p in self.components.use("unet").parameters()):
            raise OutOfMemory("no room", hint="")
        return predict(self, rows)

    monkeypatch.setattr(family_class, "predict", short)
    engine.submit(drawing("sd15", folder))
    events = run(engine)
    engine.close()

    told = next(event for event in events if isinstance(event, JobDone))
    assert told.rungs[-2:] == ("offload_all", "offload_layers")
    assert np.array_equal(pictures(events)["job", 0], whole)


def test_after_a_fault_inside_a_block_the_next_call_is_right(checkpoints: Checkpoints) -> None:
    components = opened(checkpoints("sd15"))
    components.bring_by_layer()
    network = components.use("unet")
    block = blocks(network)[1]
    handle = next(layer for layer in block.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    latents, states = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 32)
    with torch.inference_mode():
        expected = network(latents, torch.tensor([5.0]), states)[0]

        def fail(*_: Any) -> None:
            raise RuntimeError("a fault")

        failing = handle.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="a fault"):
            network(latents, torch.tensor([5.0]), states)
        failing.remove()

        assert all(p.is_meta for p in block.parameters())
        assert torch.equal(network(latents, torch.tensor([5.0]), states)[0], expected)


def test_a_file_that_went_away_fails_the_job_and_says_so(tmp_path: Path) -> None:
    folder = tiny.write("sd15", tmp_path)
    engine = Engine(FLOAT32)
    by_layer(engine, "sd15", folder)
    engine.submit(drawing("sd15", folder))
    engine.step()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    failed = next(event for event in run(engine) if isinstance(event, JobFailed))
    engine.close()

    assert "diffusion_pytorch_model.safetensors is missing" in failed.error.message


def test_a_network_that_was_put_away_leaves_the_memory(checkpoints: Checkpoints) -> None:
    components = opened(checkpoints("sd15"))
    components.bring_by_layer()
    left = weakref.ref(components.use("unet"))
    gc.disable()
    try:
        components.put_away(["unet"])
        assert left() is None
    finally:
        gc.enable()


class _Stack(nn.Module):
    """Blocks of three layers, the last of which comes first."""

    def __init__(self, width: int = 4, n_blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(width, width) for _ in range(3))) for _ in range(n_blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for index in (len(self.blocks) - 1, *range(len(self.blocks) - 1)):
            x = self.blocks[index](x)
        return x


def test_from_the_host_the_block_that_came_next_the_last_time_is_sent_ahead() -> None:
    network = _Stack().requires_grad_(requires_grad=False)
    x = torch.ones(1, 4)
    expected = network(x)
    bringer = from_host(network, device=torch.device("cpu"))
    network(x)
    came: list[list[int]] = []
    for index in (2, 0, 1):
        network.blocks[index].register_forward_hook(lambda *_: came.append(list(bringer._coming)))

    assert torch.equal(network(x), expected)
    assert came == [[0], [1], [2]]
    assert n_bytes_held(network) == 4 * (5 * 4 + 2 * 3 * 5 * 4)


def test_no_more_than_some_blocks_of_a_file_are_in_memory(tmp_path: Path) -> None:
    """Six blocks of 50 MB, of which a whole network would have all; memory is what the system says."""
    width = 2048
    network = _Stack(width, n_blocks=6).requires_grad_(requires_grad=False)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "model.safetensors"
    )
    x = torch.ones(1, width)
    expected = network(x)
    del network
    with torch.device("meta"):
        network = _Stack(width, n_blocks=6)
    source = WeightSource(tmp_path, dtype=torch.float32, stem="model")
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    from_file(network, source.read, device=torch.device("cpu"), kept_in=None, is_arranged=False)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda *_: seen.append(process.memory_info().rss - before))

    with torch.inference_mode():
        assert torch.equal(network(x), expected)
    block_bytes = 3 * (width + 1) * width * 4
    assert max(seen) < 3 * block_bytes
