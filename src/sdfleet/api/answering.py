"""From a submission to an answer: the way every route that makes pictures goes.

    checked (right, rate) -> joined to the job it repeats, or accepted as a new one -> awaited, unless the caller leaves

A repeat is told by `Idempotency-Key`; or, since OpenAI's SDKs send none, by their retry counter: the same caller asking
for exactly the same again, while the first job lives or has just ended, is given that job.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sdfleet.api import access
from sdfleet.compose import House
from sdfleet.domain import Idempotency, Job, JobId, OwnerId, Submission
from sdfleet.errors import DeadlineExceeded, EngineFailed, InvalidValue, SdfleetError, SwitchedOff, from_wire
from sdfleet.storage.switches import SwitchBoard

MAX_IDEMPOTENCY_KEY_CHARS = 255
# A client that says it repeats lost requests is given this long to come back before its job is cancelled.
RETURN_WITHIN_S = 15.0
# How long an ended job still answers a repeat: the SDKs wait at most 8 s between tries, with their time-outs 600 s.
REMEMBERED_S = 120.0
MAX_REMEMBERED = 10_000
_PIECE_BYTES = 2**18
RETRY_COUNT = "x-stainless-retry-count"


class Waiting:
    """Who waits for which job, and which request made it; kept by the app, in memory only."""

    def __init__(self) -> None:
        self.n_waiting: Counter[JobId] = Counter()
        self._made: OrderedDict[tuple[OwnerId, str], tuple[JobId, float]] = OrderedDict()

    def remember(self, submission: Submission, fingerprint: str, job_id: JobId) -> None:
        """Note which job a request became."""
        self._made[submission.caller.owner, fingerprint] = (job_id, time.monotonic())
        while len(self._made) > MAX_REMEMBERED:
            self._made.popitem(last=False)

    def find(self, submission: Submission, fingerprint: str) -> JobId | None:
        """The job of the same request of the same owner, if it was made lately."""
        found = self._made.get((submission.caller.owner, fingerprint))
        return None if found is None else found[0]

    def forget_soon(self, job_id: JobId) -> None:
        """The job has ended: forget requests that ended long ago."""
        now_s = time.monotonic()
        for key, (made, _) in list(self._made.items())[:100]:
            if made == job_id:
                self._made[key] = (made, now_s)
            elif now_s - self._made[key][1] > REMEMBERED_S and not self.n_waiting[made]:
                del self._made[key]


async def submit(request: Request, submission: Submission) -> Job:
    """The job of a submission, in the store for good when this returns.

    Raises NotAllowed, SwitchedOff, RateLimited, QueueFull, Conflict, ShuttingDown, and a BadRequest for what cannot be
    drawn.
    """
    house, waiting = house_of(request), waiting_of(request)
    access.check_right(submission.caller, "generate")
    switches: SwitchBoard = request.app.state.switches
    if not switches.now.image_generation:
        raise SwitchedOff("image generation is disabled on this server", hint="it is switched on at /dashboard")
    access.check_filter(submission, of_server=house.settings.safety_checker)
    limit: access.RateLimit = request.app.state.rate_limit
    limit.take(submission.caller.owner, now_s=access.now_s(), per_minute=submission.caller.rate_per_minute)
    submission = replace(submission, traceparent=_traceparent(request))
    print_of = await asyncio.to_thread(fingerprint, submission)
    key = request.headers.get("idempotency-key")
    if key is not None:
        submission = replace(submission, idempotency=Idempotency(key=_checked(key), fingerprint=print_of))
    elif _is_repeat(request) and (made := waiting.find(submission, print_of)) is not None:
        status = await house.desk.status(made, owner=submission.caller.owner)
        if not status.job.has_ended or status.job.state == "done":
            return status.job
    job = await house.desk.submit(submission)
    waiting.remember(submission, print_of, job.id)
    return job


async def submit_and_wait(request: Request, submission: Submission) -> Job:
    """The job of a submission, done. Raises what `submit` raises, NotReady, DeadlineExceeded, and the job's own error.

    When the caller leaves before, and nobody else waits for the job, it is cancelled (SD_CANCEL_ON_DISCONNECT).
    """
    house_of(request).readiness.check()
    return succeeded(await wait(request, await submit(request, submission)))


async def wait(request: Request, job: Job) -> Job:
    """The job, ended. Raises DeadlineExceeded, see `out_of_time`."""
    house = house_of(request)
    async with staying(request, job):
        ending = asyncio.ensure_future(house.desk.wait(job.id))
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait(
                {ending, leaving}, timeout=house.settings.request_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if ending.done():
                return ending.result()
            if leaving.done():
                raise ClientLeft
            raise await out_of_time(request, job)
        finally:
            for task in (ending, leaving):
                task.cancel()
            await asyncio.wait({ending, leaving})


async def out_of_time(request: Request, job: Job) -> DeadlineExceeded:
    """What to raise when a caller has waited SD_REQUEST_TIMEOUT_S; the job is cancelled unless others wait for it."""
    house = house_of(request)
    if waiting_of(request).n_waiting[job.id] <= 1:
        await house.desk.cancel(job.id)
    return DeadlineExceeded(
        f"job {job.id} was not done after {house.settings.request_timeout_s:g} s",
        hint="ask with POST /api/jobs, which does not wait",
    )


@contextlib.asynccontextmanager
async def staying(request: Request, job: Job) -> AsyncIterator[None]:
    """While inside, a caller waits for the job; a caller who is torn away takes it along if nobody else waits."""
    house, waiting = house_of(request), waiting_of(request)
    waiting.n_waiting[job.id] += 1
    has_left = True
    try:
        yield
        has_left = False
    except ClientLeft:
        raise
    except SdfleetError:
        has_left = False
        raise
    finally:
        waiting.n_waiting[job.id] -= 1
        if not waiting.n_waiting[job.id]:
            del waiting.n_waiting[job.id]
        waiting.forget_soon(job.id)
        if has_left and house.settings.cancel_on_disconnect:
            # Not awaited: this task is being torn down with its connection.
            request.app.state.background(_cancel_unless_joined(request, job.id))


async def _cancel_unless_joined(request: Request, job_id: JobId) -> None:
    house, waiting = house_of(request), waiting_of(request)
    if RETRY_COUNT in request.headers:
        # The SDK's retry joins the job within this time, see `submit`.
        with contextlib.suppress(SdfleetError):
            await house.desk.wait(job_id, deadline_s=RETURN_WITHIN_S)
    if not waiting.n_waiting[job_id]:
        with contextlib.suppress(SdfleetError):  # it ended, or was pruned, in the meantime
            await house.desk.cancel(job_id)


class ClientLeft(Exception):
    """The connection is gone; whatever is answered reaches nobody."""


async def _left(request: Request) -> None:
    """Return when the caller has closed the connection."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def succeeded(job: Job) -> Job:
    """The job, if it is done. Raises its error otherwise."""
    if job.state == "done":
        return job
    raise failure(job)


