"""What a process keeps of each shape of a matrix product, a convolution and an attention that it has met once.

    python benchmarks/kept_of_shapes.py

oneDNN keeps its code and descriptions for the 1024 shapes met last; `engine/tape.py` has these numbers. All tensors of
an operation are views of one block, and the heap is trimmed, so what is left is the libraries'. Linux with glibc.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

_N_NUMBERS = 8_000_000


def main() -> None:
    print("| operation | bytes kept of each shape, kB | shapes |\n|---|---|---|")
    widths, made = (64, 320, 640), (64, 320, 1280)
    for dtype in (torch.bfloat16, torch.float32):
        block = torch.zeros(_N_NUMBERS, dtype=dtype)

        def on(*size: int, block: Tensor = block) -> Tensor:
            return block[: math.prod(size)].view(size)

        def linear(n_rows: int, width: int, n_made: int, on: Callable[..., Tensor] = on) -> object:
            return F.linear(on(n_rows, width), on(n_made, width), on(n_made))

        def attention(n_heads: int, n: int, width: int, on: Callable[..., Tensor] = on) -> object:
            query = key = value = on(1, n_heads, n, width)
            return F.scaled_dot_product_attention(query, key, value)

        def products(n_heads: int, n: int, width: int, on: Callable[..., Tensor] = on) -> object:
            return torch.bmm(on(n_heads, n, width), on(n_heads, width, n))

        name = str(dtype).removeprefix("torch.")
        _tell(f"linear, {name}", linear, product((77, 154, 256, 512, 1000), widths, made))
        for side in (1, 3):

            def conv(read: int, n_made: int, px: int, side: int = side, on: Callable[..., Tensor] = on) -> object:
                x, weight = (one.contiguous(memory_format=torch.channels_last) for one in (on(2, read, px, px),
                             on(n_made, read, side, side)))  # fmt: skip
                return F.conv2d(x, weight, on(n_made), padding=side // 2)

            _tell(f"conv2d {side}x{side}, {name}", conv, product((32, 64, 128, 320), (32, 64, 320), (16, 32, 64)))
        _tell(f"attention, {name}", attention, product((2, 5, 8), (64, 256, 1024), (40, 64, 80)))
        _tell(f"bmm, {name}", products, product((2, 5, 8), (64, 256, 1024), (40, 64, 80)))


def _tell(name: str, call: Callable[..., object], shapes: Iterable[tuple[int, ...]]) -> None:
    """The first shape pays for what is set up once, and is not counted."""
    first, *others = shapes
    with torch.inference_mode():
        call(*first)
        before = _private_bytes()
        for shape in others:
            call(*shape)
        kept = (_private_bytes() - before) / len(others)
    print(f"| {name} | {kept / 1e3:.0f} | {len(others)} |")


def _private_bytes() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()
