"""A machine to examine: healthy, with a data folder and a system of its own, so that a test changes one thing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sdfleet.doctor.entry import Finding
from sdfleet.doctor.machine import Machine, TorchProbe
from sdfleet.doctor.table import entry
from sdfleet.settings import load_settings

GIB = 2**30
H100 = {"name": "NVIDIA H100", "capability": [9, 0], "total_bytes": 80 * GIB}
CPU_BUILD = {"version": "2.13.0+cpu", "file": "/site/torch/__init__.py", "cuda_build": None, "has_cuda": False}
CUDA_BUILD = {"version": "2.13.0", "file": "/site/torch/__init__.py", "cuda_build": "13.0", "has_cuda": False}
ON_CARD = {**CUDA_BUILD, "has_cuda": True, "cards": [H100], "is_built_for": ["sm_80", "sm_90"]}
ON_METAL = {"version": "2.13.0", "file": "/site/torch/__init__.py", "has_mps": True}


def machine(folder: Path, *, torch: dict[str, Any] | None = None, **changes: Any) -> Machine:
    """A machine whose data folder, processes and devices lie in `folder`.

    torch: what torch sees there, as recorded. changes: fields of Machine; other names are settings.
    """
    fields = {name: changes.pop(name) for name in list(changes) if name in Machine.__dataclass_fields__}
    for name in ("home", "proc", "cgroups", "devices"):
        (folder / name).mkdir(exist_ok=True)
    settings = load_settings(**{"home": folder / "home", "port": 0, **changes})
    told = json.dumps(CPU_BUILD if torch is None else torch)
    given: dict[str, Any] = {
        "variables": {},
        "torch": TorchProbe((sys.executable, "-I", "-S", "-c", f"print({told!r})")),
        "proc": folder / "proc",
        "cgroups": folder / "cgroups",
        "devices": folder / "devices",
    }
    return Machine(settings=settings, **given | fields)


def look(name: str, machine: Machine) -> Finding:
    """What the check of this id finds."""
    check = entry(name).check
    assert check is not None
    return check(machine)


def cure(name: str, machine: Machine) -> str:
    """The next action a person is told."""
    finding = look(name, machine)
    assert finding.verdict in {"warning", "fault"}, finding
    return finding.cure or entry(name).cure


def write(path: Path, text: str = "") -> Path:
    """A file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