def failure(job: Job) -> SdfleetError:
    """Why a job has no pictures."""
    if job.error is None:
        return EngineFailed(f"job {job.id} is {job.state}")
    return from_wire(dict(job.error))


class WithheldAnswer(BaseModel):
    """A picture that was drawn, and is not given out because the model's safety checker flagged it."""

    index: int
    seed: int
    reason: str = "flagged"


def withheld_of(job: Job) -> list[WithheldAnswer]:
    """The pictures that a job drew and does not give out."""
    return [WithheldAnswer(index=one.index, seed=one.seed) for one in job.withheld]


class LargeResponse(Response):
    """A long body in pieces: others are served between them, and no more is copied than the reader takes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytes(self.body)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for at in range(0, len(body), _PIECE_BYTES):
            piece = body[at : at + _PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def as_json(answer: BaseModel) -> Response:
    """An answer with pictures in it as JSON, written in a worker thread: that takes milliseconds per megabyte."""
    body = await asyncio.to_thread(lambda: answer.model_dump_json().encode())
    return LargeResponse(body, media_type="application/json")


def fingerprint(submission: Submission) -> str:
    """A hash of everything that is asked for: the same for two requests that mean the same. It reads all pictures."""
    digest = hashlib.sha256()
    for name in ("request", "dialect", "format", "quality", "priority", "deadline_s"):
        _feed(digest, getattr(submission, name))
    return digest.hexdigest()


def _feed(digest: Any, value: object) -> None:
    if isinstance(value, bytes):
        digest.update(len(value).to_bytes(8, "big") + value)
    elif is_dataclass(value):
        for each in fields(value):
            digest.update(each.name.encode() + b"=")
            _feed(digest, getattr(value, each.name))
    else:
        digest.update(repr(value).encode("utf-8", "backslashreplace") + b";")


def _is_repeat(request: Request) -> bool:
    count = request.headers.get(RETRY_COUNT, "0")
    return count.isascii() and count.isdigit() and int(count[:6]) > 0


def _traceparent(request: Request) -> str:
    """The caller's trace, if it names one as W3C Trace Context has it."""
    given = request.headers.get("traceparent", "")
    return given if re.fullmatch(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", given) else ""


def _checked(key: str) -> str:
    if not 0 < len(key) <= MAX_IDEMPOTENCY_KEY_CHARS or not key.isprintable():
        raise InvalidValue("Idempotency-Key", f"it is not 1 to {MAX_IDEMPOTENCY_KEY_CHARS} printable characters")
    return key


def house_of(request: Request) -> House:
    """What the server is made of."""
    house: House = request.app.state.house
    return house


def waiting_of(request: Request) -> Waiting:
    """Who waits for which job."""
    waiting: Waiting = request.app.state.waiting
    return waiting
