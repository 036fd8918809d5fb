"""Which device draws, and in which number format: decided by asking and timing, never by a table of names."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from sdfleet.engine.events import DeviceChoice, DtypeChoice, TextWeightsChoice, WeightFormat, WeightsChoice
from sdfleet.engine.host_memory import available_bytes
from sdfleet.engine.weight_formats import refuse_where_it_cannot_be
from sdfleet.errors import InvalidValue, OutOfMemory

log = logging.getLogger(__name__)

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# bfloat16 halves the mantissa, so it has to earn its place: measured 2.1x on cores with AVX512-BF16 or AMX,
# 0.3-0.9x on cores that emulate it.
_BF16_MUST_BE_FASTER = 1.25
_SMALLER = "ask for a smaller size or fewer pictures, or use memory mode eco"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device and the formats used on it. `why` says how the format was chosen, for people.

    dtype: text encoders and denoiser. vae_dtype: the picture decoder, which breaks first in half precision.
    weights, text_weights: what a denoiser's and a large text encoder's weights are kept in, to be widened to dtype when
    they are used, see quantised.py; None: in dtype.
    """

    kind: str
    dtype: torch.dtype
    vae_dtype: torch.dtype
    why: str
    weights: WeightFormat | None = None
    text_weights: WeightFormat | None = None

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.kind)

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.dtype).removeprefix("torch.")

    def free_bytes(self) -> int:
        """Bytes that could be allocated now, by the device's own account."""
        if self.kind == "cuda":
            free, _total = torch.cuda.mem_get_info()
            return int(free)
        if self.kind == "mps":
            return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        return available_bytes()

    def release_cached(self) -> None:
        """Give memory that torch keeps for itself back to the device."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()
        elif self.kind == "mps":
            torch.mps.empty_cache()

    def give_back(self) -> None:
        """Give what is free back to the device and the system, down to the pages that the C library keeps."""
        gc.collect()
        self.release_cached()
        _return_pages()


def _return_pages() -> None:
    """Ask the C library for the pages that it keeps of what was freed; only glibc has a word for it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def choose_device(
    device: DeviceChoice,
    dtype: DtypeChoice,
    weights: WeightsChoice = "auto",
    text_weights: TextWeightsChoice = "auto",
) -> Device:
    """The device to draw on and its formats.

    Raises InvalidValue when the device named is absent, when weights are to be kept in a format it cannot widen, or
    when float16 is asked for on a CPU, where it is emulated and measured 400 times slower than bfloat16.
    """
    kind = _present(device)
    kept = None if weights == "auto" else weights
    kept_text = kept if text_weights == "auto" else None if text_weights == "full" else text_weights
    refuse_where_it_cannot_be("weights", kept, kind=kind)
    refuse_where_it_cannot_be("text_weights", kept_text, kind=kind)
    on_kind = {"cuda": _on_cuda, "mps": _on_mps, "cpu": _on_cpu}
    return replace(on_kind[kind](dtype), weights=kept, text_weights=kept_text)


def _present(choice: DeviceChoice) -> str:
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        return next(kind for kind, there in has.items() if there)
    if not has[choice]:
        there = ", ".join(kind for kind, present in has.items() if present)
        raise InvalidValue("device", f"this machine has no {choice} device that torch can use", hint=f"it has: {there}")
    return choice


def _on_cuda(choice: DtypeChoice) -> Device:
    if choice != "auto":
        chosen, why = _DTYPES[choice], "as asked"
    elif torch.cuda.get_device_capability() >= (8, 0):
        chosen, why = torch.bfloat16, "the card computes bfloat16 natively"
    else:
        chosen, why = torch.float16, "the card is older than native bfloat16"
    # bfloat16 has float32's range, so the VAE cannot overflow in it; float16 can, see vae.py.
    return Device(kind="cuda", dtype=chosen, vae_dtype=chosen, why=why)


