"""Limits of memory, in trees of files as the system writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfleet.doctor.machine import Machine
from tests.doctor.stage import GIB, cure, look, machine, write


def _version_2(folder: Path, *, limit: str, killed: int = 0) -> Machine:
    write(folder / "proc/self/cgroup", "0::/kubepods/pod1\n")
    write(folder / "cgroups/kubepods/memory.max", f"{limit}\n")
    write(folder / "cgroups/kubepods/pod1/memory.max", "max\n")
    write(folder / "cgroups/kubepods/memory.events", f"low 0\noom 3\noom_kill {killed}\n")
    return machine(folder)


def _version_1(folder: Path, *, limit: int) -> Machine:
    write(folder / "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/abc\n")
    # Within the container the path is the host's, and the container's own limit stands at the top.
    write(folder / "cgroups/memory/memory.limit_in_bytes", f"{limit}\n")
    write(folder / "cgroups/memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    return machine(folder)


def test_a_container_smaller_than_its_model_is_a_fault_and_says_what_will_happen(tmp_path: Path) -> None:
    there = _version_2(tmp_path, limit=str(GIB // 2))
    found = look("container-memory", there)
    assert "the control group /kubepods allows 0.5 GB" in found.what
    assert "starter needs" in found.what
    assert "SIGKILL" in found.what
    assert "docker run --memory" in cure("container-memory", there)


def test_the_older_systems_limit_is_seen_too(tmp_path: Path) -> None:
    assert look("container-memory", _version_1(tmp_path, limit=GIB)).verdict == "fault"


def test_what_was_killed_in_a_large_enough_group_is_told(tmp_path: Path) -> None:
    there = _version_2(tmp_path, limit=str(64 * GIB), killed=2)
    assert "has killed 2 of its processes" in look("container-memory", there).what
    assert "SD_MEMORY_MODE=eco" in cure("container-memory", there)


def test_a_large_enough_group_is_well(tmp_path: Path) -> None:
    assert look("container-memory", _version_2(tmp_path, limit=str(64 * GIB))).verdict == "ok"


def test_a_model_on_a_card_is_not_measured_by_the_hosts_memory(tmp_path: Path) -> None:
    _version_2(tmp_path, limit=str(GIB))
    assert look("container-memory", machine(tmp_path, device="cuda")).verdict == "ok"


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_group_without_a_limit_is_none(tmp_path: Path, limit: str) -> None:
    assert look("container-memory", _version_2(tmp_path, limit=limit)).verdict == "not_applicable"


def test_a_machine_without_groups_has_no_limit(tmp_path: Path) -> None:
    assert look("container-memory", machine(tmp_path)).verdict == "not_applicable"


def _meminfo(folder: Path, *, total: int, available: int, swap: int = 0, swap_free: int = 0) -> Machine:
    names = {"MemTotal": total, "MemFree": 0, "MemAvailable": available, "SwapTotal": swap, "SwapFree": swap_free}
    write(folder / "proc/meminfo", "".join(f"{name}:  {n // 1024} kB\n" for name, n in names.items()))
    return machine(folder)


def test_a_model_larger_than_the_machine_is_a_fault(tmp_path: Path) -> None:
    there = _meminfo(tmp_path, total=GIB, available=GIB // 2)
    assert "this machine has 1.1 GB" in look("out-of-memory", there).what
    assert "SD_MEMORY_MODE=eco" in cure("out-of-memory", there)


def test_a_model_that_does_not_fit_beside_other_programs_is_a_warning(tmp_path: Path) -> None:
    there = _meminfo(tmp_path, total=64 * GIB, available=GIB)
    assert look("out-of-memory", there).verdict == "warning"
    assert "close other programs" in cure("out-of-memory", there)


def test_a_limit_of_the_settings_counts_as_the_machines(tmp_path: Path) -> None:
    _meminfo(tmp_path, total=64 * GIB, available=60 * GIB)
    assert "SD_MEMORY_LIMIT gives" in look("out-of-memory", machine(tmp_path, memory_limit=GIB)).what


def test_enough_memory_is_well(tmp_path: Path) -> None:
    there = _meminfo(tmp_path, total=64 * GIB, available=60 * GIB, swap=8 * GIB, swap_free=8 * GIB)
    assert look("out-of-memory", there).verdict == "ok"
    assert look("swap", there).verdict == "ok"


def test_swapping_is_told_only_while_memory_is_short(tmp_path: Path) -> None:
    short = _meminfo(tmp_path, total=16 * GIB, available=GIB, swap=8 * GIB, swap_free=2 * GIB)
    assert "steps wait for the disk" in look("swap", short).what
    assert "SD_ENGINES=1" in cure("swap", short)
    calm = _meminfo(tmp_path, total=16 * GIB, available=8 * GIB, swap=8 * GIB, swap_free=2 * GIB)
    assert look("swap", calm).verdict == "ok"


def test_without_the_systems_file_the_memory_is_asked_otherwise(tmp_path: Path) -> None:
    assert machine(tmp_path).memory().total > GIB // 2
