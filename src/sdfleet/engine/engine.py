"""The loop: pictures from many jobs, one step at a time, together.

One turn (`Engine.step`) reads top to bottom:

    1. cancelled jobs leave
    2. new jobs are prepared: checkpoint, prompts, first latents; their pictures join
    3. the batcher says who steps together; one network call moves them all
    4. finished pictures are decoded and leave
    5. with nothing to draw, another executor is tried, a call a turn

Every call of torch happens on the thread that calls `step`. A second thread would slow the whole process on a CPU.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sdfleet.domain import Drawing, FinishedPicture, JobId, Progress
from sdfleet.engine.batcher import Batcher, Candidate
from sdfleet.engine.devices import StepClock, choose_device, out_of_memory_as_ours
from sdfleet.engine.events import EngineOptions, Event, JobDone, JobFailed, PictureDone
from sdfleet.engine.executors import is_of
from sdfleet.engine.job import Job
from sdfleet.engine.memory import Rung
from sdfleet.engine.pixels import fitted, resized, to_picture
from sdfleet.engine.residency import DeviceResidency, Loaded
from sdfleet.engine.samplers import make_sampler
from sdfleet.engine.step_batch import StepBatch, shares_step
from sdfleet.engine.step_cache import Forecast, left_out
from sdfleet.engine.trajectory import Trajectory, first_latents
from sdfleet.errors import EngineFailed, JobCancelled, OutOfMemory, SdfleetError

log = logging.getLogger(__name__)

_SEEDS = 2**64
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
        self._device = choose_device(options.device, options.dtype, options.weights)
        self._residency = DeviceResidency(self._device, options)
        self._batcher = Batcher(max_rows=options.max_rows)
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
        return not (self._has_work or self._residency.has_chore)

    def facts(self) -> Mapping[str, object]:
        """The device, its formats, and what is on it now."""
        return {
            "device": self._device.kind,
            "dtype": self._device.dtype_name,
            "dtype_reason": self._device.why,
            "weights": "fp8" if self._device.keeps_fp8 else self._device.dtype_name,
            "threads": torch.get_num_threads(),
            "checkpoints": list(self._residency.checkpoints),
            "resident_bytes": self._residency.resident_bytes(),
            "executors": self._residency.executors.facts(),
            "compiled": self._residency.compiling.facts(),
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

    def step(self) -> list[Event]:
        """One turn, see the top of this file. Answers with what happened; empty when idle."""
        self._n_turns += 1
        for job_id in self._cancelled:
            if job_id in self._jobs:
                self._fail(self._jobs[job_id], JobCancelled("the job was cancelled"))
        self._cancelled.clear()
        self._prepare_pending()
        if self._live:
            self._finish(self._step_together())
        elif not self._has_work and (changed := self._residency.do_chore()) is not None:
            self._batcher.forget(partial(is_of, changed))
        events, self._events = self._events, []
        return events

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
            family = loaded.family
        with job.timed("encode"), torch.inference_mode():
            self._residency.enter(loaded, "encode")
            prompts = family.encode(drawing)
            if drawing.image is not None:
                self._residency.enter(loaded, "decode")
            source = family.source(drawing)
            self._residency.enter(loaded, "denoise")
        job.tokens = prompts.tokens
        warnings = (*prompts.warnings, *self._residency.told(drawing.checkpoint)[1])
        job.warnings += [warning for warning in warnings if warning not in job.warnings]
        from_noise = drawing.task == "txt2img" or (drawing.task == "inpaint" and drawing.strength == 1)
        for index in range(drawing.n_images):
            seed = (drawing.seed + index) % _SEEDS
            generator = torch.Generator().manual_seed(seed)
            sampler = make_sampler(
                drawing.sampler,
                family.schedule,
                n_steps=drawing.steps,
                strength=family.strength(drawing),
                n_latent_tokens=family.n_latent_tokens(drawing),
            )
            start = family.start(drawing, source, generator)
            guessed = left_out(drawing.step_cache, len(sampler.evaluations))
            self._n_made += 1
            trajectory = Trajectory(
                id=self._n_made,
                job_id=drawing.job_id,
                image_index=index,
                seed=seed,
                sampler=sampler,
                generator=generator,
                prompts=prompts,
                guidance=family.guidance_weight(drawing),
                latents=first_latents(sampler, start, from_noise=from_noise),
                blend=start.blend,
                extra=start.extra,
                forecast=Forecast(left_out=guessed, draws_noise=sampler.draws_noise) if guessed else None,
            )
            job.n_evaluations += trajectory.n_calls
            if drawing.step_cache != "off" and not index:
                job.warnings += _told_of_step_cache(drawing, trajectory, already=job.warnings)
            key = shares_step(family, trajectory, checkpoint=drawing.checkpoint)
            if drawing.reproducible:
                key = (*key, drawing.job_id, index)
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
            self._batch = StepBatch(family, chosen, size_px=size_px, fills_up=fills_up)
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
        decoded = self._decode(loaded, finished)
        for trajectory, image in decoded:
            job = self._jobs.get(trajectory.job_id)
            if job is None:  # a sister picture failed, and the job with it
                continue
            self._leave(trajectory)
            picture = to_picture(image)
            if job.drawing.resize_to is not None:
                # An input picture was stretched to what the model draws, so its answer is stretched back.
                bring = fitted if job.drawing.image is None else resized
                picture = bring(picture, *job.drawing.resize_to)
            done = FinishedPicture(picture=picture, seed=trajectory.seed, reproducible=job.drawing.reproducible)
            index = trajectory.image_index
            self._events.append(PictureDone(job_id=trajectory.job_id, image_index=index, finished=done))
            job.left -= 1
            if not job.left:
                self._end(job)

    def _decode(self, loaded: Loaded, finished: Sequence[Trajectory]) -> list[tuple[Trajectory, Tensor]]:
        """Pictures [3, H, W] of a group; when the group cannot be decoded together, one by one, each failing alone."""
        begun_s = time.perf_counter()
        jobs = {t.job_id: self._jobs[t.job_id] for t in finished}
        self._residency.enter(loaded, "decode")
        together = [finished] if not loaded.tile_vae else [[t] for t in finished]
        decoded: list[tuple[Trajectory, Tensor]] = []
        for group in together:
            try:
                decoded += self._decoded(loaded, group)
            except (OutOfMemory, EngineFailed):
                for trajectory in group:
                    leaner = partial(self._decoded_leaner, loaded, trajectory, into=decoded)
                    self._guarded(self._jobs.get(trajectory.job_id), leaner)
        for job in jobs.values():
            job.spend("decode", time.perf_counter() - begun_s)
        return decoded

    def _decoded(self, loaded: Loaded, group: Sequence[Trajectory]) -> list[tuple[Trajectory, Tensor]]:
        with torch.inference_mode(), out_of_memory_as_ours():
            was_upcast = loaded.family.vae.upcast
            images = loaded.family.decode(torch.cat([t.latents for t in group]), tiled=loaded.tile_vae)
            if loaded.family.vae.upcast and not was_upcast:
                for trajectory in group:
                    self._jobs[trajectory.job_id].warnings.append("the VAE overflowed and was run in float32")
        return list(zip(group, images, strict=True))

    def _decoded_leaner(self, loaded: Loaded, trajectory: Trajectory, *, into: list[tuple[Trajectory, Tensor]]) -> None:
        """One picture, giving up more and more for it. Raises OutOfMemory when nothing is left to give up."""
        job = self._jobs[trajectory.job_id]
        busy = {self._jobs[t.job_id].drawing.checkpoint for t in self._live.values()}
        rungs: list[tuple[Rung, Callable[[], bool]]] = [
            ("fewer_rows", lambda: True),
            ("drop_idle_components", lambda: self._residency.drop_idle(busy=busy)),
            ("tile_vae", lambda: self._tile(loaded)),
            ("offload_text_encoders", lambda: self._residency.offload_text_encoders(loaded)),
            ("offload_all", lambda: self._residency.offload_all(loaded, "decode")),
        ]
        for rung, gives_up in rungs:
            if not gives_up():
                continue
            try:
                into += self._decoded(loaded, [trajectory])
            except OutOfMemory:
                continue
            if rung != "fewer_rows":
                job.climb(rung)
            return
        raise OutOfMemory(
            "the picture is drawn but there is no memory to decode it", hint="ask for a smaller size, or use mode eco"
        )

    @staticmethod
    def _tile(loaded: Loaded) -> bool:
        was, loaded.tile_vae = loaded.tile_vae, True
        return not was

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
            alone = StepBatch(family, [trajectory], size_px=(drawing.height_px, drawing.width_px))
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


def _told_of_step_cache(drawing: Drawing, trajectory: Trajectory, *, already: Sequence[str]) -> list[str]:
    n_left_out = trajectory.n_evaluations - trajectory.n_calls
    effect = (
        f"{n_left_out} of {trajectory.n_evaluations} network calls were guessed: the picture differs from the full one"
    )
    if not n_left_out:
        effect = f"{trajectory.n_evaluations} network calls are too few to leave any out"
    told = f"step_cache {drawing.step_cache!r}: {effect}"
    return [] if told in already else [told]


def _as_ours(exc: Exception, job: Job) -> EngineFailed:
    log.error("a picture failed", extra={"job_id": job.drawing.job_id}, exc_info=exc)
    first_line = (str(exc).strip().splitlines() or [""])[0][:200]
    return EngineFailed(f"the engine failed while drawing: {type(exc).__name__}: {first_line}")
