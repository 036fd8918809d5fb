"""The process that owns one device: `python -m sdfleet.engine.child --options '{"device": "cpu"}'`.

Commands come in as frames on standard input, reports go out as frames on standard output (`engine/wire.py`). Three
threads: one reads commands into a queue, one writes reports out of a queue, and the main thread makes every call of
the engine, so torch is only ever used by one. When the parent goes away, standard input ends and so does this process.

Another engine plugs in with `--engine module:attribute`, anything with the face of `EngineFace`. That is how mflux and
DiffusionKit run in their own virtual environments: this file and what it imports need only the standard library.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, assert_never, cast

from sdfleet.domain import Drawing, JobId, Progress
from sdfleet.engine import wire
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed
from sdfleet.errors import BadRequest, EngineFailed, SdfleetError
from sdfleet.observe import start_logging

log = logging.getLogger(__name__)

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
OUR_ENGINE = "sdfleet.engine.engine:Engine"

# How long the process may live on in the middle of a step after the parent is gone or has said Close.
LINGER_S = 10.0
# Nothing was asked for that long: the time to try something out. With one client, who asks again 10 ms after an answer,
# every answer would else be late by a try.
REST_S = 0.3
# Pictures in the making share this many told steps a second. Sixteen of them at 20 steps a second made 320 messages,
# and whenever the server's process takes a core for them, all threads of the engine wait; nobody can see more anyway.
TOLD_PER_S = 50.0
# However many they are, each is heard of this often.
LONGEST_UNTOLD_S = 0.5
# Reports waiting to be written: pictures leave while the next step runs; a parent that does not read stops the engine.
MAX_WAITING_REPORTS = 16


class EngineFace(Protocol):
    """What an engine looks like from here. Every call comes from the main thread."""

    def submit(self, drawing: Drawing) -> None:
        """Take a drawing in; raises SdfleetError if it cannot be accepted."""

    def cancel(self, job_id: JobId) -> None:
        """Stop a job between two steps; JobFailed(JobCancelled) follows from `step`. Unknown ids are ignored."""

    def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Start or stop previews of a job. Unknown ids are ignored."""

    def unload(self, checkpoint: str) -> None:
        """Let a checkpoint leave the device, with the memory it took; one that is not there is left so.

        Raises InUse while a job draws with it.
        """

    def pin(self, checkpoints: Collection[str]) -> None:
        """From now on these, and no others, never leave to make room for another."""

    def step(self) -> list[Event]:
        """One turn. A fault that belongs to one job is its JobFailed; an exception ends the process."""

    @property
    def is_idle(self) -> bool:
        """Nothing is left to do until the next `submit`."""

    @property
    def is_resting(self) -> bool:
        """Nothing is left to draw. Where it is not idle too, there is something to try out, which has time."""

    def facts(self) -> Mapping[str, object]:
        """Device, dtype, resident checkpoints and the like, as JSON values. Called after a job and before a wait."""

    def close(self) -> None:
        """Give the device back."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the parent closes or leaves; gives the exit code."""
    # Ctrl-C in a terminal reaches the whole group; the parent decides what it means for the jobs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="sdfleet.engine.child", description="The process that owns one device.")
    parser.add_argument("--options", type=wire.decode_options, default=EngineOptions(), help="EngineOptions as JSON")
    parser.add_argument("--engine", default=OUR_ENGINE, help="module:attribute of the engine's class")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="warning")
    chosen = parser.parse_args(arguments)
    start_logging(chosen.log_level, as_json=True)  # so that the parent can tell our records from foreign chatter
    commands_fd, reports_fd = _take_over_standard_streams()
    inbox = _Inbox(commands_fd)
    with _Outbox(reports_fd, on_broken=inbox.end) as outbox:
        inbox.start()  # first, so that commands are taken off the pipe while torch is imported
        engine: EngineFace | None = None
        # Everything is caught here, once: whatever went wrong, the parent hears why before the process ends.
        try:
            engine = _load_engine(chosen.engine, chosen.options)
            _serve(engine, inbox, outbox)
        except Exception as exc:
            # What somebody asked for and cannot have (a device that is not here) is no fault to be traced.
            log.log(
                logging.INFO if isinstance(exc, BadRequest) else logging.ERROR,
                "the engine's process cannot go on",
                exc_info=not isinstance(exc, SdfleetError),
            )
            outbox.put(wire.Fault(error=_as_sdfleet_error(exc)))
            return EXIT_FAULT
        finally:
            if engine is not None:
                engine.close()
    return 0


