"""The loop: pictures from many jobs, one step at a time, together.

One turn (`Engine.step`) reads top to bottom:

    1. cancelled jobs leave
    2. new jobs are prepared: checkpoint, prompts, first latents; their pictures join
    3. the batcher says who steps together; one network call moves them all
    4. finished pictures are decoded and leave
    5. with nothing to draw, another executor is tried, or another size of batch, a call a turn

Every call of torch happens on the thread that calls `step`. A second thread would slow the whole process on a CPU.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sdfleet.domain import Drawing, FinishedPicture, JobId, Picture, Progress, SafetyVerdict
from sdfleet.engine.batcher import Batcher, Candidate
from sdfleet.engine.decoding import Decoder
from sdfleet.engine.devices import StepClock, choose_device, out_of_memory_as_ours
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed, PictureDone
from sdfleet.engine.executors import is_of
from sdfleet.engine.job import Job
from sdfleet.engine.lora import set_of
from sdfleet.engine.memory import Rung
from sdfleet.engine.pixels import to_picture
from sdfleet.engine.rehearsal import Rehearsal
from sdfleet.engine.residency import DeviceResidency, Loaded
from sdfleet.engine.resizing import fitted, resized
from sdfleet.engine.step_batch import StepBatch, shares_step
from sdfleet.engine.step_cache import told_of
from sdfleet.engine.step_curves import StepCurves
from sdfleet.engine.trajectory import Trajectory, begin_all
from sdfleet.errors import EngineFailed, JobCancelled, OutOfMemory, SdfleetError, in_use

log = logging.getLogger(__name__)

# Jobs that come together should start together, even where a step is shorter than encoding their prompts.
_PREPARE_S = 0.1
# `smaller_picture` takes this share of each side: 0.56 of the area.
_SMALLER_SIDE = 0.75
_SMALLEST_SIDE_PX = 64


class Engine:
    """Draws on one device. Not thread-safe: one thread owns it, from the first call to the last."""

    def __init__(self, options: EngineOptions) -> None:
        if options.n_threads is not None:
            torch.set_num_threads(options.n_threads)
        self._device = choose_device(options.device, options.dtype, options.weights, options.text_weights)
        self._residency = DeviceResidency(self._device, options)
        self._decoder = Decoder(self._device, self._residency)
        self._batcher = Batcher(max_rows=options.max_rows)
        self._curves = StepCurves(self._batcher)
        is_on = options.rehearses and self._device.kind == "cpu"
        self._rehearsal = Rehearsal(self._batcher, self._residency.find_settled, is_on=is_on)
        self._clock = StepClock(self._device)
        self._pending: deque[Job] = deque()
        self._jobs: dict[JobId, Job] = {}
        self._live: dict[int, Trajectory] = {}
        self._keys: dict[int, tuple[object, ...]] = {}
        self._cancelled: list[JobId] = []
        self._events: list[Event] = []
        self._batch: StepBatch | None = None
        self._n_made = 0
        self._n_turns = 0
        self._step_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Nothing to prepare, nothing to step and nothing to try out."""
        return not (self._has_work or self._residency.has_chore or self._rehearsal.has_chore)

    @property
    def is_resting(self) -> bool:
        """Nothing to draw. There may be something to try out, which has time."""
        return not self._has_work

    def facts(self) -> Mapping[str, object]:
        """The device, its formats, and what is on it now."""
        return {
            "device": self._device.kind,
            "dtype": self._device.dtype_name,
            "dtype_reason": self._device.why,
            "weights": self._device.weights or self._device.dtype_name,
            "text_weights": self._device.text_weights or self._device.dtype_name,
            "threads": torch.get_num_threads(),
            "checkpoints": list(self._residency.checkpoints),
            "resident_bytes": self._residency.resident_bytes(),
            "bytes_by_checkpoint": self._residency.bytes_by_checkpoint(),
            "pinned": list(self._residency.pinned),
            "n_by_layer": self._residency.n_by_layer(),
            "executors": self._residency.executors.facts(),
            "compiled": self._residency.compiling.facts(),
            "is_rehearsing": self._rehearsal.has_chore,
            "step_s": self._curves.told(self._residency.checkpoints),
        }

    @property
    def _has_work(self) -> bool:
        return bool(self._pending or self._live or self._cancelled or self._events)

    def submit(self, drawing: Drawing) -> None:
        """Take a job; it is prepared in the next turns. Its end is a JobDone or a JobFailed event."""
        job = Job(
            drawing=drawing,
            arrived_turn=self._n_turns,
            begun_s=time.perf_counter(),
            wants_previews=drawing.wants_previews,
            left=drawing.n_images,
        )
        self._jobs[drawing.job_id] = job
        self._pending.append(job)

    def cancel(self, job_id: JobId) -> None:
        """End a job before its next step; unknown and finished jobs are left as they are."""
        if job_id in self._jobs:
            self._cancelled.append(job_id)

    def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Start or stop previews of a job: somebody began or ceased to look."""
        if job_id in self._jobs:
            self._jobs[job_id].wants_previews = previews

    def unload(self, checkpoint: str) -> None:
        """Let a checkpoint leave the device, with the memory it took. Raises InUse while a job needs it."""
        self._drop_cancelled()
        needed = [job_id for job_id, job in self._jobs.items() if job.drawing.checkpoint == checkpoint]
        if needed:
            raise in_use(checkpoint, len(needed))
        self._batch = None
        self._residency.unload(checkpoint)

    def pin(self, checkpoints: Collection[str]) -> None:
        """These checkpoints, and no others, never leave to make room."""
        self._residency.pin(checkpoints)

    def step(self) -> list[Event]:
        """One turn, see the top of this file. Answers with what happened; empty when idle."""
        self._n_turns += 1
        self._drop_cancelled()
        self._prepare_pending()
        if self._live:
            self._finish(self._step_together())
        elif not self._has_work:
            self._do_chore()
        events, self._events = self._events, []
        return events

    def _do_chore(self) -> None:
        self._residency.take_off_loras()
        if not self._residency.has_chore:
            self._rehearsal.do_chore()
        elif (changed := self._residency.do_chore()) is not None:
            self._batcher.forget(partial(is_of, changed))
            self._rehearsal.forget(partial(is_of, changed))

    def _drop_cancelled(self) -> None:
        for job_id in self._cancelled:
            if job_id in self._jobs:
                self._fail(self._jobs[job_id], JobCancelled("the job was cancelled"))
        self._cancelled.clear()

    def close(self) -> None:
        """Drop every job and everything on the device."""
        self._pending.clear()
        self._jobs.clear()
        self._live.clear()
        self._batch = None
        self._residency.close()

    # -- 2. prepare

    def _prepare_pending(self) -> None:
        """Prepare new jobs for about the time of one step, so that neither they nor those in the making wait long."""
        begun_s = time.perf_counter()
        while self._pending:
            job = self._pending.popleft()
            if self._jobs.get(job.drawing.job_id) is job:  # cancelled jobs are still in the queue
                self._guarded(job, partial(self._prepare, job))
            if self._live and time.perf_counter() - begun_s >= max(self._step_s, _PREPARE_S):
                return

    def _prepare(self, job: Job) -> None:
        drawing = job.drawing
        busy = {self._jobs[t.job_id].drawing.checkpoint for t in self._live.values()}
        with job.timed("load"):
            loaded = self._residency.acquire(drawing, busy=busy)
            if loaded.residency == "by_layer":
                job.climb("offload_layers")
            family = loaded.family
        if not drawing.n_images:
            self._end(job)
            return
        with job.timed("encode"), torch.inference_mode():
            self._residency.enter(loaded, "encode")
            with family.loras.on_text(drawing.loras, family.text_encoders(drawing)):
                prompts = family.encode(drawing)
            if drawing.image is not None:
                self._residency.enter(loaded, "decode")
            source = family.source(drawing)
            self._residency.enter(loaded, "denoise")
            fitting = family.loras.settle(drawing, family.denoiser)
        job.tokens = prompts.tokens
        warnings = (*prompts.warnings, *fitting, *self._residency.told(drawing.checkpoint)[1])
        job.warnings += [warning for warning in warnings if warning not in job.warnings]
        first_id = self._n_made + 1
        self._n_made += drawing.n_images
        for trajectory in begin_all(drawing, family, prompts, source, first_id=first_id):
            job.n_evaluations += trajectory.n_calls
            if drawing.step_cache != "off" and not trajectory.image_index:
                effect = told_of(drawing.step_cache, n_evaluations=trajectory.n_evaluations, n_calls=trajectory.n_calls)
                job.warnings += [] if effect in job.warnings else [effect]
            key = (*shares_step(family, trajectory, checkpoint=drawing.checkpoint), *set_of(drawing.loras))
            if drawing.reproducible:
                key = (*key, drawing.job_id, trajectory.image_index)
            self._keys[trajectory.id] = key
            self._live[trajectory.id] = trajectory

    # -- 3. step

    def _step_together(self) -> list[Trajectory]:
        """One network call for whoever the batcher picks; those of them that are finished now."""
        batch = self._next_batch()
        loaded = self._loaded_of(batch.trajectories[0])
        for trajectory in batch.trajectories:
            job = self._jobs[trajectory.job_id]
            job.denoise_begun_s = job.denoise_begun_s or time.perf_counter()
        begun_s = time.perf_counter()
        try:
            self._residency.enter(loaded, "denoise")
            self._residency.compiling.begin_step(loaded.family.components)
            self._clock.begin()
            with out_of_memory_as_ours():
                batch.step()
        except OutOfMemory as exc:
            self._make_room(batch, loaded, exc)
            return []
        except Exception as exc:  # noqa: BLE001 - one bad row must fail alone, whatever is wrong with it
            self._isolate(batch, exc)
            return []
        self._step_s = time.perf_counter() - begun_s
        key = self._keys[batch.trajectories[0].id]
        for (asked, n_rows), spent_s in self._clock.end((key, batch.n_rows)):
            self._batcher.observe(asked, n_rows, spent_s)
        first = self._jobs[batch.trajectories[0].job_id].drawing
        self._curves.note(
            first.checkpoint, key, width_px=first.width_px, height_px=first.height_px,
            rows_per_picture=batch.trajectories[0].n_rows,
        )  # fmt: skip
        if batch.call is not None and not (first.reproducible or first.loras):
            self._rehearsal.note(key, batch.call, spent_s=self._step_s)
        self._report(batch, loaded)
        return [t for t in batch.trajectories if t.is_finished]

    def _next_batch(self) -> StepBatch:
        candidates = []
        caps: dict[Hashable, int] = {}
        for trajectory in self._live.values():
            job = self._jobs[trajectory.job_id]
            key = self._keys[trajectory.id]
            loaded = self._loaded_of(trajectory)
            caps[key] = self._residency.row_cap(loaded, job.drawing, key)
            due = job.arrived_turn + trajectory.image_index * trajectory.n_calls
            candidates.append(Candidate(id=trajectory.id, key=key, n_rows=trajectory.n_rows, due=due))
        decision = self._batcher.choose(candidates, caps)
        if self._batch is None or self._batch.ids != decision.ids:
            chosen = [self._live[chosen_id] for chosen_id in decision.ids]
            drawing = self._jobs[chosen[0].job_id].drawing
            family = self._loaded_of(chosen[0]).family
            fills_up = self._residency.compiling.fills_up(family.components)
            size_px = (drawing.height_px, drawing.width_px)
            self._batch = StepBatch(family, chosen, size_px=size_px, fills_up=fills_up, loras=drawing.loras)
            log.debug("batch", extra={"pictures": len(chosen), "rows": decision.n_rows, "reason": decision.reason})
        return self._batch

    def _report(self, batch: StepBatch, loaded: Loaded) -> None:
        now_s = time.perf_counter()
        for trajectory in batch.trajectories:
            job = self._jobs[trajectory.job_id]
            job.n_evaluated += 1
            since_s = now_s - (job.denoise_begun_s or now_s)
            eta_s = since_s / job.n_evaluated * (job.n_evaluations - job.n_evaluated)
            preview = None
            if job.wants_previews and trajectory.denoised is not None and not trajectory.is_finished:
                preview = to_picture(loaded.family.preview(trajectory.denoised)[0])
            self._events.append(
                Progress(
                    job_id=trajectory.job_id,
                    image_index=trajectory.image_index,
                    step=trajectory.sampler.evaluations[trajectory.position - 1].step,
                    n_steps=trajectory.sampler.evaluations[-1].step,
                    eta_s=eta_s,
                    preview=preview,
                )
            )

    # -- 4. finish

    def _finish(self, finished: Sequence[Trajectory]) -> None:
        if not finished:
            return
        loaded = self._loaded_of(finished[0])
        decoded = [(trajectory, to_picture(image)) for trajectory, image in self._decode(loaded, finished)]
        verdicts = self._verdicts(loaded, decoded)
        for trajectory, drawn in decoded:
            job = self._jobs.get(trajectory.job_id)
            if job is None:  # a sister picture failed, and the job with it
                continue
            self._leave(trajectory)
            picture = drawn
            if job.drawing.resize_to is not None:
                # An input picture was stretched to what the model draws, so its answer is stretched back.
                bring = fitted if job.drawing.image is None else resized
                picture = bring(drawn, *job.drawing.resize_to)
            done = FinishedPicture(
                picture=picture,
                seed=trajectory.seed,
                reproducible=job.drawing.reproducible,
                safety=verdicts[trajectory.id],
            )
            index = trajectory.image_index
            self._events.append(PictureDone(job_id=trajectory.job_id, image_index=index, finished=done))
            job.left -= 1
            if not job.left:
                self._end(job)

    def _verdicts(self, loaded: Loaded, decoded: Sequence[tuple[Trajectory, Picture]]) -> dict[int, SafetyVerdict]:
        """What the checkpoint's safety checker says, by trajectory. A picture it could not look at fails its job."""
        unchecked: SafetyVerdict = "off" if loaded.family.components.has("safety_checker") else "none"
        verdicts = {trajectory.id: unchecked for trajectory, _ in decoded}
        for job_id in dict.fromkeys(trajectory.job_id for trajectory, _ in decoded):
            job = self._jobs.get(job_id)
            if job is not None and loaded.family.is_checked(job.drawing):
                own = {trajectory.id: picture for trajectory, picture in decoded if trajectory.job_id == job_id}
                self._guarded(job, partial(self._decoder.check, loaded, own, job=job, into=verdicts))
        return verdicts

    def _decode(self, loaded: Loaded, finished: Sequence[Trajectory]) -> list[tuple[Trajectory, Tensor]]:
        """Pictures [3, H, W] of a group; when the group cannot be decoded together, one by one, each failing alone."""
        begun_s = time.perf_counter()
        jobs = {t.job_id: self._jobs[t.job_id] for t in finished}
        self._residency.enter(loaded, "decode")
        n_together = self._residency.decode_cap(loaded, self._jobs[finished[0].job_id].drawing)
        together = [finished[start : start + n_together] for start in range(0, len(finished), n_together)]
        decoded: list[tuple[Trajectory, Tensor]] = []
        for group in together:
            try:
                decoded += self._decoder.decode(loaded, group, jobs=jobs)
            except (OutOfMemory, EngineFailed):
                for trajectory in group:
                    job = self._jobs.get(trajectory.job_id)
                    leaner = partial(self._decode_leaner, loaded, trajectory, into=decoded)
                    self._guarded(job, leaner)
        for job in jobs.values():
            job.spend("decode", time.perf_counter() - begun_s)
        return decoded

    def _decode_leaner(self, loaded: Loaded, trajectory: Trajectory, *, into: list[tuple[Trajectory, Tensor]]) -> None:
        busy = {self._jobs[t.job_id].drawing.checkpoint for t in self._live.values()}
        into.append(self._decoder.decode_leaner(loaded, trajectory, job=self._jobs[trajectory.job_id], busy=busy))

    # -- leaving, for better or worse

    def _end(self, job: Job) -> None:
        now_s = time.perf_counter()
        del self._jobs[job.drawing.job_id]
        decode_s = job.timings_s.get("decode", 0.0)
        job.timings_s["denoise"] = max(0.0, now_s - (job.denoise_begun_s or now_s) - decode_s)
        job.timings_s["total"] = now_s - job.begun_s
        self._events.append(
            JobDone(
                job_id=job.drawing.job_id,
                timings_s=dict(job.timings_s),
                tokens=job.tokens,
                warnings=tuple(job.warnings),
                rungs=tuple(job.rungs),
                device=self._device.kind,
                dtype=self._residency.told(job.drawing.checkpoint)[0],
            )
        )

    def _fail(self, job: Job, error: SdfleetError) -> None:
        self._jobs.pop(job.drawing.job_id, None)
        for trajectory in [t for t in self._live.values() if t.job_id == job.drawing.job_id]:
            self._leave(trajectory)
        self._events.append(JobFailed(job_id=job.drawing.job_id, error=error))

    def _leave(self, trajectory: Trajectory) -> None:
        self._live.pop(trajectory.id, None)
        self._keys.pop(trajectory.id, None)
        self._batch = None

    def _guarded(self, job: Job | None, action: Callable[[], None]) -> None:
        """Do something for one job; if it fails, that job fails and no other."""
        if job is None:
            return
        try:
            with out_of_memory_as_ours():
                action()
        except SdfleetError as exc:
            self._fail(job, exc)
        except Exception as exc:  # noqa: BLE001 - one bad row must fail alone, whatever is wrong with it
            self._fail(job, _as_ours(exc, job))

    def _isolate(self, batch: StepBatch, exc: Exception) -> None:
        """A call failed for a reason that is not memory: each of its pictures is tried alone, the guilty fail."""
        if len(batch.trajectories) == 1:
            job = self._jobs[batch.trajectories[0].job_id]
            self._fail(job, exc if isinstance(exc, SdfleetError) else _as_ours(exc, job))
            return
        log.warning("a batch failed, its pictures step alone once", extra={"pictures": len(batch.trajectories)})
        for trajectory in batch.trajectories:
            job_now = self._jobs.get(trajectory.job_id)
            if job_now is None:
                continue
            drawing = job_now.drawing
            family = self._loaded_of(trajectory).family
            size_px = (drawing.height_px, drawing.width_px)
            alone = StepBatch(family, [trajectory], size_px=size_px, loras=drawing.loras)
            self._guarded(job_now, alone.step)
            if job_now.drawing.job_id in self._jobs:
                self._report(alone, self._loaded_of(trajectory))
                self._finish([trajectory] if trajectory.is_finished else [])

    def _make_room(self, batch: StepBatch, loaded: Loaded, exc: OutOfMemory) -> None:
        """The next rung after an out-of-memory; the same step is tried again in the next turn, from where it was."""
        self._batch = None
        self._device.release_cached()
        jobs = {t.job_id: self._jobs[t.job_id] for t in batch.trajectories}
        busy = {self._jobs[t.job_id].drawing.checkpoint for t in self._live.values()}
        rungs: list[tuple[Rung, Callable[[], bool]]] = [
            ("fewer_rows", lambda: self._fewer_rows(batch, loaded)),
            ("drop_idle_components", lambda: self._residency.drop_idle(busy=busy)),
            ("offload_text_encoders", lambda: self._residency.offload_text_encoders(loaded)),
            ("offload_all", lambda: self._residency.offload_all(loaded, "denoise")),
            ("offload_layers", lambda: self._residency.offload_layers(loaded, "denoise")),
        ]
        for rung, gives_up in rungs:
            if gives_up():
                log.warning("out of memory, next rung", extra={"rung": rung, "rows": batch.n_rows})
                for job in jobs.values():
                    job.climb(rung)
                return
        for job in jobs.values():
            if not self._restart_smaller(job):
                self._fail(job, exc)

    def _fewer_rows(self, batch: StepBatch, loaded: Loaded) -> bool:
        if len(batch.trajectories) == 1:
            return False
        loaded.row_caps[self._keys[batch.trajectories[0].id]] = max(2, batch.n_rows // 2)
        return True

    def _restart_smaller(self, job: Job) -> bool:
        """Draw a job again at three quarters of its sides and resize the picture, if its request allows that."""
        drawing = job.drawing
        multiple = self._residency.get(drawing.checkpoint).family.side_multiple_px
        width_px, height_px = (
            int(side * _SMALLER_SIDE) // multiple * multiple for side in (drawing.width_px, drawing.height_px)
        )
        if not drawing.allow_degraded or drawing.image is not None or min(width_px, height_px) < _SMALLEST_SIDE_PX:
            return False
        for trajectory in [t for t in self._live.values() if t.job_id == drawing.job_id]:
            self._leave(trajectory)
        job.drawing = replace(
            drawing,
            width_px=width_px,
            height_px=height_px,
            resize_to=drawing.resize_to or (drawing.width_px, drawing.height_px),
        )
        job.warnings.append(
            f"memory ran out: drawn at {width_px}x{height_px} and resized, as the request allows (allow_degraded)"
        )
        job.climb("smaller_picture")
        job.n_evaluations = job.n_evaluated = 0
        job.left = drawing.n_images
        self._pending.append(job)
        return True

    def _loaded_of(self, trajectory: Trajectory) -> Loaded:
        return self._residency.get(self._jobs[trajectory.job_id].drawing.checkpoint)


def _as_ours(exc: Exception, job: Job) -> EngineFailed:
    log.error("a picture failed", extra={"job_id": job.drawing.job_id}, exc_info=exc)
    first_line = (str(exc).strip().splitlines() or [""])[0][:200]
    return EngineFailed(f"the engine failed while drawing: {type(exc).__name__}: {first_line}")
