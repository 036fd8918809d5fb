"""Pictures that are streamed in OpenAI's way: previews while they are drawn, then each finished one, as events.

Nothing but the events that OpenAI's own types know is sent: the SDKs take any other for a partial picture. Signs of
life are comments, which every reader skips.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import anyio
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sdfleet.api.answering import house_of, out_of_time, staying, succeeded
from sdfleet.api.dialect import printable
from sdfleet.api.openai_wire import Asked, Usage, usage
from sdfleet.domain import Job, JobEvent, Output, Picture, Progress, Submission
from sdfleet.errors import SdfleetError
from sdfleet.storage import pictures

Kind = Literal["image_generation", "image_edit"]

# Proxies cut a silent connection after 30 to 60 s.
HEARTBEAT_S = 10.0
_HEARTBEAT = b": still drawing\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """How a job is told. notes: warnings of the dialect. fault_of: the body of the answer to a fault."""

    asked: Asked
    submission: Submission
    notes: Sequence[str]
    kind: Kind
    fault_of: Callable[[SdfleetError], bytes]


class EventStream(StreamingResponse):
    """Server-sent events. When the reader leaves, or the server stops, what makes the events is closed at once."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        self._events = _with_heartbeats(events)
        # No proxy may keep the events back until there are enough of them.
        told = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._events, media_type="text/event-stream", headers=told)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _with_heartbeats(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    coming: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(_next(events))
            done, _ = await asyncio.wait({coming}, timeout=HEARTBEAT_S)
            if not done:
                yield _HEARTBEAT
                continue
            event, coming = coming.result(), None
            if event is None:
                return
            yield event
    finally:
        # Starlette cancels every await in its scope again and again once the reader has left.
        with anyio.CancelScope(shield=True):
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
            await events.aclose()


async def _next(events: AsyncGenerator[bytes]) -> bytes | None:
    return await anext(events, None)


async def told(request: Request, job: Job, telling: Telling) -> AsyncGenerator[bytes]:
    """The job as events, until it has ended: a comment at once, previews, a completed event per picture; or its error.

    A reader who leaves before takes the job along, see `answering.staying`.
    """
    desk = house_of(request).desk
    try:
        async with staying(request, job):
            # The status line and these bytes go out before the drawing begins, so that every proxy knows we live.
            yield f": job {job.id}\n\n".encode()
            previews = _Previews(n_wanted=telling.asked.partial_images)
            async with contextlib.aclosing(desk.watch(job.id, previews=previews.n_wanted > 0)) as events:
                async for event in _until_deadline(request, job, events):
                    progress = event.progress
                    index = None if progress is None else previews.index_of(progress)
                    if progress is not None and progress.preview is not None and index is not None:
                        yield await _partial(job, telling, progress, progress.preview, index=index)
            done = succeeded(await desk.wait(job.id))
            # A withheld picture has no event of its own, for want of one that the SDKs know: the others' warnings tell.
            for output in done.outputs:
                yield await _completed(request, done, telling, output)
    except SdfleetError as exc:
        yield b"data: " + telling.fault_of(exc) + b"\n\n"


async def _until_deadline(request: Request, job: Job, events: AsyncGenerator[JobEvent]) -> AsyncGenerator[JobEvent]:
    """The events, for as long as a route may take. Raises DeadlineExceeded."""
    house = house_of(request)
    limit_s = house.settings.request_timeout_s
    end_s = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
    while True:
        try:
            async with asyncio.timeout_at(end_s):
                event = await anext(events, None)
        except TimeoutError as exc:
            raise await out_of_time(request, job) from exc
        if event is None:
            return
        yield event


class _Previews:
    """Which steps are shown: as many of each picture as are wanted, evenly spread."""

    def __init__(self, *, n_wanted: int) -> None:
        self.n_wanted = n_wanted
        self._n_due: Counter[int] = Counter()
        self._n_sent: Counter[int] = Counter()

    def index_of(self, progress: Progress) -> int | None:
        """The `partial_image_index` under which this step is to be shown; None if it is not. Ask once for each step."""
        n_due = sum(step <= progress.step for step in preview_steps(progress.n_steps, n_wanted=self.n_wanted))
        if progress.preview is None or n_due <= self._n_due[progress.image_index]:
            return None
        self._n_due[progress.image_index] = n_due
        self._n_sent[progress.image_index] += 1
        return self._n_sent[progress.image_index] - 1


def preview_steps(n_steps: int, *, n_wanted: int) -> tuple[int, ...]:
    """The steps after which a preview is due; the last step is none of them, after it comes the picture.

    >>> preview_steps(20, n_wanted=3), preview_steps(20, n_wanted=1), preview_steps(2, n_wanted=3)
    ((5, 10, 15), (10,), (1,))
    """
    steps = {-(-n_steps * i // (n_wanted + 1)) for i in range(1, n_wanted + 1)}
    return tuple(sorted(step for step in steps if 0 < step < n_steps))


async def _partial(job: Job, telling: Telling, progress: Progress, preview: Picture, *, index: int) -> bytes:
    facts = {
        **_facts(job, telling),
        "created_at": int(time.time()),
        "partial_image_index": index,
        "image_index": progress.image_index,
    }
    name = f"{telling.kind}.partial_image"
    return await asyncio.to_thread(lambda: _event(name, facts, _enlarged(preview, job, telling.submission)))


def _enlarged(preview: Picture, job: Job, submission: Submission) -> bytes:
    """The preview as a file of the final picture's size and format."""
    width_px, height_px = _size_px(job)
    # As the finished picture will be: an input picture of another shape is stretched, see `Drawing.resize_to`.
    bring = pictures.resize if submission.request.image is not None else pictures.fit
    picture = bring(preview, width_px=width_px, height_px=height_px)
    return pictures.encode(picture, submission.format, quality=submission.quality)


async def _completed(request: Request, job: Job, telling: Telling, output: Output) -> bytes:
    content = await house_of(request).desk.picture(output)
    is_first = output.index == 0
    facts = {
        **_facts(job, telling),
        "created_at": int(job.finished_s or time.time()),
        # What went in is counted once, so that the sum over all events is the job's.
        "usage": usage_of(telling.submission, [output], has_input=is_first).model_dump(),
        "image_index": output.index,
        "seed": output.seed,
        "safety": output.safety,
        "revised_prompt": job.request.prompt,
        "warnings": [*telling.notes, *job.warnings],
    }
    return await asyncio.to_thread(_event, f"{telling.kind}.completed", facts, content)


def _facts(job: Job, telling: Telling) -> dict[str, Any]:
    """What every event says."""
    facts = {
        "background": "opaque",
        "output_format": telling.submission.format,
        "quality": telling.asked.told_quality,
        "size": size_of(job),
        "job_id": job.id,
        "model": job.request.model,
    }
    if telling.asked.identifier:
        facts["safety_identifier"] = telling.asked.identifier
    return facts


def _event(name: str, facts: Mapping[str, Any], content: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + spliced({"type": name, **facts}, "b64_json", content) + b"\n\n"


def spliced(fields: Mapping[str, Any], name: str, content: bytes) -> bytes:
    """A JSON object with one more field that holds these bytes as base64.

    Put in as bytes: an encoder of JSON would look at each of a million characters that need no escape, and hold up
    every other thread meanwhile.

    >>> spliced({"seed": 7}, "b64_json", b"png")
    b'{"seed": 7, "b64_json": "cG5n"}'
    """
    head = json.dumps(printable(fields)).encode()[:-1]
    return b"".join((head, b', "', name.encode(), b'": "', base64.b64encode(content), b'"}'))


def size_of(job: Job) -> str:
    """The size of the finished pictures, as OpenAI writes it."""
    return "{}x{}".format(*_size_px(job))


def _size_px(job: Job) -> tuple[int, int]:
    if job.outputs:
        return job.outputs[0].width_px, job.outputs[0].height_px
    asked = job.request
    assert asked.width_px is not None  # a job's request has nothing left open
    assert asked.height_px is not None
    return asked.width_px, asked.height_px


def usage_of(submission: Submission, outputs: Sequence[Output], *, has_input: bool = True) -> Usage:
    """What these pictures of a job took in and gave out."""
    asked = submission.request
    return usage(
        texts=(asked.prompt, asked.negative_prompt) if has_input else (),
        images=(asked.image,) if has_input else (),
        sizes=[(output.width_px, output.height_px) for output in outputs],
    )