def _on_mps(choice: DtypeChoice) -> Device:
    chosen = torch.float16 if choice == "auto" else _DTYPES[choice]
    why = "as asked" if choice != "auto" else "Metal is fastest in float16; the VAE stays in float32"
    # Half-precision VAEs on Metal are the well-known cause of black pictures. Not measured here: no Apple device.
    return Device(kind="mps", dtype=chosen, vae_dtype=torch.float32, why=why)


def _on_cpu(choice: DtypeChoice) -> Device:
    if choice == "float16":
        raise InvalidValue(
            "dtype", "float16 arithmetic on a CPU is emulated, hundreds of times slower", hint="use bfloat16 or float32"
        )
    if choice != "auto":
        chosen, why = _DTYPES[choice], "as asked"
    else:
        gain = _bfloat16_gain()
        chosen = torch.bfloat16 if gain >= _BF16_MUST_BE_FASTER else torch.float32
        why = f"bfloat16 matrix products run {gain:.1f}x as fast as float32 here"
        log.info("cpu format chosen", extra={"dtype": str(chosen), "bfloat16_gain": round(gain, 2)})
    return Device(kind="cpu", dtype=chosen, vae_dtype=chosen, why=why)


def _bfloat16_gain(size: int = 512, repeats: int = 5) -> float:
    """How many times faster this CPU multiplies [size, size] matrices in bfloat16 than in float32; about 30 ms."""

    def best_s(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        best = float("inf")
        for _ in range(repeats):
            begun = time.perf_counter()
            torch.mm(a, a)
            best = min(best, time.perf_counter() - begun)
        return best

    return best_s(torch.float32) / best_s(torch.bfloat16)


@contextmanager
def out_of_memory_as_ours() -> Iterator[None]:
    """Turn every way in which torch says "no memory" into OutOfMemory, so that the engine can try the next rung.

    Cards raise torch.OutOfMemoryError, drivers AcceleratorError; the CPU allocator and Metal raise a bare
    RuntimeError, which only its words tell from other faults.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise OutOfMemory("the device has no memory left for this step", hint=_SMALLER) from exc
    except RuntimeError as exc:
        words = str(exc).lower()
        if any(sign in words for sign in ("out of memory", "can't allocate memory", "not enough memory")):
            raise OutOfMemory("the device has no memory left for this step", hint=_SMALLER) from exc
        raise


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, without the host waiting until a card has done what it was given before.

    Unmeasured on a card. torch keeps pinned memory from reuse until the copy is over, so nobody has to hold it.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class StepClock:
    """Seconds per step without making the device wait: a card is asked about a step only after it has ended.

    It also keeps the host from running more than two steps ahead, so that a cancel takes effect soon.
    """

    _MOST_IN_FLIGHT = 2

    def __init__(self, device: Device) -> None:
        self._kind = device.kind
        self._begun_s = 0.0
        self._begun_event: torch.cuda.Event | None = None
        self._in_flight: deque[tuple[tuple[Hashable, int], torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """A step is about to be given to the device."""
        if self._kind == "cuda":
            self._begun_event = torch.cuda.Event(enable_timing=True)
            self._begun_event.record()
        self._begun_s = time.perf_counter()

    def end(self, what: tuple[Hashable, int]) -> list[tuple[tuple[Hashable, int], float]]:
        """The step was given; answers with the (what, seconds) of steps that have ended since last asked."""
        if self._kind == "mps":
            torch.mps.synchronize()
        if self._kind != "cuda" or self._begun_event is None:
            return [(what, time.perf_counter() - self._begun_s)]
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._in_flight.append((what, self._begun_event, ended))
        done = []
        while self._in_flight and (len(self._in_flight) > self._MOST_IN_FLIGHT or self._in_flight[0][2].query()):
            asked, first, last = self._in_flight.popleft()
            last.synchronize()
            done.append((asked, first.elapsed_time(last) / 1000))
        return done
