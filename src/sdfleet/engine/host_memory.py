"""How much memory this process may still take: the machine's, or less where a container or a service is held to less.

The kernel kills a process that passes its group's limit, however much the machine has. A group's limit binds all groups
below it, so the least along the way counts. Pages of files that were only read do not count as taken: they are given up
first.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_bytes(*, groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Bytes that could be allocated now.

    groups: where control groups are mounted. own: the file that says which ones this process is in.
    """
    return min([int(psutil.virtual_memory().available), *_room_in_groups(groups, own)])


def _room_in_groups(groups: Path, own: Path) -> list[int]:
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            rooms += _along(groups, path, most="memory.max", taken="memory.current", idle="inactive_file")
        elif "memory" in controllers.split(","):
            names = {"most": "memory.limit_in_bytes", "taken": "memory.usage_in_bytes", "idle": "total_inactive_file"}
            rooms += _along(groups / "memory", path, **names)
    return rooms


def _along(root: Path, path: str, *, most: str, taken: str, idle: str) -> list[int]:
    """What is left in a group and in each that it is part of. In a container the own path may not be mounted."""
    folder = root.joinpath(path.lstrip("/"))
    rooms = []
    for group in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
            limit = int((group / most).read_text(encoding="ascii"))
            used = int((group / taken).read_text(encoding="ascii"))
            rooms.append(max(0, limit - used + _field(group / "memory.stat", idle)))
        if group == root:
            break
    return rooms


def _field(file: Path, name: str) -> int:
    for line in file.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