def _take_over_standard_streams() -> tuple[int, int]:
    """File descriptors for commands and reports.

    After this a library that prints writes to stderr, one that reads stdin finds it empty, and a process started
    from here holds neither pipe open (duplicates are not inheritable).
    """
    commands_fd, reports_fd = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout.flush()
    os.dup2(2, 1)
    return commands_fd, reports_fd


def _serve(engine: EngineFace, inbox: _Inbox, outbox: _Outbox) -> None:
    """Obey commands and take turns until the parent says Close or leaves."""
    facts = dict(engine.facts())
    outbox.put(wire.Ready(facts=facts))
    pace = _Pace()
    has_rested = False
    while True:
        answers: list[Event] = []
        is_resting = engine.is_resting
        rest_s = REST_S if is_resting and not has_rested else 0.0
        for command in inbox.take(wait_s=None if engine.is_idle else rest_s):
            if isinstance(command, wire.Close):
                return
            if (answer := _obey(command, engine, outbox)) is not None:
                answers.append(answer)
        has_rested = is_resting and engine.is_resting
        events = [*engine.step(), *answers]
        has_ended_job = any(isinstance(event, JobDone | JobFailed) for event in events)
        if (has_ended_job or engine.is_idle) and (now := dict(engine.facts())) != facts:
            # Before the events, so that whoever hears that a job is done finds its checkpoint among the facts.
            facts = now
            outbox.put(wire.Facts(facts=facts))
        for event in events:
            if pace.lets_through(event):
                _send_event(event, engine, outbox)


def _load_engine(name: str, options: EngineOptions) -> EngineFace:
    module, _, attribute = name.partition(":")
    # What an import makes stays: looking for garbage in it meanwhile took 0.13 s of the 1.08 s until the engine was
    # imported (2026-11-21), and without the freeze every later look would go through it again.
    gc.disable()
    try:
        build = cast("Callable[[EngineOptions], EngineFace]", getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError, OSError) as exc:  # OSError: a shared library that cannot be opened
        raise EngineFailed(
            f"the engine {name} could not be imported by {sys.executable}: {exc}",
            hint="install sdfleet with its dependencies into that Python, then try again",
        ) from exc
    finally:
        gc.freeze()
        gc.enable()
    return build(options)


_Order = wire.Submit | wire.Cancel | wire.Watch | wire.Unload | wire.Pin | wire.BrokenMessage


def _obey(command: _Order, engine: EngineFace, outbox: _Outbox) -> Event | None:
    """Do it; what is to be answered after what the next turn has to say, which may be the end of cancelled jobs."""
    match command:
        case wire.Submit(drawing=drawing):
            try:
                engine.submit(drawing)
            except SdfleetError as exc:
                outbox.put(JobFailed(job_id=drawing.job_id, error=exc))
        case wire.Cancel(job_id=job_id):
            engine.cancel(job_id)
        case wire.Watch(job_id=job_id, previews=previews):
            engine.watch(job_id, previews=previews)
        case wire.Unload(job_id=job_id, checkpoint=checkpoint):
            try:
                engine.unload(checkpoint)
            except SdfleetError as exc:
                return JobFailed(job_id=job_id, error=exc)
            return JobDone(job_id=job_id)
        case wire.Pin(checkpoints=checkpoints):
            engine.pin(checkpoints)
        case wire.BrokenMessage(job_id=None):
            log.error("a command made no sense and was skipped", extra={"why": str(command)})
        case wire.BrokenMessage(job_id=job_id):
            error = EngineFailed(f"the engine's process could not read the job: {command}")
            outbox.put(JobFailed(job_id=cast("JobId", job_id), error=error))
        case _:
            assert_never(command)
    return None


def _send_event(event: Event, engine: EngineFace, outbox: _Outbox) -> None:
    try:
        outbox.put(event)
    except wire.BrokenMessage as exc:
        log.exception("an event could not be sent; its job fails")
        engine.cancel(event.job_id)
        outbox.put(JobFailed(job_id=event.job_id, error=EngineFailed(f"the engine's answer could not be sent: {exc}")))


