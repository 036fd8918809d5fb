"""How a node gets a job's input pictures from its router: in chunks, hashed, with patience where that is away."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

from sdfleet.domain import ImageRequest, Picture
from sdfleet.errors import NotReady
from sdfleet.fleet.messages import BlobPart, PictureBlob, WantBlob
from sdfleet.fleet.packing import BrokenMessage, pack, unpack
from sdfleet.fleet.shipping import sha256_of
from sdfleet.fleet.subjects import up
from sdfleet.fleet.task import Task
from sdfleet.fleet.transport import Bus, NoAnswer

FETCH_TIMEOUT_S = 10.0
FETCH_PATIENCE_S = 120.0
_AGAIN_S = 1.0


async def with_pictures(job: Task, *, node: str, bus: Bus) -> ImageRequest:
    """The job's request, whole. Raises NotReady (a picture was not to be had, or is damaged), JobCancelled."""
    run = job.run
    image = None if run.image is None else await _fetched(job, run.image, node=node, bus=bus)
    mask = None if run.mask is None else await _fetched(job, run.mask, node=node, bus=bus)
    return replace(run.request, image=image, mask=mask)


async def _fetched(job: Task, blob: PictureBlob, *, node: str, bus: Bus) -> Picture:
    run, data = job.run, bytearray()
    end_s = asyncio.get_running_loop().time() + FETCH_PATIENCE_S
    while len(data) < blob.n_bytes:
        job.check()
        want = WantBlob(job=run.job, lease=run.lease, sha256=blob.sha256, offset=len(data))
        try:
            answer = await bus.request(up(node, "blob"), pack(want), timeout_s=FETCH_TIMEOUT_S)
            part = unpack(BlobPart, answer.data)
        except (NoAnswer, BrokenMessage) as exc:
            if asyncio.get_running_loop().time() > end_s:
                raise NotReady(
                    f"an input picture of job {run.job} could not be fetched: {exc}", retry_after_s=1.0
                ) from exc
            with suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S):
                    await job.stop.wait()
            continue
        if not part.data:
            raise NotReady(f"an input picture of job {run.job} was not given: {part.why}", retry_after_s=1.0)
        data += part.data
    if len(data) != blob.n_bytes or await asyncio.to_thread(sha256_of, data) != blob.sha256:
        raise NotReady(f"an input picture of job {run.job} arrived damaged", retry_after_s=1.0)
    return Picture(width_px=blob.width_px, height_px=blob.height_px, mode=blob.mode, data=bytes(data))
