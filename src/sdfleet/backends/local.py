"""This machine's own device: one engine process, many jobs at once, and a watch over both.

A process that dies takes no job with it: each job that was being drawn is drawn again from its first step with the
same seed, so it is the same picture. These jobs run one at a time, so that a job which kills the engine is found
alone; a job that was there in two deaths fails. The process is started by the first job that needs it, and ended
where it has jobs and is silent for longer than is believable (`watchdog.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from sdfleet.backends.base import BackendState, Capabilities, OnProgress
from sdfleet.backends.engine_job import Again, EngineJob
from sdfleet.backends.process import EngineProcess
from sdfleet.backends.watchdog import Patience, Watchdog
from sdfleet.domain import Drawing, ImageResult, JobId, Progress
from sdfleet.engine import wire
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed, PictureDone
from sdfleet.errors import BadRequest, EngineDied, EngineFailed, JobCancelled, SdfleetError, in_use

log = logging.getLogger(__name__)

MAX_DEATHS = 2
# Importing torch and diffusers takes 6 s on an idle laptop, and a minute on a busy one with a cold disk.
START_DEADLINE_S = 120.0
# A step of the largest model on a CPU may be longer; then the process is terminated, which loses nothing.
CLOSE_DEADLINE_S = 5.0
# From the child's word that it cannot go on to its end.
FAULT_DEADLINE_S = 10.0
# From SIGTERM to SIGKILL.
TERMINATE_DEADLINE_S = 2.0
PATIENCE = Patience()
_numbers = itertools.count(1)


class LocalBackend:
    """Draws in a child process; see `Backend` for the face. Belongs to one event loop.

    command: the program that speaks `engine/wire.py`; `--options <JSON> --log-level <name>` is appended. None is our
    own engine; (python, "-m", "sdfleet.engine.child", "--engine", "module:attribute") another in the same frame.
    env: the process's whole environment; None lets it inherit ours.
    cores: the CPU cores the process may use, where the system can be told; None: any.
    patience: how long the engine may be silent while it has jobs.
    on_facts: called on the event loop when the engine is ready and whenever it has something new to say of itself.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        command: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        name: str = "local",
        start_deadline_s: float = START_DEADLINE_S,
        close_deadline_s: float = CLOSE_DEADLINE_S,
        patience: Patience = PATIENCE,
        cores: Collection[int] | None = None,
        on_facts: Callable[[], None] | None = None,
    ) -> None:
        program = (sys.executable, "-m", "sdfleet.engine.child") if command is None else tuple(command)
        self._command = (*program, "--options", wire.encode_options(options))
        self._env = None if env is None else dict(env)
        self._name = name
        self._cores = cores
        self._on_facts = on_facts or (lambda: None)
        self._patience = patience
        self._start_deadline_s = start_deadline_s
        self._close_deadline_s = close_deadline_s
        self._jobs: dict[JobId, EngineJob] = {}  # in order of arrival
        self._leaving: dict[JobId, EngineJob] = {}  # cancelled by a caller who left; the process has not answered yet
        self._starters: set[asyncio.Future[None]] = set()
        self._asked: dict[JobId, asyncio.Future[None]] = {}  # by the ids of Unload
        self._pinned: tuple[str, ...] = ()
        self._process: EngineProcess | None = None
        self._watchdog: Watchdog | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._facts: Mapping[str, object] = {}
        self._n_failed_starts = 0
        self._why_not = ""
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """The engine process's id while one runs."""
        return None if self._process is None or self._process.is_retired else self._process.pid

    def capabilities(self) -> Capabilities:
        n_running = sum(job.is_sent for job in self._jobs.values())
        return Capabilities(
            name=self._name,
            state=self._state(),
            reason=self._why_not,
            has_previews=True,
            n_running=n_running,
            n_waiting=len(self._jobs) - n_running,
            facts=self._facts,
        )

    async def start(self) -> None:
        """Have the engine stand ready before the first job. Raises what a first job would have met."""
        started = asyncio.get_running_loop().create_future()
        self._starters.add(started)
        try:
            self._want_process()
            if self._process is not None and self._process.is_ready:
                return
            await started
        finally:
            self._starters.discard(started)
            started.cancel()

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        if drawing.job_id in self._jobs:
            raise BadRequest(f"job {drawing.job_id} is being drawn already")
        wants_previews = drawing.wants_previews and on_progress is not None
        job = EngineJob(replace(drawing, wants_previews=wants_previews))
        self._jobs[job.id] = job
        try:
            self._want_process()
            self._admit()
            return await job.collect(drawing, on_progress)
        finally:
            self._forget(job)

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Start or stop previews of a job that is being drawn; they reach its `on_progress`."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        job.drawing = replace(job.drawing, wants_previews=previews)  # for when it is sent, or sent again
        if job.is_sent:
            self._send(wire.Watch(job_id=job_id, previews=previews))

    async def cancel(self, job_id: JobId) -> None:
        job = self._jobs.get(job_id)
        if job is None or job.is_cancelled:
            return
        job.is_cancelled = True
        if job.is_sent:
            self._send(wire.Cancel(job_id=job_id))
        else:
            self._end(job, JobCancelled(f"job {job_id} was cancelled before it was drawn"))
            self._admit()

    async def load(self, drawing: Drawing) -> None:
        await self.generate(replace(drawing, n_images=0))

    async def unload(self, checkpoint: str) -> None:
        n_jobs = sum(job.drawing.checkpoint == checkpoint for job in self._jobs.values())
        if n_jobs:
            raise in_use(checkpoint, n_jobs)
        process = self._process
        if process is None or not process.is_ready:
            return  # an engine that stands not yet, or not any more, holds nothing
        asked = JobId(f"unload-{next(_numbers)}")
        answered = self._asked[asked] = asyncio.get_running_loop().create_future()
        try:
            process.send(wire.Unload(job_id=asked, checkpoint=checkpoint))
            await answered
        finally:
            self._asked.pop(asked, None)
        is_empty = not (self._jobs or self._leaving or self._asked or self._starters or self._facts.get("checkpoints"))
        if is_empty and process is self._process and process.is_ready:
            await self._retire(process)

    async def pin(self, checkpoints: Collection[str]) -> None:
        self._pinned = tuple(checkpoints)
        if self._process is not None and self._process.is_ready:
            self._send(wire.Pin(checkpoints=self._pinned))

    async def close(self) -> None:
        self._is_closed = True
        self._why_not = "the backend was closed"
        self._fail_all(EngineDied("the backend was closed before the job was done"))
        self._wake.set()
        supervisor = self._supervisor
        if supervisor is None:
            return
        try:
            if self._process is not None and self._process.is_ready:
                self._process.say_close()
                await asyncio.wait({supervisor}, timeout=self._close_deadline_s)
            if not supervisor.done() and self._process is not None:
                self._process.terminate()
                await asyncio.wait({supervisor}, timeout=TERMINATE_DEADLINE_S)
        finally:
            if self._process is not None:
                self._process.kill()
        await asyncio.wait({supervisor})
        if not supervisor.cancelled():
            supervisor.result()

    # ------------------------------------------------------------------------------------------ jobs and the process

    async def _retire(self, process: EngineProcess) -> None:
        """End a process that holds nothing any more: what torch and a card's driver keep for it is given back too."""
        process.is_ready, process.is_retired = False, True
        self._facts = {}
        log.info("engine process has nothing loaded and ends", extra={"backend": self._name, "pid": process.pid})
        process.say_close()
        late = asyncio.get_running_loop().call_later(self._close_deadline_s, process.kill)
        try:
            await process.wait_gone()
        finally:
            late.cancel()

    def _state(self) -> BackendState:
        if self._is_closed:
            return "closed"
        if self._process is not None and self._process.is_retired:
            return "starting" if self._jobs else "idle"
        if self._process is not None:
            return "ready" if self._process.is_ready else "starting"
        return "unavailable" if self._why_not else "idle"

    def _want_process(self) -> None:
        """See to it that a process runs or is being started."""
        if self._is_closed:
            raise EngineDied(f"the backend {self._name} is closed")
        self._wake.set()
        if self._supervisor is None or self._supervisor.done():
            self._supervisor = asyncio.create_task(self._supervise(), name=f"{self._name} engine")

    def _admit(self) -> None:
        """Send what may run now: everything, or one job alone while there are jobs that saw a process die."""
        if self._process is None or not self._process.is_ready:
            return
        suspects = [job for job in self._jobs.values() if job.n_deaths]
        if suspects:
            is_busy = self._leaving or any(job.is_sent for job in self._jobs.values())
            admitted = [] if is_busy else suspects[:1]
        else:
            admitted = [job for job in self._jobs.values() if not job.is_sent and job.id not in self._leaving]
        for job in admitted:
            job.is_sent = True
            try:
                self._process.send(wire.Submit(drawing=job.drawing))
            except wire.BrokenMessage as exc:
                self._end(job, BadRequest(f"the job could not be handed to the engine: {exc}"))
        if admitted:
            self._tell_watchdog(is_report=False)

    def _send(self, command: wire.Command) -> None:
        if self._process is not None:
            self._process.send(command)

    def _end(self, job: EngineJob, error: SdfleetError) -> None:
        """Let the job's `generate` raise; no more is expected of it from the process."""
        self._jobs.pop(job.id, None)
        job.inbox.put_nowait(JobFailed(job_id=job.id, error=error))

    def _fail_all(self, error: SdfleetError) -> None:
        for job in list(self._jobs.values()):
            self._end(job, error)
        for started in self._starters:
            if not started.done():
                started.set_exception(error)

    def _forget(self, job: EngineJob) -> None:
        """The caller's task is over; if the job is not, its caller left and the engine is told to stop."""
        if self._jobs.get(job.id) is not job:
            return
        del self._jobs[job.id]
        if job.is_sent and self._process is not None:
            self._leaving[job.id] = job
            if not job.is_cancelled:
                self._process.send(wire.Cancel(job_id=job.id))
        self._admit()

    # ------------------------------------------------------------------------------------------------- the supervisor

    async def _supervise(self) -> None:
        """One life of the process after another, while there are jobs for it."""
        try:
            while not self._is_closed:
                self._wake.clear()
                if self._jobs or any(not started.done() for started in self._starters):
                    await self._live()
                else:
                    await self._wake.wait()
        finally:
            # Reached with jobs in hand only when the event loop is shutting down, or by a fault in this file.
            self._fail_all(EngineDied("the supervisor of the engine's process was stopped"))

    async def _live(self) -> None:
        """One life, from start to burial."""
        try:
            process = await EngineProcess.start(self._command, env=self._env, cores=self._cores)
        except OSError as exc:
            self._why_not = f"{self._command[0]} could not be started: {exc}"
            self._fail_all(EngineFailed(self._why_not, hint="`sdfleet doctor` shows what is installed"))
            return
        self._process = process
        self._watchdog = watchdog = Watchdog(self._patience, lambda silent_s: _end_silent(process, silent_s))
        is_late = False
        try:
            async with asyncio.TaskGroup() as tasks:
                stderr = tasks.create_task(process.keep_stderr())
                try:
                    await self._converse(process)
                except TimeoutError:
                    is_late = process.fault is None
                    process.why = "was late" if is_late else "stayed after a fault"
                    process.kill()
                except wire.BrokenStream as exc:
                    process.why = process.why or f"sent what is not a message ({exc})"
                    process.kill()
                except asyncio.CancelledError:
                    process.kill()
                    raise
                finally:
                    watchdog.stop()
                    await process.end(stderr)
        finally:
            process.kill()
            self._process = None
            self._watchdog = None
            self._leaving.clear()
            for answered in self._asked.values():
                if not answered.done():
                    answered.set_result(None)  # what it held has gone with it
        if not (self._is_closed or process.is_retired):
            self._bury(process, is_late=is_late)

    async def _converse(self, process: EngineProcess) -> None:
        """Until the process has no more to say. Raises BrokenStream, or TimeoutError for a late Ready or a late end."""
        async with asyncio.timeout(0 if self._is_closed else self._start_deadline_s) as deadline:
            while True:
                try:
                    report = await process.receive()
                except wire.BrokenMessage as exc:
                    report = _as_job_failed(exc, process)
                match report:
                    case None:
                        return
                    case wire.Ready():
                        deadline.reschedule(None)
                        self._greet(process, report)
                    case wire.Facts(facts=facts):
                        self._facts = facts
                        self._on_facts()
                    case wire.Fault(error=error):
                        process.fault = error
                        deadline.reschedule(asyncio.get_running_loop().time() + FAULT_DEADLINE_S)
                    case Progress() | PictureDone() | JobDone() | JobFailed():
                        self._route(report)
                    case _:
                        assert_never(report)

    def _greet(self, process: EngineProcess, ready: wire.Ready) -> None:
        process.is_ready = True
        self._facts = ready.facts
        self._n_failed_starts = 0
        self._why_not = ""
        log.info("engine is ready", extra={"backend": self._name, "pid": process.pid})
        for started in self._starters:
            if not started.done():
                started.set_result(None)
        if self._pinned:
            process.send(wire.Pin(checkpoints=self._pinned))
        self._admit()
        self._on_facts()

    def _tell_watchdog(self, *, is_report: bool) -> None:
        if self._watchdog is not None:
            given = [job for job in self._jobs.values() if job.is_sent] + list(self._leaving.values())
            all_begun = all(job.is_begun for job in given)
            self._watchdog.note(is_report=is_report, has_jobs=bool(given), all_begun=all_begun)

    def _route(self, event: Event) -> None:
        self._hand_on(event)
        self._tell_watchdog(is_report=True)

    def _hand_on(self, event: Event) -> None:
        has_ended = isinstance(event, JobDone | JobFailed)
        answered = self._asked.get(event.job_id)
        if answered is not None:
            if not answered.done():
                answered.set_exception(event.error) if isinstance(event, JobFailed) else answered.set_result(None)
            return
        leaving = self._leaving.get(event.job_id)
        if leaving is not None:
            leaving.is_begun = True
            if has_ended:
                del self._leaving[event.job_id]
                self._admit()
            return
        job = self._jobs.get(event.job_id)
        if job is None or not job.is_sent:
            return  # a late word about a job that has ended
        job.is_begun = True
        job.inbox.put_nowait(event)
        if has_ended:
            del self._jobs[job.id]
            self._admit()

    def _bury(self, process: EngineProcess, *, is_late: bool) -> None:
        """Decide what becomes of the jobs after a death."""
        ending = process.ending()
        sent = [job for job in self._jobs.values() if job.is_sent]
        facts = {"backend": self._name, "pid": process.pid, "ending": ending, "n_jobs": len(sent)}
        level = logging.INFO if isinstance(process.fault, BadRequest) else logging.ERROR
        log.log(level, "engine process ended", extra={**facts, "stderr": "\n".join(process.last_lines)})
        if not process.is_ready:
            self._bury_unborn(process, ending, is_late=is_late)
        for job in sent:
            job.is_sent = job.is_begun = False
            job.n_deaths += 1
            if job.is_cancelled:
                self._end(job, JobCancelled(f"job {job.id} was cancelled"))
            elif job.n_deaths >= MAX_DEATHS:
                text = f"the engine's process {ending} while it drew this job, {job.n_deaths} times"
                self._end(job, EngineDied(text, hint=process.advice()))
            else:
                job.inbox.put_nowait(Again())

    def _bury_unborn(self, process: EngineProcess, ending: str, *, is_late: bool) -> None:
        """A start that failed is tried once more, unless the process said why or used up the time."""
        self._n_failed_starts += 1
        if is_late:
            text = f"the engine's process was not ready within {self._start_deadline_s:g} s"
            error: SdfleetError = EngineDied(text, hint="the machine may be overloaded; see the log, then try again")
        elif process.fault is not None:
            error = process.fault
        elif self._n_failed_starts >= MAX_DEATHS:
            error = EngineDied(f"the engine's process {ending} before it was ready", hint=process.advice())
        else:
            return
        self._n_failed_starts = 0
        self._why_not = str(error)
        self._fail_all(error)


def _end_silent(process: EngineProcess, silent_s: float) -> None:
    log.error("an engine process is silent and is ended", extra={"pid": process.pid, "silent_s": round(silent_s)})
    process.why = f"had jobs and said nothing for {silent_s:.0f} s"
    process.kill()


def _as_job_failed(exc: wire.BrokenMessage, process: EngineProcess) -> JobFailed:
    """One broken report costs its job; one that names no job leaves us not knowing who waits for it."""
    if exc.job_id is None:
        raise wire.BrokenStream(str(exc)) from exc
    process.send(wire.Cancel(job_id=exc.job_id))
    return JobFailed(job_id=exc.job_id, error=EngineFailed(f"the engine's answer made no sense: {exc}"))
