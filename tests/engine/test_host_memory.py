"""A process may take what its control groups leave it, however much the machine has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from sdfleet.engine.host_memory import available_bytes

MB = 10**6


def group(folder: Path, *, limit: str, used: int, idle: int, version: int = 2) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {idle if version == 2 else 0}\n{names[2]} {idle}\n")


def available(groups: Path, own: str) -> int:
    (groups.parent / "own").write_text(own)
    return available_bytes(groups=groups, own=groups.parent / "own")


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_version_2_leaves_the_limit_less_what_is_taken_and_not_idle(groups: Path) -> None:
    group(groups / "app", limit=str(100 * MB), used=70 * MB, idle=20 * MB)
    assert available(groups, "0::/app\n") == 50 * MB


def test_the_least_of_all_groups_on_the_way_counts(groups: Path) -> None:
    group(groups / "outer/inner", limit=str(100 * MB), used=10 * MB, idle=0)
    group(groups / "outer", limit=str(60 * MB), used=30 * MB, idle=0)
    group(groups, limit="max", used=1, idle=0)
    assert available(groups, "0::/outer/inner\n") == 30 * MB


def test_version_1_beside_other_controllers(groups: Path) -> None:
    group(groups / "memory/app", limit=str(100 * MB), used=40 * MB, idle=5 * MB, version=1)
    assert available(groups, "11:cpu,cpuacct:/x\n3:memory:/app\n1:name=systemd:/y\n") == 65 * MB


def test_in_a_container_the_group_is_where_the_root_is(groups: Path) -> None:
    group(groups, limit=str(100 * MB), used=40 * MB, idle=0)
    assert available(groups, "0::/\n") == 60 * MB
    assert available(groups, "0::/docker/0123/not-mounted-here\n") == 60 * MB


def test_a_group_that_has_more_than_its_limit_has_nothing_left(groups: Path) -> None:
    group(groups / "app", limit=str(100 * MB), used=130 * MB, idle=0)
    assert available(groups, "0::/app\n") == 0


@pytest.mark.parametrize("own", ["", "0::/app\n"])
def test_without_a_limit_it_is_what_the_machine_has(groups: Path, own: str) -> None:
    group(groups / "app", limit="max", used=1, idle=0)
    assert abs(available(groups, own) - psutil.virtual_memory().available) < 2**30


def test_off_linux_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert available_bytes(groups=tmp_path, own=tmp_path / "none") > 0
