"""What a network does in one call, written down on the meta device, where nothing is computed.

Every operation that makes or changes a tensor is noted with the shapes it gets, and every byte is counted from the
moment it is allocated to the moment it is let go. So the most that is held at one time comes out of the network itself,
whatever its architecture, and so does the list of operations that speed.py times on this machine.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ORDERED = (torch.ops.aten.conv2d.default, torch.ops.aten.group_norm.default)
# From this size on the C library (glibc on 64 bits) gives every tensor pages of its own and takes them back at once.
_OWN_PAGES_FROM_BYTES = 32 * 2**20
# What oneDNN keeps of each shape that it has met, code and descriptions, until 1024 newer ones push it out: resident
# memory after 26 to 44 shapes each, oneDNN 3.12 with AMX, 2026-11-21 (`python benchmarks/kept_of_shapes.py`). Without
# AMX a product keeps as much and a convolution 80 kB. Products in float32 are MKL's, which keeps nothing of a shape.
_KEPT_HALF = {
    "linear": 690_000, "mm": 650_000, "addmm": 650_000, "bmm": 650_000, "baddbmm": 650_000, "conv2d": 200_000,
    "scaled_dot_product_attention": 80_000,
}  # fmt: skip
_KEPT_FLOAT32 = {"conv2d": 80_000}
_KEPT_OF_1X1 = 80_000

Argument = Any  # Shaped, a number, a string, None, or a tuple of these


@dataclass(frozen=True, slots=True)
class Shaped:
    """A tensor without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n(self) -> int:
        """How many numbers it has."""
        return math.prod(self.size)


