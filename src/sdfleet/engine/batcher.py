"""Who steps together next. Counts and seconds only: no tensor ever comes here.

Any trajectories of one key may share a network call, whatever their prompts, steps, guidance or samplers. How many
*should* is measured. While the time per row falls as the batch grows, a bigger batch is free speed for everybody; once
it no longer falls the device is busy already, and more rows would only keep the first picture waiting.

>>> batcher = Batcher()
>>> waiting = [Candidate(id=n, key="a", n_rows=2, due=n) for n in range(3)]
>>> batcher.choose(waiting).ids                     # nothing measured yet: one picture, to learn from
(0,)
>>> for n_rows, spent_s in ((2, .020), (2, .020), (4, .024), (4, .024)):
...     batcher.observe("a", n_rows, spent_s)
>>> batcher.choose(waiting)
Decision(key='a', ids=(0, 1, 2), n_rows=6, reason='room for 8 rows')
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

# A doubled batch must save this share of the time per row to be worth the wait it gives the first picture.
# 5 % is above the run-to-run noise of a step on a shared two-core machine.
_MUST_FALL_BY = 0.05
# The first call at a new size pays for set-up inside the libraries, so it is not counted.
_CALLS_BEFORE_TRUST = 2
# A gain is believed at once, its absence only after this many calls: other programs make calls slower, never faster.
# The first calls of 32 rows took 149, 118, 69, 67, 55, 48 and 42 ms (2026-11-21), so that five of them were too few.
_CALLS_BEFORE_SETTLING = 8
# Speed changes (other programs, heat): a limit once found is tried again after this many calls at it.
_CALLS_BEFORE_RETRY = 200
_FIRST_LIMIT = 2
# No device we measured gains beyond this; it also bounds the memory one call may take.
MOST_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A trajectory that could step now.

    key: says who MAY share a call (checkpoint, latent shape, form of conditioning).
    n_rows: network rows it takes: 2 with guidance, 1 without.
    due: smaller goes first. A job's picture i is due i pictures' worth of turns after the job came, so that one job of
        sixty pictures does not shut out a job of one, nor newcomers the sixty.
    """

    id: int
    key: Hashable
    n_rows: int
    due: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The trajectories that step together now, and why not more."""

    key: Hashable
    ids: tuple[int, ...]
    n_rows: int
    reason: str


@dataclass(slots=True)
class _Speed:
    """What is known of one key: seconds per call by batch size (in doublings), and the present limit."""

    limit: int = _FIRST_LIMIT
    settled: bool = False
    n_calls: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    row_s: dict[int, float] = field(default_factory=dict)
    calls_at_limit: int = 0


class Batcher:
    """Decides, and learns; told that the speed of a key has changed, it learns that anew."""

    def __init__(self, *, max_rows: int | None = None) -> None:
        self._ceiling = min(max_rows or MOST_ROWS, MOST_ROWS)
        self._may_learn = max_rows is None
        self._speeds: dict[Hashable, _Speed] = {}
        self._served_s: dict[Hashable, float] = {}

    def choose(self, candidates: Sequence[Candidate], caps: Mapping[Hashable, int] | None = None) -> Decision:
        """The next batch. `candidates` must not be empty; `caps` bounds rows by key (memory).

        The key that has had the least device time goes first, so that one kind of picture cannot shut out another.
        A guided picture's two rows are never split; one picture always fits.
        """
        key = self._least_served({c.key for c in candidates})
        limit, reason = self._limit(key, (caps or {}).get(key))
        ids: list[int] = []
        n_rows = 0
        mine = sorted((c for c in candidates if c.key == key), key=lambda c: (c.due, c.id))
        for candidate in mine:
            if ids and n_rows + candidate.n_rows > limit:
                break
            ids.append(candidate.id)
            n_rows += candidate.n_rows
        return Decision(key=key, ids=tuple(ids), n_rows=n_rows, reason=reason)

    def observe(self, key: Hashable, n_rows: int, spent_s: float) -> None:
        """One call of `n_rows` rows took `spent_s` seconds."""
        self._served_s[key] = self._served_s.get(key, 0.0) + spent_s
        self.learn(key, n_rows, spent_s)

    def learn(self, key: Hashable, n_rows: int, spent_s: float) -> None:
        """The same of a call that served nobody, so that it does not count when keys take turns."""
        speed = self._speeds.setdefault(key, _Speed())
        size = _doubling(n_rows)
        speed.n_calls[size] += 1
        if speed.n_calls[size] < _CALLS_BEFORE_TRUST:
            return
        row_s = spent_s / n_rows
        # The best of late calls is what the device can do; a neighbour on the machine only ever makes a call slower.
        speed.row_s[size] = min(row_s, speed.row_s.get(size, row_s) * 1.02)
        if self._may_learn:
            self._learn(speed, size)

    def limit(self, key: Hashable) -> int:
        """Most rows of this key in one call, by what is known now."""
        return self._limit(key, None)[0]

    def measured(self, key: Hashable) -> dict[int, float]:
        """Seconds of one call of this key, by its rows (powers of two); sizes without a trusted call are left out."""
        speed = self._speeds.get(key)
        return {} if speed is None else {size: row_s * size for size, row_s in speed.row_s.items()}

    def next_size(self, key: Hashable) -> int | None:
        """With how many rows the next call would tell most; None when the limit of this key is known."""
        speed = self._speeds.get(key) or _Speed()
        if not self._may_learn or speed.settled or speed.limit > self._ceiling:
            return None
        return speed.limit

    def forget(self, is_stale: Callable[[Hashable], bool]) -> None:
        """Learn the keys anew for which `is_stale` says so: something else runs them now, at another speed."""
        for key in [key for key in self._speeds if is_stale(key)]:
            del self._speeds[key]

    def _learn(self, speed: _Speed, size: int) -> None:
        if size < speed.limit:
            return
        speed.calls_at_limit += 1
        if speed.settled:
            if speed.calls_at_limit >= _CALLS_BEFORE_RETRY:
                speed.settled, speed.calls_at_limit = False, 0
                speed.limit = size * 2
                speed.n_calls[size * 2] = 0
                speed.row_s.pop(size * 2, None)
            return
        smaller = speed.row_s.get(size // 2)
        if smaller is None or speed.row_s[size] <= smaller * (1 - _MUST_FALL_BY):
            speed.limit = size * 2
        elif speed.n_calls[size] >= _CALLS_BEFORE_SETTLING:
            speed.limit, speed.settled = size // 2, True
        speed.calls_at_limit = 0

    def _limit(self, key: Hashable, cap: int | None) -> tuple[int, str]:
        if not self._may_learn:
            limit, reason = self._ceiling, f"max_rows is {self._ceiling}"
        else:
            speed = self._speeds.get(key) or _Speed()
            limit = min(speed.limit, self._ceiling)
            reason = f"time per row no longer falls past {limit} rows" if speed.settled else f"room for {limit} rows"
        if cap is not None and cap < limit:
            return cap, f"memory for {cap} rows"
        return limit, reason

    def _least_served(self, keys: set[Hashable]) -> Hashable:
        known = [self._served_s[key] for key in keys if key in self._served_s]
        # A key that was away starts level with the least served, or it would hold the device until it caught up.
        floor = min(known, default=0.0)
        active = {key: max(self._served_s.get(key, floor), floor) for key in keys}
        for gone in set(self._served_s) - keys:
            del self._served_s[gone]
        self._served_s.update(active)
        return min(active, key=lambda key: (active[key], repr(key)))


def _doubling(n_rows: int) -> int:
    """The power of two at or below n_rows: sizes are compared in doublings."""
    return 1 << (n_rows.bit_length() - 1)
