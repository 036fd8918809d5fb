"""How long a network takes on this machine, from the operations it makes, each timed once here.

tape.py says which operations a call makes, with their shapes. Every different one is made on the device with made-up
numbers and timed; what takes long is timed on a part of itself (fewer rows of a matrix, fewer lines of a picture, fewer
heads), as the time grows in step with those. Times are kept in a file of this machine, so a model or a size that shares
operations with one that was asked about before costs nothing. Whatever there is no time left to measure is put in at
the rate of its own kind. Where other programs had the processors meanwhile, what was timed is too long (fourteen times,
once, beside two of them on two cores): it is used, with a word, and not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import psutil
import torch

from sdfleet.engine.attention import attention
from sdfleet.engine.devices import Device
from sdfleet.engine.tape import Argument, Call, Shaped, operations_of

# On a CPU, an operation is cut down to about this many floating point operations: 2 to 20 ms.
_LIGHT_OPERATIONS = 4e9
# Rows, lines and heads that are left at least: below, a call costs more than its share. Two heads: with four,
# SD 1.5's attentions at 512 px, tried in two ways in half precision, took three seconds and left none for the rest.
_LEAST_ROWS = 256
_LEAST_LINES = 16
_LEAST_HEADS = 2
# One operation is repeated for this long.
_REPEAT_S = 0.02
_MOST_REPEATS = 20
# Of as many processors as there are threads, the share that others may take before what was timed is not believed. The
# system counts in hundredths of a second: of a shorter time than this nothing can be said.
_MOST_TAKEN = 0.2
_LEAST_WATCHED_S = 0.5
# Larger results than this are not made only to be timed.
_MOST_BYTES = 2**30
# What a view costs, in the time of Python and torch's own bookkeeping (measured on a Xeon, 2026-11-21; of 1000 views
# a step this is 2 ms).
_VIEW_S = 2e-6
_NUMBER_IN_OPERATIONS = 50
_HEAVY, _LIGHT = "with operations", "without operations"
_WITH_OPERATIONS = ("linear", "conv2d", "scaled_dot_product_attention", "mm", "bmm", "addmm", "baddbmm", "matmul")
# Files of an older way of measuring are not read.
_FORMAT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds a call takes, and the share of them [0, 1] that rests on an operation of its own having been timed."""

    seconds: float
    measured_share: float


@dataclass(frozen=True, slots=True)
class _Timed:
    """One operation that was timed. heaviness: see `_heaviness`."""

    kind: str
    heaviness: float
    seconds: float


