"""What MLX draws on, and its memory."""

from __future__ import annotations

import gc
from typing import Any

from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests.guest import Memory

# MLX has no error class for it: these stand in what it raises as RuntimeError, on Metal and on a CPU.
_OUT_OF_MEMORY = (
    "Unable to allocate",
    "Insufficient Memory",
    "OutOfMemory",
    "maximum allowed buffer size",
)


def open_device(options: EngineOptions) -> str:
    """Choose where MLX draws: metal or cpu, which is given back."""
    import mlx.core as mx

    if options.device == "cpu":
        mx.set_default_device(mx.cpu)
    if mx.metal.is_available() and mx.default_device() == mx.gpu:
        return "metal"
    # A CPU compiles with a C++ compiler, which a machine may lack, and mflux has its network compiled anew for each
    # picture: that was 6 of 8 s (mlx 0.32.2, two cores, 2026-11-21). On Metal, MLX compiles by itself.
    mx.disable_compile()
    return "cpu"


def memory() -> Memory:
    """How MLX and the machine stand."""
    import mlx.core as mx
    import psutil

    machine = psutil.virtual_memory()
    return Memory(
        active_bytes=mx.get_active_memory(),
        peak_bytes=mx.get_peak_memory(),
        # What MLX keeps for reuse is free to it.
        free_bytes=machine.available + mx.get_cache_memory(),
        total_bytes=machine.total,
        most_bytes=_most_bytes(mx),
    )


def release() -> None:
    """Give back what no array uses any more."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether MLX raised for lack of memory.

    >>> is_out_of_memory(RuntimeError("[malloc] Unable to allocate 99 bytes.")), is_out_of_memory(ValueError("no"))
    (True, False)
    """
    return isinstance(exc, MemoryError) or (
        isinstance(exc, RuntimeError) and any(words in str(exc) for words in _OUT_OF_MEMORY)
    )


def _most_bytes(mx: Any) -> int | None:
    if not mx.metal.is_available():
        return None
    # Above this, macOS may take memory away from the GPU in the middle of a step.
    most = mx.device_info().get("max_recommended_working_set_size")
    return None if most is None else int(most)
