"""Several engines on one CPU: a wide one with all cores for big models, small ones with a share each for small models.

A small network at small batches is not faster on many threads than on one, so that several engines of one thread, each
with step batches of its own, draw more pictures a second than one engine of many threads. Whether that holds for a
checkpoint at a size is measured here, on this machine, in a pause (`engine_trial.py`), and kept on disk.

Who draws what:

    1. the first job starts the wide engine, and until a trial has said otherwise everything is drawn there
    2. a kind of drawing (checkpoint, size) that the small engines draw at least 1.3 times as fast is spread over them;
       each picture goes where it is predicted to be finished first, so a job may be drawn by several engines
    3. a job that has the machine to itself is drawn where it is finished first: one picture mostly by the wide engine
    4. reproducible jobs are drawn whole by the wide engine: other threads may round in another way
    5. while the wide engine draws what only it may draw, it gets everything that comes, and shares its steps fairly

So both sides draw at once only until the jobs that one side has are finished, and no job ever waits for a turn.
A process that dies is started again by its own `LocalBackend`, which draws its jobs or parts of jobs again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import psutil

from sdfleet.backends.base import Capabilities, OnProgress
from sdfleet.backends.engine_trial import TrialNotes, timed_trial, warm_up
from sdfleet.backends.local import LocalBackend
from sdfleet.backends.parts import CutJob, Part, merged
from sdfleet.backends.placement import Load, Trial, lone_job, shares
from sdfleet.backends.small_engines import MakeEngine, SmallEngines, has_settled, is_ready
from sdfleet.domain import Drawing, ImageResult, JobId, Progress
from sdfleet.engine.events import EngineOptions
from sdfleet.errors import BadRequest, EngineDied, EngineFailed, JobCancelled, SdfleetError, in_use

log = logging.getLogger(__name__)

# A small engine converts nothing and tries its executors in seconds; more than this is a machine that has no time.
_SETTLE_DEADLINE_S = 120.0
# Nothing was asked for that long: the time for a trial.
PAUSE_S = 1.0
# A step of one picture that takes longer keeps all cores busy by itself, and a trial would take minutes.
_LONGEST_STEP_S = 0.5

_Kind = tuple[str, int, int]


@dataclass(slots=True)
class _Seen:
    """What is known of a kind of drawing. `step_s`: shortest step of one picture. `tried_with`: executors.

    stays_cold: the small engines could not draw it when they were to get warm.
    """

    like: Drawing
    step_s: float
    trial: Trial | None
    tried_with: set[tuple[str, ...]] = field(default_factory=set)
    stays_cold: bool = False


class EnginePool:
    """Draws with one wide engine and, where that was measured to be faster, several small ones; see `Backend`.

    n_engines: small engines; "auto" takes a share of the cores for each and asks a trial; a number of two or more
    spreads every checkpoint over that many, as asked. Only on a CPU: on other devices the wide engine draws alone.
    notes_folder: where trials are kept. n_cores, free_bytes: of this machine.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        n_engines: int | Literal["auto"] = "auto",
        notes_folder: Path | None = None,
        make: MakeEngine = LocalBackend,
        n_cores: int | None = None,
        free_bytes: Callable[[], int] = lambda: psutil.virtual_memory().available,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._is_forced = n_engines != "auto"
        self._pause_s = pause_s
        self._wide = make(options, name="local", cores=None, on_facts=self._hear)
        self._small = SmallEngines(
            options, n_engines=n_engines, n_cores=n_cores, make=make, on_facts=self._hear, free_bytes=free_bytes,
            wide_facts=lambda: self._wide.capabilities().facts,
        )  # fmt: skip
        self._notes = TrialNotes(notes_folder)
        self._jobs: dict[JobId, CutJob] = {}
        self._seen: dict[_Kind, _Seen] = {}
        self._heard = asyncio.Event()
        self._pause: asyncio.TimerHandle | None = None
        self._trying: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def pids(self) -> tuple[int, ...]:
        """The ids of the engines' processes that run now, the wide one's first."""
        return tuple(engine.pid for engine in self._engines if engine.pid is not None)

    def capabilities(self) -> Capabilities:
        wide = self._wide.capabilities()
        running = [job for job in self._jobs.values() if any(is_ready(part.engine) for part in job.parts)]
        return replace(
            wide, n_running=len(running), n_waiting=len(self._jobs) - len(running), facts=self._facts(wide.facts)
        )

    async def start(self) -> None:
        """Have the wide engine stand ready before the first job; the small ones too where a number was asked for.

        Raises what a first job would have met. Small engines that cannot be had are no fault: see `capabilities`.
        """
        await self._wide.start()
        if self._is_forced and self._small:
            self._small.want()
            if self._small.starting is not None:
                await asyncio.wait({self._small.starting})

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        if self._is_closed:
            raise EngineDied("the backend local is closed")
        if drawing.job_id in self._jobs:
            raise BadRequest(f"job {drawing.job_id} is being drawn already")
        self._stop_trying()
        is_lone = not self._jobs
        # Progress is always wanted here, to know who has how much left; previews only if somebody looks.
        looks = drawing.wants_previews and on_progress is not None
        job = self._jobs[drawing.job_id] = CutJob(replace(drawing, wants_previews=looks))
        try:
            self._place(job, is_lone=is_lone)
            results = await self._draw(job, on_progress)
            if is_lone and len(results) == 1:
                self._note(drawing, results[0])
            return merged(drawing, results)
        finally:
            del self._jobs[drawing.job_id]
            self._consider()

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Start or stop previews of a job that is being drawn; they reach its `on_progress`."""
        job = self._jobs.get(job_id)
        if job is not None:
            for part in job.parts:
                part.drawing = replace(part.drawing, wants_previews=previews)  # for when it is begun, or begun again
                await part.engine.watch(part.drawing.job_id, previews=previews)

    async def cancel(self, job_id: JobId) -> None:
        job = self._jobs.get(job_id)
        if job is not None:
            job.is_cancelled = True
            for part in job.parts:
                await part.engine.cancel(part.drawing.job_id)

    async def load(self, drawing: Drawing) -> None:
        self._stop_trying()
        await self._wide.load(drawing)

    async def unload(self, checkpoint: str) -> None:
        n_jobs = sum(job.drawing.checkpoint == checkpoint for job in self._jobs.values())
        if n_jobs:
            raise in_use(checkpoint, n_jobs)
        # What has left is not tried in a pause, which would bring it back; nor in the one that begins when the trial
        # of now has been stopped.
        self._seen = {kind: seen for kind, seen in self._seen.items() if kind[0] != checkpoint}
        self._stop_trying()
        if self._trying is not None:
            await asyncio.wait({self._trying})
        await asyncio.gather(*(engine.unload(checkpoint) for engine in self._engines))

    async def pin(self, checkpoints: Collection[str]) -> None:
        for engine in self._engines:
            await engine.pin(checkpoints)

    async def close(self) -> None:
        self._is_closed = True
        self._stop_trying()
        self._small.give_up()
        tasks = [task for task in (self._trying, self._small.starting) if task is not None]
        for task in tasks:
            task.cancel()
        # The engines end at the same time: each may take seconds.
        await asyncio.gather(*(engine.close() for engine in self._engines))
        if tasks:
            await asyncio.wait(tasks)

    # ------------------------------------------------------------------------------------------------- who draws what

    @property
    def _engines(self) -> tuple[LocalBackend, ...]:
        return (self._wide, *self._small)

    def _place(self, job: CutJob, *, is_lone: bool) -> None:
        """Cut the job into parts, see the top of this file."""
        drawing = job.drawing
        seen = self._seen_of(drawing)
        if self._may_spread(drawing, seen) and not self._wide_is_taken(but=job):
            if is_lone and lone_job(seen.trial, n_images=drawing.n_images, n_small=len(self._small)) == "wide":
                given: Sequence[int] = ()
            else:
                given = shares([self._load(engine, seen) for engine in self._small], n_images=drawing.n_images)
        else:
            given = ()
        first = 0
        for engine, n in zip(self._small, given, strict=False):
            if n:
                job.cut(engine, first=first, n=n)
                first += n
        if not job.parts:
            job.cut(self._wide, first=0, n=drawing.n_images)

    def _may_spread(self, drawing: Drawing, seen: _Seen) -> bool:
        if not self._small or drawing.reproducible:
            return False
        if not (self._is_forced or (seen.trial is not None and seen.trial.is_spread)):
            return False
        if self._small.are_ready:
            # As asked, even if a first job then waits for its checkpoint; chosen here, only where nobody waits.
            return self._is_forced or self._small.are_warm(drawing.checkpoint)
        self._small.want()  # not for this job, which would have to wait for them
        return False

    def _wide_is_taken(self, *, but: CutJob) -> bool:
        """Whether the wide engine draws something that only it may draw."""
        others = [job for job in self._jobs.values() if job is not but and job.parts[0].engine is self._wide]
        return any(not self._may_spread(job.drawing, self._seen_of(job.drawing)) for job in others)

    def _load(self, engine: LocalBackend, seen: _Seen) -> Load:
        steps_left: dict[_Kind, list[int]] = {}
        for job in self._jobs.values():
            for part in job.parts:
                if part.engine is engine:
                    steps_left.setdefault(_kind(part.drawing), []).extend(left for left in part.left if left)
        work_s = 0.0
        for kind, left in steps_left.items():
            work_s += _work_s(self._seen[kind].trial, left)
        steps = seen.like.steps
        return Load(work_s=work_s, each_s=_work_s(seen.trial, [steps, steps]) - _work_s(seen.trial, [steps]))

    def _seen_of(self, drawing: Drawing) -> _Seen:
        kind = _kind(drawing)
        seen = self._seen.get(kind)
        if seen is None:
            trial = (
                self._notes.find(drawing, setting=self._small.setting) if self._small and not self._is_forced else None
            )
            seen = self._seen[kind] = _Seen(drawing, float("inf"), trial)
        seen.like = drawing
        return seen

    # ---------------------------------------------------------------------------------------------------- one job

    async def _draw(self, job: CutJob, on_progress: OnProgress | None) -> list[ImageResult]:
        """The results of all parts, in the order of the pictures; the first failure ends the others."""
        if len(job.parts) == 1:
            return [await self._draw_part(job, job.parts[0], on_progress)]
        tasks = [asyncio.create_task(self._draw_part(job, part, on_progress)) for part in job.parts]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failed = next((task for task in tasks if task.done() and task.exception() is not None), None)
            if failed is not None:
                await failed
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _draw_part(self, job: CutJob, part: Part, on_progress: OnProgress | None) -> ImageResult:
        def forward(progress: Progress) -> None:
            part.left[progress.image_index] = progress.n_steps - progress.step
            part.eta_s = progress.eta_s
            if on_progress is not None:
                eta_s = max((p.eta_s for p in job.parts if p.eta_s is not None), default=None)
                index = part.first + progress.image_index
                on_progress(replace(progress, job_id=job.drawing.job_id, image_index=index, eta_s=eta_s))

        while True:
            if job.is_cancelled:
                raise JobCancelled(f"job {job.drawing.job_id} was cancelled before it was drawn")
            try:
                return await part.engine.generate(part.drawing, forward)
            except (EngineDied, EngineFailed):
                # A small engine that cannot be started again (memory, mostly) hands its part to the wide one.
                is_lost = part.engine is not self._wide and part.engine.capabilities().state == "unavailable"
                if self._is_closed or not is_lost:
                    raise
                log.warning(
                    "a small engine is lost, the wide one draws its part", extra={"job_id": part.drawing.job_id}
                )
                part.engine = self._wide
                # Another part may come there too.
                part.drawing = replace(part.drawing, job_id=JobId(f"{job.drawing.job_id}/{part.first}"))

    def _note(self, drawing: Drawing, result: ImageResult) -> None:
        """How long a step of a job took that had the machine to itself, on the wide engine or a small one."""
        seen = self._seen_of(drawing)
        denoise_s = result.timings_s.get("denoise")
        if denoise_s is not None:
            seen.step_s = min(seen.step_s, denoise_s / (drawing.steps * drawing.n_images))

    # ------------------------------------------------------------------------------------- small engines and trials

    def _hear(self) -> None:
        """An engine said something new of itself."""
        self._heard.set()
        self._consider()

    def _consider(self) -> None:
        """With nothing to draw, see whether there is something to try; begins after a pause."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._jobs or self._is_closed or _runs(self._trying):
            return
        if self._wants_small_soon() or self._to_warm() is not None or self._to_try() is not None:
            self._pause = asyncio.get_running_loop().call_later(self._pause_s, self._use_pause)

    def _wants_small_soon(self) -> bool:
        """Whether the small engines will be needed, by what was drawn so far, and do not stand yet."""
        needed = any(self._is_forced or (s.trial is not None and s.trial.is_spread) for s in self._seen.values())
        is_asked = self._small.starting is not None
        return bool(self._small) and needed and not is_asked and is_ready(self._wide)

    def _use_pause(self) -> None:
        self._pause = None
        if self._wants_small_soon():
            self._small.want()
        elif _runs(self._trying):
            return
        elif (cold := self._to_warm()) is not None:
            self._trying = asyncio.create_task(self._warm(cold), name="small engines get warm")
        elif (seen := self._to_try()) is not None:
            self._trying = asyncio.create_task(self._try(seen), name="trial of engines")

    def _to_warm(self) -> _Seen | None:
        """A kind of drawing that is the small engines' and that one of them has never drawn."""
        if not self._small or not self._small.are_ready:
            return None
        for seen in self._seen.values():
            is_theirs = self._is_forced or (seen.trial is not None and seen.trial.is_spread)
            if is_theirs and not seen.stays_cold and not self._small.hold(seen.like.checkpoint):
                return seen
        return None

    async def _warm(self, seen: _Seen) -> None:
        try:
            await warm_up(self._small, seen.like)
        except* SdfleetError as group:
            log.warning("small engines could not draw", extra={"why": str(group.exceptions[0])})
            seen.stays_cold = True
        finally:
            self._trying = None
            self._consider()

    def _to_try(self) -> _Seen | None:
        if self._is_forced or not self._small or not is_ready(self._wide) or self._small.refusal():
            return None
        for seen in self._seen.values():
            executors, is_settled = self._executors(seen.like.checkpoint)
            is_new = seen.trial is None or seen.trial.executors != executors
            if seen.step_s <= _LONGEST_STEP_S and is_new and is_settled and executors not in seen.tried_with:
                return seen
        return None

    def _executors(self, checkpoint: str) -> tuple[tuple[str, ...], bool]:
        """What runs the denoiser in each engine, and whether none is about to change it."""
        names, is_settled = [], True
        for engine in self._engines:
            facts = engine.capabilities().facts
            about = cast("Mapping[str, Mapping[str, object]]", facts.get("executors", {})).get(checkpoint, {})
            names.append(str(about.get("executor", "torch")))
            is_settled = is_settled and bool(about.get("is_settled", True)) and not facts.get("is_rehearsing")
        return tuple(names), is_settled

    async def _all_settled(self, checkpoint: str) -> None:
        """Until no engine that has drawn with a checkpoint is about to try another executor, which takes its core.

        Raises EngineFailed when that takes too long.
        """
        try:
            async with asyncio.timeout(_SETTLE_DEADLINE_S):
                while not all(has_settled(engine, checkpoint) for engine in self._engines):
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            raise EngineFailed(f"the engines were busy with their executors for {_SETTLE_DEADLINE_S:g} s") from None

    async def _try(self, seen: _Seen) -> None:
        like, told = seen.like, {"checkpoint": seen.like.checkpoint}
        try:
            await asyncio.gather(*(engine.start() for engine in self._small))
            await warm_up(self._small, like)
            await self._all_settled(like.checkpoint)
            executors, _ = self._executors(like.checkpoint)
            trial = await timed_trial(self._wide, list(self._small), like, executors=executors)
        except* SdfleetError as group:
            log.warning("engines could not be tried", extra={**told, "why": str(group.exceptions[0])})
            seen.tried_with.add(self._executors(like.checkpoint)[0])
        else:
            seen.trial = trial
            seen.tried_with.add(executors)
            self._notes.keep(like, trial, setting=self._small.setting)
            log.info("engines chosen", extra={**told, "gain": round(trial.gain, 2), "is_spread": trial.is_spread})
        finally:
            self._trying = None
            self._consider()

    def _stop_trying(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._trying is not None:
            self._trying.cancel()

    def _facts(self, wide: Mapping[str, object]) -> dict[str, object]:
        """What the wide engine says, and what all of them hold."""
        told = [each for each in (engine.capabilities().facts for engine in self._small) if each]
        facts = dict(wide or (told[0] if told else {}))
        if told and "checkpoints" in facts:
            every = [name for each in (wide, *told) for name in cast("Sequence[str]", each.get("checkpoints", ()))]
            facts["checkpoints"] = names = list(dict.fromkeys(every))
            facts["resident_bytes"] = sum(cast("int", each.get("resident_bytes", 0)) for each in (wide, *told))
            held = [cast("Mapping[str, int]", each.get("bytes_by_checkpoint", {})) for each in (wide, *told)]
            facts["bytes_by_checkpoint"] = {name: sum(each.get(name, 0) for each in held) for name in names}
        if self._small and wide:
            facts["engines"] = [
                {"pid": engine.pid, "state": engine.capabilities().state, "n_running": engine.capabilities().n_running}
                for engine in self._engines
            ]
            facts["engine_trials"] = {f"{k[0]} {k[1]}x{k[2]}": told for k, told in self._trials_told()}
            facts["why_one_engine"] = self._small.why_not
        return facts

    def _trials_told(self) -> Iterator[tuple[_Kind, dict[str, object]]]:
        for kind, seen in self._seen.items():
            if (trial := seen.trial) is not None:
                times = {name: round(getattr(trial, f"{name}_s"), 4) for name in _TIMES}
                yield kind, {"gain": round(trial.gain, 2), "is_spread": trial.is_spread, "seconds": times}


_TIMES = ("wide_one", "wide_many", "small_one", "small_many")


def _runs(task: asyncio.Task[None] | None) -> bool:
    return task is not None and not task.done()


def _kind(drawing: Drawing) -> _Kind:
    return (drawing.checkpoint, drawing.width_px, drawing.height_px)


def _work_s(trial: Trial | None, steps_left: Sequence[int]) -> float:
    return float(sum(steps_left)) if trial is None else trial.work_s(steps_left)
