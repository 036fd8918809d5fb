"""Processes of ours that a command keeps alive: one for each device of a node, or a router's own node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NoReturn

log = logging.getLogger(__name__)

_AGAIN_FIRST_S, _AGAIN_MOST_S = 1.0, 60.0
# A process that has lived for so long did not fail at its start.
_WELL_S = 60.0
# Beyond what it was given to end its jobs.
_KILL_AFTER_S = 10.0


async def keep_alive(arguments: Sequence[str], *, env: Mapping[str, str], drain_s: float) -> NoReturn:
    """Run `sdfleet ARGUMENTS`, again and again; when cancelled, end it, and return once it has."""
    loop = asyncio.get_running_loop()
    pause_s = _AGAIN_FIRST_S
    while True:
        begun_s = loop.time()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sdfleet", *arguments, env=dict(env), stdin=asyncio.subprocess.DEVNULL,
            # Ctrl-C at the terminal is for the parent to handle.
            start_new_session=True,
        )  # fmt: skip
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            await _end(process, within_s=drain_s + _KILL_AFTER_S)
            raise
        pause_s = _AGAIN_FIRST_S if loop.time() - begun_s > _WELL_S else min(2 * pause_s, _AGAIN_MOST_S)
        log.warning("a process of the node ended and is started again", extra={"code": code, "in_s": pause_s})
        await asyncio.sleep(pause_s)


async def _end(process: asyncio.subprocess.Process, *, within_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(within_s):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def kept_alive(arguments: Sequence[str], *, env: Mapping[str, str], drain_s: float) -> AsyncIterator[None]:
    """Such a process for the time of the block."""
    task = asyncio.ensure_future(keep_alive(arguments, env=env, drain_s=drain_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
