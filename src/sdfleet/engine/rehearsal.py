"""Network calls of sizes that have not been needed yet, made while nothing is drawn.

The first calls with a number of rows pay for set-up inside the libraries: on two cores the built-in model's first call
of 32 rows took 149 ms and its second 118, where 43 are usual; 28, 26, 20 and 18 rows paid again (2026-11-21, torch,
bfloat16 with AMX; OpenVINO's first calls took twice their time). And a batcher that has only seen one picture at a time
must first find out how many rows pay. So the first burst of requests took 2.0 s where the third took 1.2.

Here a call that was made is repeated with other numbers of rows, one call a turn: doublings first, until the batcher
knows its limit, then the sizes between, which batches have when pictures join and leave. A decoder meets 2 to 4
latents at once, from pictures that are finished together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import cycle, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from sdfleet.engine.batcher import Batcher
from sdfleet.engine.devices import out_of_memory_as_ours
from sdfleet.engine.families.base import LatentFamily, NetworkRows
from sdfleet.errors import SdfleetError

log = logging.getLogger(__name__)

# A job that comes meanwhile waits for one call; a network that takes longer gains little from all this anyway.
_LONGEST_CALL_S = 0.25
# For one kind of call. The built-in model took 2.9 s for all sizes to 32 rows.
_MOST_SPENT_S = 6.0
# What a size needs until it is as fast as it will be: see the top of this file.
_CALLS_PER_SIZE = 2
_MOST_DECODED = 4


class Ready(Protocol):
    """What a rehearsal asks of a checkpoint that is held: a family with all its parts in memory, and its limit."""

    @property
    def family(self) -> LatentFamily: ...

    @property
    def tile_vae(self) -> bool: ...

    @property
    def row_caps(self) -> Mapping[Any, int]: ...


class Rehearsal:
    """What is still to be tried for the calls that were seen. `is_on` False: nothing ever.

    find: the checkpoint that a key's first word names, if its parts are in memory and nobody is about to change what
    runs them; None: not now.
    """

    def __init__(self, batcher: Batcher, find: Callable[[str], Ready | None], *, is_on: bool) -> None:
        self._batcher = batcher
        self._find = find
        self._is_on = is_on
        self._waiting: dict[tuple[object, ...], NetworkRows] = {}
        self._known: set[Hashable] = set()
        self._trying: _Trying | None = None

    def note(self, key: tuple[object, ...], call: NetworkRows, *, spent_s: float) -> None:
        """A call was made that might be repeated."""
        if self._is_on and key not in self._known and spent_s <= _LONGEST_CALL_S:
            self._known.add(key)
            self._waiting[key] = call

    def forget(self, is_stale: Callable[[Hashable], bool]) -> None:
        """Something else runs these keys from now on: their sizes are new again."""
        self._known = {key for key in self._known if key in self._waiting or not is_stale(key)}
        if self._trying is not None and is_stale(self._trying.key):
            self._trying = None

    @property
    def has_chore(self) -> bool:
        """Whether there is a call to try now."""
        return self._next() is not None

    def do_chore(self) -> None:
        """One network call, or one decoding."""
        key = self._next()
        if key is None:
            return
        if self._trying is None:
            held = self._find(str(key[0]))
            assert held is not None
            self._trying = _Trying(key, held, self._tried(key, self._waiting[key], held))
        try:
            with torch.inference_mode(), out_of_memory_as_ours():
                is_over = next(self._trying.calls, _OVER) is _OVER
        except (SdfleetError, RuntimeError) as exc:  # RuntimeError: what torch and OpenVINO raise
            log.info("a rehearsal ended early", extra={"checkpoint": key[0], "why": str(exc)[:200]})
            is_over = True
        if is_over:
            self._trying = None
            del self._waiting[key]

    def _next(self) -> tuple[object, ...] | None:
        if self._trying is not None:
            if self._find(str(self._trying.key[0])) is self._trying.held:
                return self._trying.key
            self._trying = None  # its checkpoint has left; when it is here again this begins anew
        return next((key for key in self._waiting if self._find(str(key[0])) is not None), None)

    def _tried(self, key: tuple[object, ...], call: NetworkRows, held: Ready) -> Iterator[None]:
        begun_s = time.perf_counter()
        limit = held.row_caps.get(key, 0)
        done: set[int] = set()
        while (n_rows := self._batcher.next_size(key)) is not None and n_rows <= limit:
            done.add(n_rows)
            if self._timed(key, call, held, n_rows) > _LONGEST_CALL_S:
                limit = n_rows // 2
            yield
        limit = min(limit, self._batcher.limit(key))
        for n_decoded in range(2, _MOST_DECODED + 1):
            decode_s = _seconds_of(partial(held.family.decode, _repeated(call.latents, n_decoded), tiled=held.tile_vae))
            yield
            if decode_s > _LONGEST_CALL_S:
                break
        # Guided pictures take two rows each, so odd sizes are rare.
        for n_rows in range(limit - limit % 2, 1, -2):
            for _ in range(0 if n_rows in done else _CALLS_PER_SIZE):
                self._timed(key, call, held, n_rows)
                yield
            if time.perf_counter() - begun_s > _MOST_SPENT_S:
                return

    def _timed(self, key: tuple[object, ...], call: NetworkRows, held: Ready, n_rows: int) -> float:
        spent_s = _seconds_of(partial(held.family.predict, _of_size(call, n_rows)))
        self._batcher.learn(key, n_rows, spent_s)
        return spent_s


_OVER = object()


@dataclass(frozen=True, slots=True)
class _Trying:
    key: tuple[object, ...]
    held: Ready
    calls: Iterator[None]


def _seconds_of(call: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s


def _of_size(call: NetworkRows, n_rows: int) -> NetworkRows:
    """The call with its rows repeated, or left out, until there are n."""
    n_now = len(call.latents)

    def sized(name: str, value: Any) -> Any:
        if name == "size_px":
            return value
        if isinstance(value, Tensor) and len(value) == n_now:
            return _repeated(value, n_rows)
        if isinstance(value, tuple) and len(value) == n_now:
            return tuple(islice(cycle(value), n_rows))
        return value

    return NetworkRows(**{each.name: sized(each.name, getattr(call, each.name)) for each in fields(call)})


def _repeated(value: Tensor, n_rows: int) -> Tensor:
    return value[torch.arange(n_rows) % len(value)]
