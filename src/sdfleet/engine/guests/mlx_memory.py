"""MLX's memory, by the names of old and new versions: DiffusionKit's pin is of 2024."""

from __future__ import annotations

import gc
from typing import Any

from sdfleet.engine.guests.guest import Memory

# MLX has no error class for it: these stand in what it raises as RuntimeError, on Metal and on a CPU (0.17 to 0.32).
_OUT_OF_MEMORY = (
    "Unable to allocate",
    "Insufficient Memory",
    "OutOfMemory",
    "maximum allowed buffer size",
)


def memory() -> Memory:
    """How MLX and the machine stand."""
    import mlx.core as mx
    import psutil

    machine = psutil.virtual_memory()
    return Memory(
        active_bytes=int(_named("get_active_memory")()),
        peak_bytes=int(_named("get_peak_memory")()),
        # What MLX keeps for reuse is free to it.
        free_bytes=machine.available + int(_named("get_cache_memory")()),
        total_bytes=machine.total,
        most_bytes=_most_bytes(mx),
    )


def release() -> None:
    """Give back what no array uses any more."""
    gc.collect()
    _named("clear_cache")()


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether MLX raised for lack of memory.

    >>> is_out_of_memory(RuntimeError("[malloc] Unable to allocate 99 bytes.")), is_out_of_memory(ValueError("no"))
    (True, False)
    """
    return isinstance(exc, MemoryError) or (
        isinstance(exc, RuntimeError) and any(words in str(exc) for words in _OUT_OF_MEMORY)
    )


def device() -> str:
    """What MLX draws on: metal or cpu."""
    import mlx.core as mx

    return "metal" if mx.metal.is_available() and mx.default_device() == mx.gpu else "cpu"


def _most_bytes(mx: Any) -> int | None:
    if not mx.metal.is_available():
        return None
    # Above this, macOS may take memory away from the GPU in the middle of a step.
    most = _named("device_info")().get("max_recommended_working_set_size")
    return None if most is None else int(most)


def _named(name: str) -> Any:
    import mlx.core as mx

    return getattr(mx, name, None) or getattr(mx.metal, name)
