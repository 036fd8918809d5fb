"""One life of an engine's process: its pipes, its last words, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
from asyncio.subprocess import PIPE, SubprocessStreamProtocol
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import cast

from sdfleet.engine import wire
from sdfleet.errors import SdfleetError

log = logging.getLogger(__name__)

N_KEPT_LINES = 50
MAX_LINE_CHARS = 2000
# Buffer of one pipe before the process has to wait for us; a 1024x1024 picture is 3 MiB.
PIPE_BUFFER_BYTES = 2**20
# A process that closed its pipes has nothing left to do but end.
EXIT_DEADLINE_S = 5.0
# Its last lines are in the pipe when it is gone; a process that it had started may hold the pipe open for ever.
LAST_LINES_DEADLINE_S = 0.5


class EngineProcess:
    """A running child that speaks `engine/wire.py`, made by `start`.

    why, fault: set by the owner when the talk went wrong, for `ending`. is_ready: the child said Ready.
    is_retired: it was told to end, as it holds nothing. last_lines: the newest lines of its stderr.
    """

    def __init__(self, transport: asyncio.SubprocessTransport, pipes: _Pipes) -> None:
        self._transport = transport
        self._exited = pipes.exited
        # Never None: `start` asks for all three pipes.
        self._stdin = cast("asyncio.StreamWriter", pipes.stdin)
        self._stdout = cast("asyncio.StreamReader", pipes.stdout)
        self._stderr = cast("asyncio.StreamReader", pipes.stderr)
        self.pid = transport.get_pid()
        self.is_ready = False
        self.is_retired = False
        self.why = ""
        self.fault: SdfleetError | None = None
        self.last_lines: deque[str] = deque(maxlen=N_KEPT_LINES)

    @classmethod
    async def start(
        cls, command: Sequence[str], *, env: Mapping[str, str] | None, cores: Collection[int] | None = None
    ) -> EngineProcess:
        """Start the program, with `--log-level <ours>` appended, on these cores where the system can be told.

        Raises OSError.
        """
        loop = asyncio.get_running_loop()
        arguments = (*command, "--log-level", _level_for_child())
        transport, pipes = await loop.subprocess_exec(
            lambda: _Pipes(limit=PIPE_BUFFER_BYTES, loop=loop),
            *arguments,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=env,
        )
        if cores is not None and hasattr(os, "sched_setaffinity"):
            # Python has not yet got as far as its first thread, and later ones inherit this. A process that is gone
            # already is noticed by its owner.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(transport.get_pid(), cores)
        return cls(transport, pipes)

    def send(self, command: wire.Command) -> None:
        """Hand over without waiting: the child's reader always reads. Raises BrokenMessage for what has no frame."""
        parts = wire.encode(command)
        if not self._stdin.is_closing():
            for part in parts:
                self._stdin.write(part)

    def say_close(self) -> None:
        """Ask the child to end in its own time; nothing can be sent after this."""
        self.send(wire.Close())
        self._stdin.close()

    async def receive(self) -> wire.Report | None:
        """The next report; None when the child has closed its end. Raises as `wire.read_report`."""
        return await wire.read_report(self._stdout)

    async def keep_stderr(self) -> None:
        """Read stderr to its end, so that the child never waits for us; lines are logged and the newest kept."""
        rest = ""
        while part := await self._stderr.read(2**16):
            *lines, rest = re.split(r"[\r\n]+", rest + part.decode(errors="replace"))
            rest = rest[-MAX_LINE_CHARS:]
            self._keep(lines)
        self._keep([rest])

    async def wait_gone(self) -> None:
        """Return when the process has ended."""
        await self._exited.wait()

    def terminate(self) -> None:
        """Ask the process to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process now."""
        self._signal(signal.SIGKILL)

    async def end(self, stderr: asyncio.Task[None]) -> None:
        """Wait until the process is gone, killing it if it stays; `stderr` is the task of `keep_stderr`."""
        try:
            async with asyncio.timeout(EXIT_DEADLINE_S):
                await self._exited.wait()
        except TimeoutError:
            self.why = self.why or "closed its pipes and stayed"
            self.kill()
            await self._exited.wait()
        finally:
            self.kill()
            await asyncio.wait({stderr}, timeout=LAST_LINES_DEADLINE_S)
            stderr.cancel()
            self._transport.close()

    def ending(self) -> str:
        """How it ended, as the end of a sentence that begins with `the engine's process`."""
        code = self._transport.get_returncode()
        if self.why:
            how = f"{self.why} and was ended"
        elif code is None:
            how = "was lost"
        else:
            how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return f"{how} ({self.fault.message})" if self.fault is not None else how

    def advice(self) -> str:
        """What to do about the ending."""
        code = self._transport.get_returncode()
        if code == -9 and not self.why:
            return (
                "SIGKILL is what a system out of memory sends: try a smaller picture, fewer pictures at once or "
                "memory_mode='eco', or close other programs"
            )
        said = " / ".join(line[:200] for line in list(self.last_lines)[-3:])
        return f"its last words: {said}" if said else "`sdfleet doctor` shows what is installed; the log has more"

    def _keep(self, lines: Sequence[str]) -> None:
        for line in lines:
            text = line.rstrip()[:MAX_LINE_CHARS]
            if text:
                self.last_lines.extend(self._relay(line) or [text])

    def _relay(self, line: str) -> list[str]:
        """Log a record of the child under its own name and level; gives what it said, [] if it was no record."""
        try:
            record = json.loads(line) if line.startswith('{"at"') else {}
            level, logger, message = _LEVELS[record.pop("level")], str(record.pop("logger")), str(record.pop("message"))
        except (ValueError, KeyError, TypeError, AttributeError):
            # Libraries quote prompts in their warnings, so this stays at DEBUG.
            log.debug("engine wrote to stderr", extra={"pid": self.pid, "line": line.rstrip()[:MAX_LINE_CHARS]})
            return []
        traceback = str(record.pop("traceback", ""))
        facts = {name: value for name, value in record.items() if name not in _RESERVED}
        logging.getLogger(logger).log(level, message, extra=facts | ({"traceback": traceback} if traceback else {}))
        return [message, *filter(None, traceback.splitlines()[-3:])]

    def _signal(self, number: signal.Signals) -> None:
        # Not the transport's `send_signal`: that polls, and may take the exit code from asyncio's own watcher.
        if not self._exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# Names that `extra` must not use, and the child's clock, which is ours.
_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "at"}


def _level_for_child() -> str:
    """The level that lets everything through which our own logging would show."""
    ours = logging.getLogger("sdfleet").getEffectiveLevel()
    return next((name for name, level in _LEVELS.items() if level >= ours), "error")


class _Pipes(SubprocessStreamProtocol):
    """The three streams, and the moment of exit.

    asyncio's own `Process.wait` in Python 3.11 also waits for the pipes, which a grandchild may hold open.
    """

    def __init__(self, *, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=limit, loop=loop)
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        self.exited.set()
        super().process_exited()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
