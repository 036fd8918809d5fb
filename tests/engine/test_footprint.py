"""What networks take is found out from the networks: operations, and the most bytes that are held at one time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sdfleet.catalog import architectures
from sdfleet.catalog.identify import identify
from sdfleet.engine.components import Components
from sdfleet.engine.devices import Device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.families import FAMILIES, LatentFamily
from sdfleet.engine.limits import count_work
from sdfleet.engine.prompt_cache import PromptCache
from sdfleet.engine.random_weights import write_checkpoint
from sdfleet.engine.tape import kept_bytes_of, record
from tests.engine.drawing import drawing, pictures, run

Checkpoints = Callable[[str], Path]
FAMILIES_AT_TOY_SIZE = ("sd15", "sd21", "sdxl", "sd3", "sd35", "flux-dev", "klein")
KB = 1000
MIB = 2**20


def family_of(folder: Path, dtype: torch.dtype = torch.float32) -> LatentFamily:
    device = Device(kind="cpu", dtype=dtype, vae_dtype=dtype, why="a test")
    return FAMILIES[identify(folder).family](Components(folder, device), device, PromptCache(0))


def on_meta(*size: int) -> Tensor:
    return torch.empty(size, device="meta")


def test_the_peak_is_that_of_what_is_held_at_one_time() -> None:
    weight = on_meta(1000, 250)

    def network() -> Tensor:
        wide = F.linear(on_meta(1, 250), weight)  # 1 kB and 4 kB
        wide = F.gelu(wide)  # 4 kB beside the 4 kB that go in; then those are let go
        return wide[:, :10].clone()

    work = record(network, kind="cpu")
    assert work.peak_bytes == 8 * KB
    assert work.operations == 2 * 250 * 1000
    assert work.n_views == 1


def test_a_tensor_that_is_let_go_makes_room_for_the_next() -> None:
    def network() -> Tensor:
        x = on_meta(1, 1000)
        for _ in range(20):
            x = F.relu(x)
        return x

    assert record(network, kind="cpu").peak_bytes == 8 * KB


def test_a_convolution_out_of_order_takes_as_much_again() -> None:
    layer = nn.Conv2d(10, 10, 1, bias=False, device="meta")
    assert record(lambda: layer(on_meta(1, 10, 10, 10)), kind="cpu").peak_bytes == 4 * 4 * KB


def test_weights_that_are_widened_for_use_count_while_they_are() -> None:
    x, weight = on_meta(1, 10), on_meta(1000, 10)
    plain, widened = (record(lambda: F.linear(x, weight), kind="cuda", widens=widens) for widens in (False, True))
    assert widened.peak_bytes - plain.peak_bytes == 40 * KB


def test_tensors_that_share_the_heap_are_told_from_those_with_pages_of_their_own() -> None:
    def network() -> Tensor:
        shared, own = on_meta(4 * MIB), on_meta(16 * MIB)  # 16 and 64 MiB in float32
        return shared.sum() + own.sum()

    on_cpu, on_card = (record(network, kind=kind) for kind in ("cpu", "cuda"))
    assert on_cpu.peak_bytes == on_card.peak_bytes
    assert 16 * MIB <= on_cpu.heap_bytes < 17 * MIB
    assert on_cpu.most_bytes == on_cpu.peak_bytes + on_cpu.heap_bytes
    assert on_card.most_bytes == on_card.peak_bytes


@pytest.mark.parametrize(("dtype", "is_left"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_heap_stays_where_something_is_kept_in_it(dtype: torch.dtype, *, is_left: bool) -> None:
    x, weight = (on_meta(*size).to(dtype) for size in ((64, 64), (4096, 64)))
    work = record(lambda: F.linear(F.linear(x, weight[:64]), weight), kind="cpu")
    assert work.heap_bytes > 64 * 4096 * dtype.itemsize
    assert (work.left_bytes >= 2 * work.heap_bytes) == is_left


def test_what_is_kept_of_a_shape_is_kept_once() -> None:
    x, weight = (on_meta(64, 64).to(torch.bfloat16) for _ in range(2))
    once = record(lambda: F.linear(x, weight), kind="cpu")
    twice = record(lambda: (F.linear(x, weight), F.linear(x, weight)), kind="cpu")
    assert once.kept_bytes == twice.kept_bytes > 0


@pytest.mark.parametrize(("dtype", "is_packed"), [(torch.bfloat16, True), (torch.float32, False)])
def test_packed_weights_of_small_networks_are_counted(
    dtype: torch.dtype, checkpoints: Checkpoints, *, is_packed: bool
) -> None:
    family = family_of(checkpoints("sd15"), dtype)
    step = family.footprint.denoise(width_px=64, height_px=64, n_rows=2)
    beside = step.kept_bytes - kept_bytes_of(step.calls)
    assert (beside > 0.8 * family.components.weights(text_encoders=()).denoiser) == is_packed
    assert (beside == 0) == (not is_packed)


def test_steps_leave_less_room_for_the_decode(checkpoints: Checkpoints) -> None:
    family = family_of(checkpoints("sd15"), torch.bfloat16)
    few, many = (family.decode_bytes(width_px=64, height_px=64, n_rows=n) for n in (1, 8))
    assert family.footprint.decode(width_px=64, height_px=64).most_bytes < few < many


@pytest.mark.parametrize("name", FAMILIES_AT_TOY_SIZE)
def test_operations_are_those_of_torchs_own_counter(name: str, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    family, asked = family_of(folder), drawing(name, folder)
    counted = count_work(asked)
    n_rows = 2 if family.is_guided(asked) else 1
    assert family.footprint.decode(width_px=64, height_px=64).operations == counted.decode
    step = family.footprint.denoise(width_px=64, height_px=64, n_rows=n_rows).operations
    # Toy CLIPs have shorter windows than any published one, so the conditioning is shorter there.
    assert counted.step <= step <= 4 * counted.step


@pytest.mark.parametrize("name", ["sd15", "sd3-medium", "flux-schnell", "z-image-turbo"])
def test_more_pixels_and_more_rows_take_more(name: str, tmp_path: Path) -> None:
    family = _published(name, tmp_path)
    small = family.peak_bytes(width_px=256, height_px=256, n_rows=1)
    assert small < family.peak_bytes(width_px=256, height_px=256, n_rows=2)
    assert small < family.peak_bytes(width_px=512, height_px=512, n_rows=1)
    wide, narrow = (family.footprint.decode(width_px=side, height_px=side).peak_bytes for side in (1024, 512))
    assert 3 < wide / narrow < 5


def test_operations_of_a_published_model_are_the_known_ones(tmp_path: Path) -> None:
    family = _published("sd15", tmp_path)
    step = family.footprint.denoise(width_px=512, height_px=512, n_rows=2)
    assert round(step.operations / 1e9) == 1607
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        vae = family.footprint._opened().components.use("vae")
        vae.decode(torch.empty(1, 4, 64, 64, device="meta", dtype=torch.bfloat16), return_dict=False)
    assert family.footprint.decode(width_px=512, height_px=512).operations == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bound_is_above_what_is_found_for_every_published_model(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    family = _published(name, tmp_path, dtype)
    for side in (64, 512, 1024):
        for n in (1, 2):
            found = family.peak_bytes(width_px=side, height_px=side, n_rows=n)
            assert found < family.peak_bound_bytes(width_px=side, height_px=side, n_rows=n)
        found = family.decode_bytes(width_px=side, height_px=side)
        assert found < family.decode_bound_bytes(width_px=side, height_px=side)


def test_pictures_that_end_together_are_decoded_in_turns_where_memory_is_short(checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd15")
    family = family_of(folder)
    size = {"width_px": 64, "height_px": 64}
    room = family.components.weights().total + 2.7 * family.decode_bytes(**size)
    tight = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1, memory_limit_bytes=int(room / 0.8)))
    one = drawing("sd15", folder, n_images=6)
    tight.submit(one)
    events = run(tight)
    loaded = tight._residency.get(str(folder))

    assert len(pictures(events)) == 6
    assert 1 < tight._residency.decode_cap(loaded, one) < 6


def test_where_memory_is_plenty_nothing_is_looked_at_closely(checkpoints: Checkpoints) -> None:
    folder = checkpoints("sd15")
    engine = Engine(EngineOptions(device="cpu", dtype="float32", n_threads=1))
    engine.submit(drawing("sd15", folder))
    run(engine)
    assert engine._residency.get(str(folder)).family.footprint._twin is None


def _published(name: str, home: Path, dtype: torch.dtype = torch.bfloat16) -> LatentFamily:
    folder = home / name
    write_checkpoint(architectures.load(name).with_light_text_encoders(), folder)
    return family_of(folder, dtype)
