"""An event loop whose clock jumps: what sleeps for a minute is woken at once, in the right order.

The clock stands still while a thread works for the loop (`asyncio.to_thread`, an executor), and jumps to the next timer
when nothing is left to do. `asyncio.run(..., loop_factory=VirtualLoop)` is not in Python 3.11, so: `run(main())`.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

# With threads at work elsewhere (a database's writer), real time is given to them before the clock jumps.
_GRACE_S = 0.002
# Nothing to do, no timer, nobody comes: a test that would wait for ever. Counted and not timed, because a busy machine
# may not run the test for as long.
_STUCK_ROUNDS = 10_000


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the file's first lines. grace_s: real seconds without news before the clock jumps."""

    def __init__(self, *, grace_s: float = _GRACE_S) -> None:
        self._now_s = 1000.0
        self._n_busy = 0
        self._grace_s = grace_s
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now_s

    def run_in_executor(  # type: ignore[override]  # typeshed's has a name of its own for `args`
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        self._n_busy += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._less_busy)
        return future

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The clock stands still meanwhile: somebody works for the loop in a thread of their own."""
        self._n_busy += 1
        try:
            yield
        finally:
            self._n_busy -= 1

    def _less_busy(self, _: asyncio.Future[Any]) -> None:
        self._n_busy -= 1

    def wait(self, select: Callable[[float], list[Any]], timeout: float | None) -> list[Any]:
        """What the selector does: news of real files at once, else the clock jumps."""
        if timeout is not None and timeout <= 0:
            return select(0)
        for _ in range(_STUCK_ROUNDS):
            if found := select(self._grace_s):
                return found
            if self._n_busy == 0 and timeout is not None:
                self._now_s += timeout
                return []
        raise RuntimeError("the virtual loop waits for nothing that could come")


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        return self._loop.wait(super().select, timeout)


def run(main: Coroutine[Any, Any, T], *, grace_s: float = _GRACE_S) -> T:
    """As `asyncio.run`, on a `VirtualLoop`."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(grace_s=grace_s)) as runner:
        return runner.run(main)