def _as_sdfleet_error(exc: Exception) -> SdfleetError:
    if isinstance(exc, SdfleetError):
        return exc
    return EngineFailed(f"the engine's process met a fault: {type(exc).__name__}: {str(exc)[:500]}")


class _Pace:
    """Which steps are told: the first and the last of a picture, those with a preview, and others now and then."""

    def __init__(self) -> None:
        self._told_s: dict[JobId, dict[int, float]] = {}  # when a picture was last heard of
        self._n_pictures = 0

    def lets_through(self, event: Event) -> bool:
        if isinstance(event, JobDone | JobFailed):
            self._n_pictures -= len(self._told_s.pop(event.job_id, {}))
        if not isinstance(event, Progress):
            return True
        told_s = self._told_s.setdefault(event.job_id, {})
        now_s = time.monotonic()
        last_s = told_s.get(event.image_index)
        self._n_pictures += last_s is None
        is_due = last_s is None or now_s - last_s >= min(self._n_pictures / TOLD_PER_S, LONGEST_UNTOLD_S)
        if is_due or event.preview is not None or event.step == event.n_steps:
            told_s[event.image_index] = now_s
            return True
        return False


class _Inbox:
    """Commands in the order they came, read by a thread of its own; the end of the stream is a Close."""

    def __init__(self, commands_fd: int) -> None:
        self._fd = commands_fd
        self._commands: queue.SimpleQueue[wire.Command | wire.BrokenMessage | wire.BrokenStream]
        self._commands = queue.SimpleQueue()

    def start(self) -> None:
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def end(self) -> None:
        """Let the main thread end at its next look, as if the parent had said Close."""
        self._commands.put(wire.Close())

    def take(self, *, wait_s: float | None) -> Iterator[wire.Command | wire.BrokenMessage]:
        """What has arrived, waited for so long; None: until there is something. Raises BrokenStream."""
        while wait_s != 0 or not self._commands.empty():
            try:
                command = self._commands.get(timeout=wait_s)
            except queue.Empty:
                return
            wait_s = 0.0
            if isinstance(command, wire.BrokenStream):
                raise command
            yield command

    def _read(self) -> None:
        try:
            while True:
                try:
                    command = wire.read_command(self._read_whole)
                except wire.BrokenMessage as exc:
                    self._commands.put(exc)
                    continue
                if command is None or isinstance(command, wire.Close):
                    break
                self._commands.put(command)
        except wire.BrokenStream as exc:
            self._commands.put(exc)
        finally:
            self.end()
        # The main thread ends the process as soon as it looks; a step or a load that takes longer is for nobody.
        time.sleep(LINGER_S)
        os._exit(EXIT_FAULT)

    def _read_whole(self, n_bytes: int) -> bytes:
        parts: list[bytes] = []
        while n_bytes:
            part = os.read(self._fd, min(n_bytes, 2**20))
            if not part:
                break
            parts.append(part)
            n_bytes -= len(part)
        return b"".join(parts)


class _Outbox:
    """Reports on their way out; `put` returns at once unless too many are waiting.

    When nobody reads any more, `on_broken` is called once and further reports are dropped.
    """

    def __init__(self, reports_fd: int, *, on_broken: Callable[[], None]) -> None:
        self._fd = reports_fd
        self._on_broken = on_broken
        self._frames: queue.Queue[list[bytes] | None] = queue.Queue(MAX_WAITING_REPORTS)
        self._writer = threading.Thread(target=self._write, name="reports", daemon=True)

    def __enter__(self) -> Self:
        self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._frames.put(None)
        self._writer.join(LINGER_S)

    def put(self, report: wire.Report) -> None:
        """Queue one report. Raises BrokenMessage if it cannot be put into a frame."""
        self._frames.put(wire.encode(report))

    def _write(self) -> None:
        is_open = True
        while (frame := self._frames.get()) is not None:
            if not is_open:
                continue
            try:
                self._write_whole(frame)
            except OSError:  # the parent closed its end
                is_open = False
                self._on_broken()

    def _write_whole(self, frame: list[bytes]) -> None:
        for part in frame:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(self._fd, rest) :]


if __name__ == "__main__":
    code = main()
    # Everything is written and given back. torch would take itself apart for another 0.35 s (2026-11-21), and whoever
    # closes an engine waits for the end of this process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
