"""Cards, drivers and formats, from what the system and torch say of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdfleet.backends.base import Capabilities
from sdfleet.doctor.machine import Machine, TorchProbe
from tests.doctor.stage import CPU_BUILD, CUDA_BUILD, H100, ON_CARD, ON_METAL, cure, look, machine, write

OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)."
ABOUT_CARDS = ("torch-without-cuda", "gpu-driver", "card-not-in-build", "drawing-on-cpu", "float16-on-cpu")


def _with_card(folder: Path, *, torch: dict[str, Any], **changes: Any) -> Machine:
    write(folder / "devices/nvidia0")
    write(folder / "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.42.01  Mon Sep 1")
    return machine(folder, torch=torch, **changes)


def _probing(folder: Path, probe: TorchProbe) -> Machine:
    return replace(machine(folder), torch=probe)


def test_a_process_of_its_own_asks_torch_itself(tmp_path: Path) -> None:
    found = look("torch-import", _probing(tmp_path, TorchProbe()))
    assert found.verdict == "ok", found
    assert "imported in" in found.what


def test_a_torch_that_cannot_be_imported_is_told_with_its_own_words(tmp_path: Path) -> None:
    words = "libcudart.so.13: cannot open shared object file"
    write(tmp_path / "hidden/torch/__init__.py", f"raise ImportError({words!r})")
    probe = TorchProbe(("env", f"PYTHONPATH={tmp_path / 'hidden'}", sys.executable, "-m", "sdfleet.engine.probe"))
    there = _probing(tmp_path, probe)
    assert words in look("torch-import", there).what
    assert "--force-reinstall torch" in cure("torch-import", there)
    assert look("float16-on-cpu", there).verdict == "ok"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("tail", "-f", "/dev/null"), "was not imported within"),
        (("sh", "-c", "echo Illegal instruction >&2; kill -ILL $$"), "signal 4; it said: Illegal instruction"),
        (("/no/such/python",), "could not be asked"),
        (("echo", "not json"), "exit code 0; it said: nothing"),
    ],
)
def test_a_torch_that_hangs_or_kills_its_process_ends_no_check(
    tmp_path: Path, command: tuple[str, ...], told: str
) -> None:
    found = look("torch-import", _probing(tmp_path, TorchProbe(command, deadline_s=1.0)))
    assert found.verdict == "fault"
    assert told in found.what


def test_torch_is_asked_once_for_every_check(tmp_path: Path) -> None:
    log = tmp_path / "asked"
    probe = TorchProbe(("sh", "-c", f"echo x >> '{log}'; echo '{{}}'"))
    there = _probing(tmp_path, probe)
    for name in ("torch-import", "drawing-on-cpu", "black-pictures"):
        look(name, there)
    assert log.read_text() == "x\n"


def test_a_machine_without_a_card_has_nothing_to_mend(tmp_path: Path) -> None:
    there = machine(tmp_path, torch=CPU_BUILD)
    assert {look(name, there).verdict for name in ABOUT_CARDS} <= {"ok", "not_applicable"}


def test_a_card_that_works_has_nothing_to_mend(tmp_path: Path) -> None:
    there = _with_card(tmp_path, torch=ON_CARD)
    found = {name: look(name, there) for name in ABOUT_CARDS}
    assert {finding.verdict for finding in found.values()} == {"ok"}, found
    assert "NVIDIA H100 with 85.9 GB" in found["card-not-in-build"].what


def test_torch_for_cpus_beside_a_card_is_a_fault(tmp_path: Path) -> None:
    there = _with_card(tmp_path, torch=CPU_BUILD)
    assert "torch 2.13.0+cpu is a build for CPUs" in look("torch-without-cuda", there).what
    assert "pytorch.org/get-started" in cure("torch-without-cuda", there)


def test_a_driver_that_is_too_old_is_told_with_both_versions(tmp_path: Path) -> None:
    there = _with_card(tmp_path, torch={**CUDA_BUILD, "cuda_said": OLD_DRIVER})
    found = look("gpu-driver", there)
    assert found.verdict == "fault"
    assert "CUDA 13.0" in found.what
    assert "470.42.01" in found.what
    assert OLD_DRIVER in found.what
    assert "newest driver" in cure("gpu-driver", there)


@pytest.mark.parametrize(
    ("capability", "built_for", "verdict"),
    [
        ([9, 0], ["sm_80", "sm_90"], "ok"),
        ([8, 9], ["sm_80", "sm_90"], "ok"),
        ([12, 0], ["sm_80", "sm_90"], "fault"),
        ([12, 0], ["sm_80", "compute_90"], "ok"),
        ([6, 1], ["sm_70", "sm_90a"], "fault"),
    ],
)
def test_a_card_that_torch_has_no_code_for_is_told(
    tmp_path: Path, capability: list[int], built_for: list[str], verdict: str
) -> None:
    seen = {**ON_CARD, "cards": [{**H100, "capability": capability}], "is_built_for": built_for}
    assert look("card-not-in-build", machine(tmp_path, torch=seen)).verdict == verdict


def test_drawing_on_the_cpu_beside_a_card_is_told_with_the_setting(tmp_path: Path) -> None:
    assert "unset SD_DEVICE" in cure("drawing-on-cpu", _with_card(tmp_path, torch=ON_CARD, device="cpu"))


def test_a_hidden_card_is_told_with_the_variable(tmp_path: Path) -> None:
    there = _with_card(tmp_path, torch=CUDA_BUILD, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert cure("drawing-on-cpu", there) == "unset CUDA_VISIBLE_DEVICES"
    assert look("gpu-driver", there).verdict == "not_applicable"


def test_a_server_that_draws_on_the_cpu_beside_a_card_says_so(tmp_path: Path) -> None:
    def standing(device: str) -> Capabilities:
        return Capabilities(name="local", state="ready", facts={"device": device})

    there = _with_card(tmp_path, torch=CPU_BUILD, standing=standing("cpu"))
    assert cure("engine-on-cpu", there) == "sdfleet doctor"
    assert look("engine-on-cpu", replace(there, standing=standing("cuda"))).verdict == "ok"


@pytest.mark.parametrize(
    ("torch", "settings", "verdict"),
    [
        (CPU_BUILD, {"dtype": "float16"}, "fault"),
        (ON_CARD, {"dtype": "float16", "device": "cpu"}, "fault"),
        (ON_CARD, {"dtype": "float16"}, "ok"),
        (CPU_BUILD, {"dtype": "bfloat16"}, "ok"),
    ],
)
def test_float16_on_a_cpu_is_told_before_the_engine_refuses_it(
    tmp_path: Path, torch: dict[str, Any], settings: dict[str, Any], verdict: str
) -> None:
    there = machine(tmp_path, torch=torch, **settings)
    assert look("float16-on-cpu", there).verdict == verdict
    if verdict == "fault":
        assert cure("float16-on-cpu", there).startswith("SD_DTYPE=auto")


def test_where_pictures_could_be_black_it_is_said_how_that_is_prevented(tmp_path: Path) -> None:
    assert "VAE in float32" in look("black-pictures", machine(tmp_path, torch=ON_METAL)).what
    old = {**ON_CARD, "cards": [{**H100, "capability": [7, 5]}], "is_built_for": ["sm_75"]}
    assert "run again in float32" in look("black-pictures", machine(tmp_path, torch=old)).what
    assert look("black-pictures", machine(tmp_path, torch=CPU_BUILD)).verdict == "not_applicable"


def test_a_cpu_without_avx2_is_told(tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", "processor : 0\nflags\t\t: fpu sse4_2 avx\n")
    there = machine(tmp_path)
    assert "no AVX2" in look("processor", there).what
    assert "pass the host's CPU through" in cure("processor", there)


def test_a_cpu_with_amx_is_told_as_such(tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", "flags\t\t: avx2 avx512f avx512_bf16 amx_bf16\n")
    found = look("processor", machine(tmp_path))
    assert (found.verdict, "AMX" in found.what, "natively" in found.what) == ("ok", True, True)


def _process(proc: Path, pid: int, *, command: str, parent: int) -> None:
    write(proc / f"{pid}/cmdline", command.replace(" ", "\0"))
    write(proc / f"{pid}/status", f"Name:\tpython\nPPid:\t{parent}\n")


def test_processes_that_the_compiler_left_behind_are_told_with_the_command_that_ends_them(tmp_path: Path) -> None:
    worker = "/usr/bin/python /site/torch/_inductor/compile_worker/__main__.py --workers=8"
    _process(tmp_path / "proc", 4711, command=worker, parent=1)
    _process(tmp_path / "proc", 4712, command=worker, parent=300)
    _process(tmp_path / "proc", 4713, command="/usr/bin/python other.py", parent=1)
    assert cure("compile-workers", machine(tmp_path)) == "kill 4711"


def test_compiling_that_is_asked_for_and_switched_off_is_told(tmp_path: Path) -> None:
    off = {"TORCH_COMPILE_DISABLE": "1"}
    assert cure("compile-workers", machine(tmp_path, compile="on", variables=off)) == "unset TORCH_COMPILE_DISABLE"
    assert look("compile-workers", machine(tmp_path, variables=off)).verdict == "ok"
    assert look("compile-workers", machine(tmp_path, compile="off")).verdict == "ok"
