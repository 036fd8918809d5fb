"""Device and number format are chosen by asking and timing; every kind of "no memory" becomes ours."""

from __future__ import annotations

import pytest
import torch

from sdfleet.engine import devices
from sdfleet.engine.devices import choose_device, out_of_memory_as_ours
from sdfleet.errors import InvalidValue, OutOfMemory


def test_float16_is_never_computed_on_a_cpu() -> None:
    with pytest.raises(InvalidValue, match="use bfloat16 or float32"):
        choose_device("cpu", "float16")


@pytest.mark.parametrize(("gain", "dtype"), [(2.1, torch.bfloat16), (1.1, torch.float32), (0.3, torch.float32)])
def test_on_a_cpu_bfloat16_is_taken_only_where_it_is_faster(
    gain: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_bfloat16_gain", lambda: gain)

    assert choose_device("cpu", "auto").dtype == dtype


def test_the_probe_measures_something() -> None:
    assert 0.001 < devices._bfloat16_gain(size=64, repeats=2) < 1000


def test_a_device_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValue, match=r"no cuda device that torch can use; it has: .*cpu"):
        choose_device("cuda", "auto")


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_cards_without_native_bfloat16_get_float16(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    assert choose_device("auto", "auto").dtype == dtype


def test_on_metal_the_vae_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = choose_device("auto", "auto")

    assert (device.kind, device.vae_dtype) == ("mps", torch.float32)


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_every_way_of_saying_no_memory_is_ours(fault: Exception) -> None:
    with pytest.raises(OutOfMemory), out_of_memory_as_ours():
        raise fault


def test_a_real_allocation_too_big_for_this_machine_is_ours() -> None:
    with pytest.raises(OutOfMemory), out_of_memory_as_ours():
        torch.empty(2**50, dtype=torch.uint8)


def test_another_fault_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_as_ours():
        raise RuntimeError("shapes do not match")
