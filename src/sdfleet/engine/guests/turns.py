"""A thread that does all the work of a foreign library, one step at a time.

Our engines are asked for one step after the other; a foreign one has a loop of its own and calls back. Here that loop
runs on a thread which waits in each call back until it is asked for more. Only one of the two threads ever runs.

It is always the same thread, because MLX keeps streams and compiled functions for each thread.

>>> turns = Turns()
>>> turns.begin(lambda tell: [tell(step) for step in ("first", "second")] and "the end")
>>> turns.heard(), turns.go_on(), turns.go_on().result()
('first', 'second', 'the end')
>>> turns.begin(lambda tell: tell("a step"))
>>> turns.heard(), type(turns.stop().exception()).__name__
('a step', 'Stopped')
>>> turns.close()
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Literal, TypeVar

Told = TypeVar("Told")
Ended = TypeVar("Ended")
Answer = TypeVar("Answer")


class Stopped(Exception):
    """Raised within a play that nobody wants any more; it should pass through whatever the library does."""


class Turns(Generic[Told, Ended]):
    """What a play tells is `Told`, what it gives back in the end is `Ended`, in a future that is done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guest")
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue[Literal["on", "stop"]] = queue.SimpleQueue()
        self._is_playing = False

    def do(self, call: Callable[[], Answer]) -> Answer:
        """Run a short call on the thread, while no play is on. Raises what it raises."""
        return self._thread.submit(call).result()

    def begin(self, play: Callable[[Callable[[Told], None]], Ended]) -> None:
        """Let a play run to the first thing that it tells, through the function it is given, or to its end."""
        self._is_playing = True
        self._thread.submit(play, self._tell).add_done_callback(self._said.put)

    def heard(self) -> Told | Future[Ended]:
        """What a play has told, waited for; or its end."""
        said = self._said.get()
        if isinstance(said, Future):
            self._is_playing = False
        return said

    def go_on(self) -> Told | Future[Ended]:
        """Let the play run on from what it told last."""
        self._wanted.put("on")
        return self.heard()

    def stop(self) -> Future[Ended]:
        """Raise Stopped within the play, and give its end."""
        while True:
            self._wanted.put("stop")
            said = self.heard()
            if isinstance(said, Future):
                return said

    def close(self) -> None:
        """End the thread, with what it plays."""
        if self._is_playing:
            self.stop()
        self._thread.shutdown()

    def _tell(self, word: Told) -> None:
        self._said.put(word)
        if self._wanted.get() == "stop":
            raise Stopped
