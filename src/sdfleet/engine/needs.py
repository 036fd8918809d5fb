"""The memory a checkpoint needs on this device in each mode and format, from its headers and configs alone.

The same numbers and the same plan as when it is loaded, see residency.py; no weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sdfleet.domain import Drawing
from sdfleet.engine.components import Components
from sdfleet.engine.devices import Device, choose_device
from sdfleet.engine.events import DeviceChoice, DtypeChoice, MemoryMode
from sdfleet.engine.families import FAMILIES
from sdfleet.engine.memory import MemoryPlan, Residency, plan
from sdfleet.engine.prompt_cache import PromptCache
from sdfleet.errors import InvalidValue, OutOfMemory

# The fastest arrangement and the leanest; `auto` takes the first of them, or of those in between, that fits.
MODES: tuple[MemoryMode, ...] = ("fast", "eco")
# More than any device has: what would be needed is asked for, not what fits.
_ENDLESS_BYTES = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One mode and format: the bytes of all weights, the most that is held at one time, and whether there is room."""

    mode: MemoryMode
    dtype: str
    weights_bytes: int
    peak_bytes: int
    residency: Residency
    tiles_vae: bool
    fits: bool


def needs(
    drawing: Drawing, *, device: DeviceChoice = "auto", dtype: DtypeChoice = "auto", limit_bytes: int | None = None
) -> tuple[Need, ...]:
    """What this drawing needs here, one line a mode and format; the format that would be used comes first.

    limit_bytes: as in the settings. Raises CheckpointError and UnsupportedByModel as the engine does.
    """
    chosen = choose_device(device, dtype)
    found: list[Need] = []
    for each in (chosen, *_others(chosen, dtype)):
        free_bytes = each.free_bytes() if limit_bytes is None else min(each.free_bytes(), limit_bytes)
        found.extend(_need(drawing, each, mode=mode, free_bytes=free_bytes) for mode in MODES)
    return tuple(found)


def _others(chosen: Device, dtype: DtypeChoice) -> list[Device]:
    if dtype != "auto":
        return []
    devices = []
    for name in ("bfloat16", "float16", "float32"):
        if getattr(torch, name) == chosen.dtype:
            continue
        try:
            devices.append(choose_device(chosen.kind, name))  # type: ignore[arg-type]
        except InvalidValue:
            # Float16 on a CPU, say: not offered because it cannot be had.
            continue
    return devices


def _need(drawing: Drawing, device: Device, *, mode: MemoryMode, free_bytes: int) -> Need:
    family = FAMILIES[drawing.family](Components(Path(drawing.checkpoint), device), device, PromptCache(0))
    size = {"width_px": drawing.width_px, "height_px": drawing.height_px}
    weights = family.components.weights(text_encoders=family.text_encoders(drawing))

    activation_bytes = family.peak_bytes(**size, n_rows=2 if family.is_guided(drawing) else 1)
    decode_bytes = family.decode_bytes(**size)

    def planned(free: int) -> MemoryPlan:
        return plan(weights, activation_bytes=activation_bytes, decode_bytes=decode_bytes, free_bytes=free, mode=mode)

    needed = planned(_ENDLESS_BYTES)
    try:
        planned(free_bytes)
        fits = True
    except OutOfMemory:
        fits = False
    return Need(
        mode=mode,
        dtype=device.dtype_name,
        weights_bytes=weights.total,
        peak_bytes=needed.peak_bytes,
        residency=needed.residency,
        tiles_vae=needed.tile_vae,
        fits=fits,
    )
