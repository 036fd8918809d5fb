"""What a model would take on this machine, found by a process of its own: the server's must not import torch."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from sdfleet.engine.forecast import Question

log = logging.getLogger(__name__)

# A process that has not answered by then never will.
_LONGEST_S = 120.0
# Free memory changes, and the rest of an answer does not: the times behind it are kept on the disk.
_KEPT_S = 300.0


class Forecasts:
    """Answers by question; one process at a time. Closing the server ends what runs.

    Who asks waits a while. What is found later is there for the next who asks.
    """

    def __init__(self, *, longest_s: float = _LONGEST_S) -> None:
        self._longest_s = longest_s
        self._running: dict[Question, asyncio.Task[dict[str, Any] | None]] = {}
        self._known: dict[Question, tuple[float, dict[str, Any]]] = {}
        self._turn = asyncio.Lock()

    async def find(self, question: Question, *, wait_s: float) -> dict[str, Any] | None:
        """Memory and time as `sdfleet models plan --json` says them; None where there is no answer within `wait_s`."""
        # How much could be measured depends on when it was asked, and an answer with a time is good for all.
        key = replace(question, budget_s=0.0)
        told_s, told = self._known.get(key, (0.0, None))
        if told is not None and time.monotonic() - told_s < _KEPT_S:
            return told
        if key not in self._running:
            self._running[key] = asyncio.create_task(self._ask(question), name="forecast")
            self._running[key].add_done_callback(lambda _: self._running.pop(key, None))
        task = self._running[key]
        done, _ = await asyncio.wait([task], timeout=wait_s)
        return task.result() if done and not task.cancelled() else None

    async def _ask(self, question: Question) -> dict[str, Any] | None:
        async with self._turn:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sdfleet.engine.forecast",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                asked = json.dumps(asdict(question)).encode() + b"\n"
                async with asyncio.timeout(self._longest_s):
                    answer, _ = await process.communicate(asked)
            except TimeoutError:
                log.warning("no forecast in time", extra={"architecture": question.architecture})
                return None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        found = _read(answer, question)
        if found is not None and "time" in found:
            self._known[replace(question, budget_s=0.0)] = (time.monotonic(), found)
        return found


def _read(answer: bytes, question: Question) -> dict[str, Any] | None:
    try:
        said = json.loads(answer)
    except ValueError:
        said = {"fault": "the process ended without an answer"}
    if "memory" not in said:
        log.warning("no forecast", extra={"architecture": question.architecture, "fault": said.get("fault")})
        return None
    return dict(said)