class SpeedBook:
    """What operations take on one device with the present number of threads. `folder`: where times are kept, if at all.

    Not for a process that draws: what is timed there would be slowed, and slow the pictures.
    """

    def __init__(self, device: Device, folder: Path | None) -> None:
        self._device = device
        self._file = None if folder is None else folder / f"{_machine(device)}.json"
        self._known: dict[str, _Timed] = {}
        self._is_changed = False
        self._was_busy = False
        self._read()

    @property
    def was_busy(self) -> bool:
        """Whether other programs took processors that `learn` needed: its times are too long, and are not kept."""
        return self._was_busy

    def learn(self, calls: Iterable[tuple[Call, int]], *, budget_s: float) -> None:
        """Time what is not known yet until `budget_s` seconds are spent: the heaviest of each sort, then the others.

        So that what there is no time for can be put in at the rate of its own sort.
        """
        begun_s, begun_with_s = time.perf_counter(), _own_or_idle_s()
        ends_s = begun_s + budget_s
        unknown: dict[str, tuple[float, Call]] = {}
        for call, n in calls:
            light, factor = self._lightened(call)
            weight, _ = unknown.get(repr(light), (0.0, light))
            unknown[repr(light)] = (weight + n * factor * _likely(light), light)
        heaviest_first = sorted(unknown.items(), key=lambda item: -item[1][0])
        first_of = {_sort(light): name for name, (_, light) in reversed(heaviest_first)}
        for name, (_, light) in sorted(heaviest_first, key=lambda item: first_of[_sort(item[1][1])] != item[0]):
            if name in self._known or _n_bytes(light) > _MOST_BYTES:
                continue
            if time.perf_counter() >= ends_s:
                break
            self._known[name] = _Timed(_sort(light), _heaviness(light), self._timed(light))
            self._is_changed = True
        passed_s = time.perf_counter() - begun_s
        if self._is_changed and passed_s > _LEAST_WATCHED_S and self._device.kind == "cpu":
            n_ours = (_own_or_idle_s() - begun_with_s) / passed_s
            # A machine with fewer processors than we were given threads has no more to give.
            n_needed = min(torch.get_num_threads(), os.cpu_count() or 1)
            self._was_busy = n_ours < (1 - _MOST_TAKEN) * n_needed

    def estimate(self, calls: Mapping[Call, int], *, n_views: int) -> Estimate | None:
        """What these operations take together; None where nothing like them was ever timed."""
        measured_s, guessed_s = 0.0, 0.0
        rates = self._rates()
        for call, n in calls.items():
            light, factor = self._lightened(call)
            known = self._known.get(repr(light))
            if known is not None:
                measured_s += n * factor * known.seconds
                continue
            sort = _sort(call)
            rate = rates.get(sort) or rates.get(_wider_sort(sort)) or rates.get(_widest_sort(sort))
            if rate is None:
                return None
            guessed_s += n * _heaviness(call) * rate
        total_s = measured_s + guessed_s + n_views * _VIEW_S
        return Estimate(seconds=total_s, measured_share=1.0 if total_s == 0 else 1 - guessed_s / total_s)

    def save(self) -> None:
        """Keep what was timed in quiet, with what another process kept meanwhile."""
        if self._file is None or not self._is_changed or self._was_busy:
            return
        self._read()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=self._file.parent, delete=False, encoding="utf-8") as written:
            json.dump(
                {name: [timed.kind, timed.heaviness, timed.seconds] for name, timed in self._known.items()}, written
            )
        Path(written.name).replace(self._file)

    def _read(self) -> None:
        """What the file says, below what is known already. Torn, or not there yet: it is measured anew."""
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            if self._file is not None:
                said = json.loads(self._file.read_text(encoding="utf-8"))
                read = {str(name): _Timed(str(kind), float(n), float(s)) for name, (kind, n, s) in said.items()}
                self._known = read | self._known

    def _rates(self) -> dict[str, float]:
        """Seconds for a unit of heaviness, by kind of operation, of those that were timed."""
        found: dict[str, list[float]] = {}
        for timed in self._known.values():
            for kind in (timed.kind, _wider_sort(timed.kind), _widest_sort(timed.kind)):
                found.setdefault(kind, []).append(timed.seconds / timed.heaviness)
        return {kind: statistics.median(rates) for kind, rates in found.items()}

    def _lightened(self, call: Call) -> tuple[Call, float]:
        """A call that is a part of this one, and how many times longer this one takes."""
        if self._device.kind != "cpu":
            return call, 1.0
        most = _LIGHT_OPERATIONS * max(1, torch.get_num_threads() / 2)
        n_operations = operations_of(call)
        match call.kind:
            case "linear":
                return _fewer_rows(call, n_operations / most)
            case "conv2d":
                return _fewer_lines(call, n_operations / most)
            case "scaled_dot_product_attention":
                return _fewer_heads(call, n_operations / most)
            case _:
                return call, 1.0

    @torch.inference_mode()
    def _timed(self, call: Call) -> float:
        """Seconds of one call: the fastest, for other programs only ever make it slower."""
        do = _action(call, self._device)
        do()  # the first call of a shape pays for set-up inside the libraries
        begun_s = time.perf_counter()
        best_s = float("inf")
        for _ in range(_MOST_REPEATS):
            started_s = time.perf_counter()
            do()
            now_s = time.perf_counter()
            best_s = min(best_s, now_s - started_s)
            if now_s - begun_s > _REPEAT_S:
                break
        return best_s


def _own_or_idle_s() -> float:
    """Seconds that this machine's processors worked for this process or not at all, since some time."""
    told = psutil.cpu_times()
    return time.process_time() + float(told.idle) + float(getattr(told, "iowait", 0.0))


def _fewer_rows(call: Call, times_too_many: float) -> tuple[Call, float]:
    """A product of a matrix with fewer rows; all that go before the last dimension are rows."""
    seen, *others = call.arguments
    n_rows = seen.n // seen.size[-1]
    kept = max(_LEAST_ROWS, int(n_rows / times_too_many)) if times_too_many > 1 else n_rows
    kept = min(kept, n_rows)
    light = _plain((kept, seen.size[-1]), seen.dtype)
    return Call(call.name, (light, *others), call.keywords), n_rows / kept


