"""Attention of every network here: torch's own, or matrix products where those were timed to be faster on this CPU.

Torch's fused attention gains nothing from bfloat16 units on some CPUs (AVX512-BF16 without AMX), where two matrix
products for each head are up to 1.6 times faster; where it does use them (AMX) it is twice as fast as the products. So
long attention in half precision is timed once for each kind of shape. Everything else is torch's, without a clock:
graphics cards, float32 (torch's own was faster on every shape tried), and short attention, where a trial would cost
more than it gains. Numbers in benchmarks/LOG.md, "attention on a CPU".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores of one head below which a call takes less than about a millisecond, whoever makes it.
_LEAST_SCORES = 2**18
# Query rows at a time: the scores of one head in memory are this many times the keys.
_CHUNK_ROWS = 1024
# The products must win by this: their answer is rounded a little more, and a busy machine's noise must not decide.
_MUST_WIN_BY = 1.1
_REPEATS = 2
_HALF = (torch.bfloat16, torch.float16)

Kind = tuple[torch.dtype, int, int, int]
Timed = Callable[[Callable[[], object]], float]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(query @ key.T / sqrt(d) + mask) @ value, as [b, heads, n, d].

    query: [b, heads, n, d]; key, value: [b, heads, m, d], any float format; mask: None or [b, 1 or heads, n or 1, m],
    added. Which way is taken hangs on n, m, d and the format, not on b: a picture is drawn alike alone and in company.
    """
    if query.device.type != "cpu" or mask is not None or query.dtype not in _HALF:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if query.shape[2] * key.shape[2] < _LEAST_SCORES:
        return F.scaled_dot_product_attention(query, key, value)
    return _ways.attend(query, key, value)


def attend_by_heads(query: Tensor, key: Tensor, value: Tensor, *, chunk_rows: int = _CHUNK_ROWS) -> Tensor:
    """The same as matrix products, one head and `chunk_rows` queries at a time, so that memory does not grow with n.

    The scores are held in the format of `query`, the softmax is summed in float32. Against float32, in bfloat16 with
    normal inputs: at most 0.02 away, where torch's fused one is at most 0.008.
    """
    attended = torch.empty_like(query)
    scaled = query / math.sqrt(query.shape[-1])
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys, values = key[row, head].T, value[row, head]
            for start in range(0, query.shape[2], chunk_rows):
                scores = torch.mm(scaled[row, head, start : start + chunk_rows], keys)
                torch.softmax(scores, dim=-1, out=scores)
                attended[row, head, start : start + chunk_rows] = torch.mm(scores, values)
    return attended


class Ways:
    """Remembers, for as long as the process lives, which way each kind of shape goes. `timed`: seconds of a call."""

    def __init__(self, timed: Timed) -> None:
        self._timed = timed
        self._by_heads: dict[Kind, bool] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention without a mask; times both ways first, where this kind of shape was not met yet."""
        kind = (query.dtype, query.shape[2].bit_length(), key.shape[2].bit_length(), query.shape[3])
        if kind not in self._by_heads:
            self._by_heads[kind] = self._heads_win(query, key, value)
        if self._by_heads[kind]:
            return attend_by_heads(query, key, value)
        return F.scaled_dot_product_attention(query, key, value)

    def _heads_win(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        query, key, value = query[:1], key[:1], value[:1]
        calls = (
            partial(F.scaled_dot_product_attention, query, key, value),
            partial(attend_by_heads, query, key, value),
        )
        fused_s, heads_s = (min(times) for times in zip(*self._rounds(calls), strict=True))
        return heads_s * _MUST_WIN_BY < fused_s

    def _rounds(self, calls: tuple[Callable[[], object], ...]) -> list[tuple[float, ...]]:
        for call in calls:
            call()  # the first call of a shape pays for set-up inside the libraries
        return [tuple(self._timed(call) for call in calls) for _ in range(_REPEATS)]


def _seconds(call: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s


_ways = Ways(_seconds)