@dataclass(frozen=True, slots=True)
class Call:
    """One operation as torch names it (`aten.linear.default`), with all it was given. Equal calls take equally long."""

    name: str
    arguments: tuple[Argument, ...]
    keywords: tuple[tuple[str, Argument], ...] = ()

    @property
    def kind(self) -> str:
        """`linear` of `aten.linear.default`."""
        return self.name.split(".")[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call of a network takes.

    peak_bytes: most that is held at one time beside weights and inputs. heap_bytes: most that is held at one time in
    tensors that share the C library's heap; 0 on a card. kept_bytes: what the libraries keep afterwards.
    calls: how often each operation is made. n_views: operations that only look at a tensor in another way.
    operations: floating point, two a multiply and add.
    """

    peak_bytes: int
    heap_bytes: int
    kept_bytes: int
    calls: Mapping[Call, int]
    n_views: int
    operations: int

    @property
    def most_bytes(self) -> int:
        """What the process grows by at most: what is held, the empty places in between, and what libraries keep.

        Empty places: torch asks for aligned memory, for which glibc looks for 96 bytes more than an equal tensor that
        was let go has left. So a place is used again only once its neighbour is free too, and what lies in the heap
        takes up to twice its size: 181 to 197 MB for 84 MB of tensors of 17 MB, and 82 MB once torch's requests were
        answered as plain ones (decoding at 512 px, 2026-11-21). Other C libraries are taken to be alike, unmeasured.
        """
        return self.peak_bytes + self.heap_bytes + self.kept_bytes

    @property
    def left_bytes(self) -> int:
        """Of `most_bytes`, what stays with the process afterwards.

        What oneDNN keeps of products in half precision are blocks of 0.26 MB in the heap, among the tensors of that
        moment: they stay, so the heap cannot shrink, and its gaps are too small for a later phase's larger tensors.
        Without such blocks the heap's end goes back (seen: 180 of 181 MB stayed in bfloat16, 2 of 85 in float32).
        """
        is_pinned = any(_kept_bytes(call) > 0 and _is_half(call) for call in self.calls)
        return self.kept_bytes + (2 * self.heap_bytes if is_pinned else 0)


def record(call: Callable[[], object], *, kind: str, widens: bool = False) -> Work:
    """What `call` does; it must work on meta tensors alone, and what it was given before does not count.

    kind: the device it is meant for, whose libraries take working space of their own. widens: the weights of matrices
    and kernels are kept in another format and widened for each use.
    """
    tape = _Tape(kind, widens=widens)
    with torch.inference_mode(), tape:
        call()
    return Work(
        peak_bytes=tape.peak_bytes,
        heap_bytes=tape.heap_peak_bytes,
        kept_bytes=kept_bytes_of(tape.calls) if kind == "cpu" else 0,
        calls=dict(tape.calls),
        n_views=tape.n_views,
        operations=sum(operations_of(call) * n for call, n in tape.calls.items()),
    )


def kept_bytes_of(calls: Iterable[Call]) -> int:
    """Bytes that oneDNN keeps on a CPU once it has made these calls, each counted once.

    >>> x, w = (Shaped(size, (1, 1), torch.bfloat16) for size in ((2, 3), (5, 3)))
    >>> kept_bytes_of([Call("aten.linear.default", (x, w, None))])
    690000
    """
    return sum(_kept_bytes(call) for call in calls)


def _kept_bytes(call: Call) -> int:
    if call.kind == "conv2d" and call.arguments[1].size[-2:] == (1, 1):
        return _KEPT_OF_1X1
    return (_KEPT_HALF if _is_half(call) else _KEPT_FLOAT32).get(call.kind, 0)


def _is_half(call: Call) -> bool:
    return any(isinstance(one, Shaped) and one.dtype.itemsize == 2 for one in call.arguments[:1])


def operations_of(call: Call) -> int:
    """Floating point operations of matrix products, convolutions and attention; 0 for everything else.

    >>> x, w = (Shaped(size, (1, 1), torch.float32) for size in ((2, 3), (5, 3)))
    >>> operations_of(Call("aten.linear.default", (x, w, None)))
    60
    """
    shapes = [one.size for one in call.arguments if isinstance(one, Shaped)]
    match call.kind:
        case "linear":
            return 2 * math.prod(shapes[0]) * shapes[1][0]
        case "mm" | "bmm" | "matmul":
            return 2 * math.prod(shapes[0]) * shapes[1][-1]
        case "addmm" | "baddbmm":
            return 2 * math.prod(shapes[1]) * shapes[2][-1]
        case "conv2d" | "convolution":
            (rows, _, height, width), (made, read, *window) = shapes[0], shapes[1]
            down, around = _pair(call, 3, 1), _pair(call, 4, 0)
            cells = [
                (side + 2 * pad - length) // step + 1
                for side, pad, length, step in zip((height, width), around, window, down, strict=True)
            ]
            return 2 * rows * made * math.prod(cells) * read * math.prod(window)
        case "scaled_dot_product_attention":
            return 2 * math.prod(shapes[0]) * shapes[1][-2] + 2 * math.prod(shapes[0][:-1]) * math.prod(shapes[2][-2:])
        case _:
            return 0


def _pair(call: Call, place: int, default: int) -> tuple[int, int]:
    """Stride or padding of a convolution."""
    said = call.arguments[place] if len(call.arguments) > place else default
    match said:
        case int():
            return said, said
        case (one,):
            return one, one
        case (down, across):
            return down, across
        case _:  # "same", which leaves sides as they are
            window = call.arguments[1].size[-2:]
            return window[0] // 2, window[1] // 2


class _Tape(TorchDispatchMode):
    """Sees every operation between begin and end."""

    def __init__(self, kind: str, *, widens: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Call] = Counter()
        self.n_views = 0
        self.peak_bytes = 0
        self.heap_peak_bytes = 0
        self._heap_bytes = 0
        self._kind = kind
        self._widens = widens
        self._held: dict[int, int] = {}
        self._held_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage(tensor) for tensor in _tensors((*args, *kwargs.values()))}
        answer = func(*args, **kwargs)
        # As on a device; on meta these two forget in what order their channels came.
        if func in _ORDERED and any(_lies_channels_last(tensor) for tensor in _tensors(args)):
            answer = answer.contiguous(memory_format=torch.channels_last)
        made = [tensor for tensor in _tensors((answer,)) if _storage(tensor) not in given]
        for tensor in made:
            self._hold(tensor)
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        if not made and not func._schema.is_mutable:  # noqa: SLF001 - torch has no public name for it
            self.n_views += 1
            return answer
        call = Call(
            str(func), tuple(_noted(one) for one in args), tuple((name, _noted(one)) for name, one in kwargs.items())
        )
        self.calls[call] += 1
        beside = self._working_space(call, made)
        self.peak_bytes = max(self.peak_bytes, self._held_bytes + beside)
        return answer

    def _in_heap(self, n_bytes: int) -> int:
        return n_bytes if self._kind == "cpu" and n_bytes < _OWN_PAGES_FROM_BYTES else 0

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _storage(tensor)
        if key not in self._held:
            self._held[key] = storage.nbytes()
            self._held_bytes += storage.nbytes()
            self._heap_bytes += self._in_heap(storage.nbytes())
            self.heap_peak_bytes = max(self.heap_peak_bytes, self._heap_bytes)
            weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        n_bytes = self._held.pop(key)
        self._held_bytes -= n_bytes
        self._heap_bytes -= self._in_heap(n_bytes)

    def _working_space(self, call: Call, made: list[Tensor]) -> int:
        """Bytes a library holds beside what goes in and comes out.

        oneDNN brings the weights of a call in half precision into an order of its own, and around a convolution what
        goes in and comes out too, unless it is channels-last in half precision (seen as resident memory, 2026-11-21).
        Cards: cuDNN's are unmeasured, and taken to be the same.
        """
        if call.kind not in {"linear", "conv2d"}:
            return 0
        seen, weight = call.arguments[0], call.arguments[1]
        is_half = seen.dtype.itemsize == 2
        n_weight_bytes = weight.n * weight.dtype.itemsize
        n_bytes = n_weight_bytes if self._widens else 0
        if self._kind == "cpu" and is_half:
            n_bytes += n_weight_bytes
        if call.kind == "conv2d" and not (is_half and _is_channels_last(seen)):
            n_bytes += seen.n * seen.dtype.itemsize + sum(tensor.nbytes for tensor in made)
        return n_bytes


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - a storage's identity; Python's ids are used again


def _noted(value: Any) -> Argument:
    if isinstance(value, Tensor):
        return Shaped(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_noted(one) for one in value)
    return value


def _lies_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _is_channels_last(seen: Shaped) -> bool:
    return len(seen.size) == 4 and (seen.stride[1] == 1 or seen.size[1] == 1)
