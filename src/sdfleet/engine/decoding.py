"""From finished latents to pictures and to what a safety checker says of them, giving up more and more memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from sdfleet.domain import JobId, Picture, SafetyVerdict
from sdfleet.engine.devices import Device, out_of_memory_as_ours
from sdfleet.engine.job import Job
from sdfleet.engine.memory import Rung
from sdfleet.engine.residency import DeviceResidency, Loaded
from sdfleet.engine.trajectory import Trajectory
from sdfleet.errors import OutOfMemory


class Decoder:
    """Decodes on one device, for one engine."""

    def __init__(self, device: Device, residency: DeviceResidency) -> None:
        self._device = device
        self._residency = residency

    def decode(
        self, loaded: Loaded, group: Sequence[Trajectory], *, jobs: Mapping[JobId, Job]
    ) -> list[tuple[Trajectory, Tensor]]:
        """Pictures [3, H, W] of a group, all in one call. Raises OutOfMemory."""
        with torch.inference_mode(), out_of_memory_as_ours():
            was_upcast = loaded.family.vae.upcast
            images = loaded.family.decode(torch.cat([t.latents for t in group]), tiled=loaded.tile_vae)
            if loaded.family.vae.upcast and not was_upcast:
                for trajectory in group:
                    jobs[trajectory.job_id].warnings.append("the VAE overflowed and was run in float32")
        return list(zip(group, images, strict=True))

    def decode_leaner(
        self, loaded: Loaded, trajectory: Trajectory, *, job: Job, busy: Collection[str]
    ) -> tuple[Trajectory, Tensor]:
        """One picture [3, H, W], giving up more and more for it; `job` is told what.

        busy: checkpoints with pictures in the making, which stay. Raises OutOfMemory when nothing is left to give up.
        """
        rungs: list[tuple[Rung, Callable[[], bool]]] = [
            ("fewer_rows", lambda: True),
            ("drop_idle_components", lambda: self._residency.drop_idle(busy=busy)),
            ("tile_vae", lambda: _tile(loaded)),
            ("offload_text_encoders", lambda: self._residency.offload_text_encoders(loaded)),
            ("offload_all", lambda: self._residency.offload_all(loaded, "decode")),
        ]
        for rung, gives_up in rungs:
            if not gives_up():
                continue
            try:
                (decoded,) = self.decode(loaded, [trajectory], jobs={trajectory.job_id: job})
            except OutOfMemory:
                continue
            if rung != "fewer_rows":
                job.climb(rung)
            return decoded
        raise OutOfMemory(
            "the picture is drawn but there is no memory to decode it", hint="ask for a smaller size, or use mode eco"
        )

    def check(
        self, loaded: Loaded, pictures: Mapping[int, Picture], *, job: Job, into: dict[int, SafetyVerdict]
    ) -> None:
        """Put what the checkpoint's safety checker says of a job's pictures into `into`, by the same numbers."""
        with job.timed("decode"):
            checker = loaded.family.components.use("safety_checker")
            try:
                with out_of_memory_as_ours():
                    flags = checker.flags(list(pictures.values()))
            except OutOfMemory:
                self._device.release_cached()
                self._residency.offload_text_encoders(loaded)
                flags = [flag for picture in pictures.values() for flag in checker.flags([picture])]
        into.update({i: "flagged" if is_flagged else "passed" for i, is_flagged in zip(pictures, flags, strict=True)})


def _tile(loaded: Loaded) -> bool:
    was, loaded.tile_vae = loaded.tile_vae, True
    return not was