def _fewer_lines(call: Call, times_too_many: float) -> tuple[Call, float]:
    """A convolution of one picture with fewer lines."""
    seen, *others = call.arguments
    rows, channels, height, width = seen.size
    if times_too_many <= 1:
        return call, 1.0
    per_row = times_too_many / rows
    kept = min(height, max(_LEAST_LINES, int(height / per_row))) if per_row > 1 else height
    size = (1, channels, kept, width)
    is_channels_last = seen.stride[1] == 1
    stride = (kept * width * channels, 1, width * channels, channels) if is_channels_last else _dense(size)
    light = Shaped(size, stride, seen.dtype)
    return Call(call.name, (light, *others), call.keywords), rows * height / kept


def _fewer_heads(call: Call, times_too_many: float) -> tuple[Call, float]:
    """Attention of fewer heads, of one row."""
    if any(isinstance(one, Shaped) for one in call.arguments[3:]) or len(call.arguments[0].size) != 4:
        return call, 1.0
    rows, heads = call.arguments[0].size[:2]
    n_heads = rows * heads
    kept = min(n_heads, max(_LEAST_HEADS, int(n_heads / times_too_many))) if times_too_many > 1 else n_heads
    cut = tuple(_plain((1, kept, *one.size[2:]), one.dtype) for one in call.arguments[:3])
    return Call(call.name, (*cut, *call.arguments[3:]), call.keywords), n_heads / kept


def _plain(size: tuple[int, ...], dtype: torch.dtype) -> Shaped:
    return Shaped(size, _dense(size), dtype)


def _dense(size: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for side in reversed(size):
        stride.append(step)
        step *= side
    return tuple(reversed(stride))


def _sort(call: Call) -> str:
    """What goes at one rate: `linear torch.float32`. Half precision has rates of its own."""
    first = next(iter(_shaped(call.arguments)), None)
    return f"{call.kind} {None if first is None else first.dtype}"


def _wider_sort(sort: str) -> str:
    kind, _, dtype = sort.partition(" ")
    return f"{_HEAVY if kind in _WITH_OPERATIONS else _LIGHT} {dtype}"


def _widest_sort(sort: str) -> str:
    """In any format: the little that is done with whole numbers is seldom worth a measurement."""
    return _wider_sort(sort).partition(" torch.")[0]


def _heaviness(call: Call) -> float:
    """What time grows with: floating point operations, or numbers that are looked at. Never 0."""
    return float(operations_of(call) or _n_numbers(call) or 1)


def _likely(call: Call) -> float:
    """What to time first: a number that is looked at takes as long as some tens of operations in a product."""
    return float(operations_of(call) or _NUMBER_IN_OPERATIONS * _n_numbers(call))


def _n_numbers(call: Call) -> int:
    return sum(one.n for one in _shaped((*call.arguments, *(value for _, value in call.keywords))))


def _n_bytes(call: Call) -> int:
    return sum(one.n * one.dtype.itemsize for one in _shaped(call.arguments))


def _shaped(values: Iterable[Argument]) -> Iterable[Shaped]:
    for value in values:
        if isinstance(value, Shaped):
            yield value
        elif isinstance(value, tuple):
            yield from _shaped(value)


def _action(call: Call, device: Device) -> Any:
    """Doing the operation once on the device, to its end."""
    args = tuple(_made(value, device) for value in call.arguments)
    kwargs = {name: _made(value, device) for name, value in call.keywords}
    if call.kind == "scaled_dot_product_attention" and len(args) == 3 and not kwargs and device.kind == "cpu":
        operation = attention  # which takes the faster of two ways
    else:
        namespace, name, overload = call.name.split(".")
        operation = getattr(getattr(getattr(torch.ops, namespace), name), overload)

    def do() -> None:
        operation(*args, **kwargs)
        if device.kind == "cuda":
            torch.cuda.synchronize()
        elif device.kind == "mps":
            torch.mps.synchronize()

    return do


def _made(value: Argument, device: Device) -> Any:
    if isinstance(value, tuple):
        return [_made(one, device) for one in value]
    if isinstance(value, torch.device):
        return device.torch_device
    if not isinstance(value, Shaped):
        return value
    tensor = torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=device.torch_device)
    if not value.dtype.is_floating_point:
        return tensor.zero_()
    if device.kind != "cpu" and 0 not in value.stride:
        return tensor.normal_()  # cards save power on equal numbers, and run faster than on any model's
    return torch.full((), 0.5, dtype=value.dtype).expand(value.size) if 0 in value.stride else tensor.fill_(0.5)


def _machine(device: Device) -> str:
    """A name for whatever changes what an operation takes."""
    name = torch.cuda.get_device_name() if device.kind == "cuda" else _processor()
    said = f"{_FORMAT} {platform.node()} {name} {os.cpu_count()} {torch.get_num_threads()} {torch.__version__}"
    return f"{device.kind}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
