"""Whether it fits, and what to give up in which order when it does not. Bytes only; no tensor comes here.

>>> small, big = Weights(text=200, denoiser=500, vae=100), Weights(text=9_000, denoiser=4_000, vae=100)
>>> plan(small, activation_bytes=100, decode_bytes=300, free_bytes=2_000, mode="auto").residency
'all'
>>> plan(big, activation_bytes=100, decode_bytes=300, free_bytes=10_000, mode="auto").residency
'by_phase'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdfleet.engine.events import MemoryMode
from sdfleet.errors import OutOfMemory

# all: every component stays on the device. by_phase: only what the present phase uses. by_layer: of that, only the
# block of a network that is at work and the next, see by_layer.py.
Residency = Literal["all", "by_phase", "by_layer"]

# In this order after an out-of-memory; each is tried once for the step that failed, `fewer_rows` until one picture is
# left. `smaller_picture` changes what the user gets, so it is taken only by a request that allows it.
Rung = Literal[
    "fewer_rows", "drop_idle_components", "tile_vae", "offload_text_encoders", "offload_all", "offload_layers",
    "smaller_picture",
]  # fmt: skip
# Kept free for what is not counted: the allocator's rounding, library workspaces, the system itself.
_HEADROOM = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Bytes of one checkpoint's components once loaded in the device's formats.

    text_by_layer, denoiser_by_layer: the most that is held when networks come block by block; None: they cannot.
    """

    text: int
    denoiser: int
    vae: int
    text_by_layer: int | None = None
    denoiser_by_layer: int | None = None

    @property
    def total(self) -> int:
        """All components together."""
        return self.text + self.denoiser + self.vae


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a checkpoint will live on the device. `peak_bytes`: the most it will hold at one time."""

    residency: Residency
    tile_vae: bool
    peak_bytes: int
    reason: str


def plan(
    weights: Weights, *, activation_bytes: int, decode_bytes: int, free_bytes: int, mode: MemoryMode
) -> MemoryPlan:
    """The first arrangement that fits, from the fastest to the leanest; made before a byte is loaded.

    activation_bytes: one denoiser call for one picture. decode_bytes: decoding one picture untiled.
    free_bytes: what the device has for this checkpoint. mode: `fast` takes only the fastest arrangement, `eco` only the
    leanest that it does not have to wait for, and only where that does not fit either the slow one by layer.
    Raises OutOfMemory, with the numbers, when nothing fits.
    """
    room = int(free_bytes * (1 - _HEADROOM))
    tiled_bytes = decode_bytes // 4
    arrangements: list[tuple[Residency, bool]] = [
        ("all", False),
        ("all", True),
        ("by_phase", False),
        ("by_phase", True),
    ]
    if mode == "fast":
        arrangements = arrangements[:1]
    elif mode == "eco":
        arrangements = arrangements[3:]
    if mode != "fast" and (weights.text_by_layer is not None or weights.denoiser_by_layer is not None):
        arrangements.append(("by_layer", True))
    leanest = 0
    for residency, tiled in arrangements:
        decode = tiled_bytes if tiled else decode_bytes
        if residency == "all":
            peak = weights.total + max(activation_bytes, decode)
        else:
            text, denoiser = weights.text, weights.denoiser
            if residency == "by_layer":
                text = text if weights.text_by_layer is None else weights.text_by_layer
                denoiser = denoiser if weights.denoiser_by_layer is None else weights.denoiser_by_layer
            peak = max(text, denoiser + activation_bytes, weights.vae + decode)
        leanest = peak
        if peak <= room:
            reason = f"{_gb(peak)} of {_gb(room)} with components resident {residency.replace('_', ' ')}"
            return MemoryPlan(residency=residency, tile_vae=tiled, peak_bytes=peak, reason=reason)
    raise OutOfMemory(
        f"the checkpoint needs {_gb(leanest)} at this size and the device has {_gb(room)} to give",
        hint="ask for a smaller size, use memory mode eco, or close what else is using the device",
    )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
