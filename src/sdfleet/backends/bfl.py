"""Black Forest Labs' service: submit, ask how it stands, fetch the picture while it is there. It costs money.

    ordered  POST /v1/<model>            not asked again once it may have arrived (see `orders.py`)
    waited   GET polling_url             until it is ready, refused, failed, or too long under way
    fetched  GET result.sample           good for ten minutes; kept until the job is surely done

What is not known to be final counts as pending. The key goes to the service's own hosts over https and nowhere else.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

from sdfleet.addresses import check_url
from sdfleet.backends.base import BackendState, Capabilities, OnProgress
from sdfleet.backends.bfl_answers import details_of, number_of, object_of, refusal, retry_after_s, seed_of, text_of
from sdfleet.backends.bfl_models import ID, MODELS, Model, body_of
from sdfleet.backends.orders import Order, Orders
from sdfleet.backends.web import Answer, BadAnswer, Lost, Unreachable, Web
from sdfleet.domain import Drawing, FinishedPicture, ImageResult, JobId, Picture, Progress
from sdfleet.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    BrokenPicture,
    CreditsNeeded,
    EngineDied,
    InvalidValue,
    JobCancelled,
    Moderated,
    SdfleetError,
)
from sdfleet.storage import pictures

log = logging.getLogger(__name__)

ENDPOINT = "https://api.bfl.ai"
# Its own, beside the regions' names under it.
DOMAIN = "bfl.ai"
# Tasks of one key that may be under way there.
MOST_ACTIVE = 24
# A task is not always known at once to the host that is asked for it.
UNKNOWN_FOR_S = 10.0
# Faults of the service, and 429 without an end: pauses double from the first to the longest.
N_TRIES = 5
LONGEST_PAUSE_S = 30.0
_MODERATED = {"Request Moderated": "the prompt or an input picture", "Content Moderated": "the picture that it drew"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often and how long. poll_s: between two questions. patience_s: for one picture, from its order on.

    first_pause_s: after a first fault; busy_s: for how long 429 is met with waiting.
    """

    poll_s: float = 0.75
    patience_s: float = 600.0
    first_pause_s: float = 1.0
    busy_s: float = 300.0


@dataclass(slots=True, eq=False)
class _Job:
    """One `generate` that has not ended. stop: set with what it ends with, from outside."""

    stop: asyncio.Future[SdfleetError]
    is_under_way: bool = False


class BflBackend:
    """Draws at Black Forest Labs; see `Backend` for the face. Belongs to one event loop.

    key: of an account there. endpoint: where orders go. models: by the last part of a drawing's checkpoint.
    """

    def __init__(
        self,
        *,
        key: str,
        orders: Orders,
        endpoint: str = ENDPOINT,
        models: Mapping[str, Model] = MODELS,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._key = key
        self._orders = orders
        self._endpoint = endpoint.rstrip("/")
        self._models = models
        self._pace = Pace() if pace is None else pace
        self._clock = clock
        self._place = urlsplit(self._endpoint)
        # An endpoint that somebody has set to an address of their own network leads there on purpose.
        private = not _is_theirs(self._place)
        self._orderer = Web(allow_private=private, keeps=False)
        self._asker = Web(allow_private=private)
        self._jobs: dict[JobId, _Job] = {}
        self._room = asyncio.Semaphore(MOST_ACTIVE)
        self._why_not = ""
        self._is_closed = False

    @property
    def host(self) -> str:
        """Who is sent what is asked for."""
        return self._place.hostname or ""

    def capabilities(self) -> Capabilities:
        n_running = sum(job.is_under_way for job in self._jobs.values())
        state: BackendState = "closed" if self._is_closed else "unavailable" if self._why_not else "ready"
        return Capabilities(
            name=ID,
            state=state,
            reason="the backend was closed" if self._is_closed else self._why_not,
            n_running=n_running,
            n_waiting=len(self._jobs) - n_running,
            facts={"device": self.host},
        )

    async def start(self) -> None:
        self._check_is_open()

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        self._check_is_open()
        if drawing.job_id in self._jobs:
            raise BadRequest(f"job {drawing.job_id} is being drawn already")
        job = self._jobs[drawing.job_id] = _Job(asyncio.get_running_loop().create_future())
        work = asyncio.ensure_future(self._draw(drawing, job, on_progress))
        try:
            await asyncio.wait({work, job.stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise job.stop.result()
        finally:
            del self._jobs[drawing.job_id]
            await _ended(work)

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Nothing: there are no previews."""

    async def cancel(self, job_id: JobId) -> None:
        """Nobody waits for it any more; the service cannot be told, and may charge it."""
        self._stop(job_id, JobCancelled(f"job {job_id} was cancelled", hint="what was ordered may still be charged"))

    async def load(self, drawing: Drawing) -> None:
        """Nothing: the service has its models ready."""

    async def unload(self, checkpoint: str) -> None:
        """Nothing is held here."""

    async def pin(self, checkpoints: Collection[str]) -> None:
        """Nothing is held here."""

    async def close(self) -> None:
        self._is_closed = True
        for job_id in list(self._jobs):
            self._stop(job_id, EngineDied("the backend was closed before the job was done"))
        await self._orderer.close()
        await self._asker.close()

    def _check_is_open(self) -> None:
        if self._is_closed:
            raise EngineDied(f"the backend {ID} is closed")

    def _stop(self, job_id: JobId, error: SdfleetError) -> None:
        job = self._jobs.get(job_id)
        if job is not None and not job.stop.done():
            job.stop.set_result(error)

    # ------------------------------------------------------------------------------------------------------ one job

    async def _draw(self, drawing: Drawing, job: _Job, on_progress: OnProgress | None) -> ImageResult:
        model = self._models[drawing.checkpoint.replace("\\", "/").rpartition("/")[2]]
        begun_s = time.monotonic()
        image, mask = await asyncio.to_thread(lambda: (_as_base64(drawing.image), _as_base64(drawing.mask)))
        tasks = [
            asyncio.create_task(self._picture(_Ordered(drawing, index, model, job, on_progress), image, mask))
            for index in range(drawing.n_images)
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                await _ended(task)
        spent_s = round(time.monotonic() - begun_s, 4)
        drawn, warnings = _as_drawn(drawing, [one.picture for one in found])
        return ImageResult(
            job_id=drawing.job_id,
            model=drawing.checkpoint,
            images=tuple(found),
            drawing=drawn,
            warnings=warnings,
            timings_s={"load": 0.0, "encode": 0.0, "denoise": spent_s, "decode": 0.0, "total": spent_s},
            device=self.host,
            unsaid=model.unsaid,
        )

    async def _picture(self, asked: _Ordered, image: str | None, mask: str | None) -> FinishedPicture:
        drawing, index = asked.drawing, asked.index
        body = body_of(asked.model, drawing, seed=drawing.seed + index, image=image, mask=mask)
        name = drawing.checkpoint.replace("\\", "/").rpartition("/")[2]
        digest = await asyncio.to_thread(_digest, name, body)
        async with self._room:
            asked.job.is_under_way = True
            order = await asyncio.to_thread(self._orders.find, drawing.job_id, index, digest=digest)
            if order is None:
                order = await self._order(asked, name, body, digest=digest)
            elif order.state == "sending":
                await self._drop(asked)
                raise _not_known(f"the server ended while it ordered picture {index} of this job")
            content = None
            if order.state == "fetched":
                content = await asyncio.to_thread(self._orders.kept, drawing.job_id, index)
            if content is None:
                content, order = await self._wait(asked, order)
        try:
            picture = await asyncio.to_thread(_decoded, content, drawing)
        except BrokenPicture as exc:
            await self._drop(asked)
            raise BackendFailed(f"{self.host} sent what is no picture: {exc.message}") from exc
        asked.tell(drawing.steps)
        seed = drawing.seed + index if order.seed is None else order.seed
        return FinishedPicture(picture=picture, seed=seed, reproducible=False, cost_credits=order.cost_credits)

    async def _drop(self, asked: _Ordered) -> None:
        await asyncio.to_thread(self._orders.drop, asked.drawing.job_id, asked.index)

    # ------------------------------------------------------------------------------------------------- to order it

    async def _order(self, asked: _Ordered, name: str, body: Mapping[str, object], *, digest: str) -> Order:
        """The picture ordered, and that noted. Raises what the service refuses it with."""
        job_id, index = asked.drawing.job_id, asked.index
        url = f"{self._endpoint}/v1/{name}"
        sending = await asyncio.to_thread(self._orders.send, job_id, index, digest=digest)
        answer = await self._asked_patiently(lambda: self._submit(url, body, asked))
        if not answer.is_good:
            await self._drop(asked)
            self._refuse(answer)
        self._why_not = ""
        try:
            told = answer.json()
            order = replace(
                sending, state="ordered", ordered_s=self._clock(), id=text_of(told, "id"),
                polling_url=text_of(told, "polling_url"), cost_credits=number_of(told.get("cost")),
            )  # fmt: skip
        except BadAnswer as exc:
            raise _not_known(f"{self.host} took the order and answered what makes no sense: {exc}") from exc
        self._check_may_be_asked(order.polling_url)
        await asyncio.to_thread(self._orders.take, job_id, index, order)
        facts = {"job_id": job_id, "task": order.id, "cost_credits": order.cost_credits}
        log.info("picture ordered", extra={"backend": ID, **facts})
        return order

    async def _submit(self, url: str, body: Mapping[str, object], asked: _Ordered) -> Answer:
        try:
            return await self._orderer.ask("POST", url, headers={"x-key": self._key}, body=body)
        except (Lost, BadAnswer) as exc:
            await self._drop(asked)
            raise _not_known(f"the connection to {self.host} broke while a picture was ordered: {exc}") from exc

    async def _asked_patiently(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer, asked for again while the service has too much to do or a fault, or is not reached."""
        pause_s, n_faults, begun_s = self._pace.first_pause_s, 0, time.monotonic()
        while True:
            why, wait_s = "", pause_s
            try:
                answer = await ask()
            except Unreachable as exc:
                why = f"{self.host} is not reached: {exc}"
            else:
                if answer.status == 429:
                    wait_s = retry_after_s(answer, now_s=self._clock()) or pause_s
                    if time.monotonic() - begun_s + wait_s > self._pace.busy_s:
                        return answer
                    n_faults -= 1  # no fault: it wants fewer at once
                elif answer.status < 500:
                    return answer
            n_faults += 1
            if n_faults >= N_TRIES:
                if why:
                    self._why_not = why
                    raise BackendUnavailable(ID, why, hint="is this machine connected?")
                return answer
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _refuse(self, answer: Answer) -> NoReturn:
        """Raise what an answer that is no 2xx means."""
        error = refusal(answer, host=self.host, now_s=self._clock())
        if isinstance(error, CreditsNeeded | BackendUnavailable):
            self._why_not = error.message
        raise error

    # ------------------------------------------------------------------------------------- to wait for it and fetch it

    async def _wait(self, asked: _Ordered, order: Order) -> tuple[bytes, Order]:
        """The picture's file, and its order with the seed that was used. Raises what the order came to."""
        self._check_may_be_asked(order.polling_url)
        n_expired = 0
        while True:
            result = await self._ready(asked, order)
            order = replace(order, seed=seed_of(result))
            content = await self._fetch(str(result.get("sample") or ""))
            if content is not None:
                await asyncio.to_thread(self._orders.keep, asked.drawing.job_id, asked.index, order, content)
                return content, order
            n_expired += 1
            if n_expired > 1:
                await self._drop(asked)
                raise BackendFailed(
                    f"the address of the picture at {self.host} has run out",
                    hint="it is there for ten minutes and was charged; to order it again, retry the job",
                )

    async def _ready(self, asked: _Ordered, order: Order) -> Mapping[str, object]:
        """What came of the order. Raises Moderated, BackendFailed."""
        while True:
            told = await self._told(order)
            status = told.get("status")
            age_s = self._clock() - order.ordered_s
            if status == "Ready":
                result = told.get("result")
                return result if isinstance(result, dict) else {}
            if isinstance(status, str) and status in _MODERATED:
                await self._drop(asked)
                raise Moderated(f"{self.host} refused {_MODERATED[status]} ({status})", hint="say it in other words")
            if status == "Error" or (status == "Task not found" and age_s > UNKNOWN_FOR_S):
                await self._drop(asked)
                why = "does not know the order any more" if status != "Error" else f"met a fault: {details_of(told)}"
                raise BackendFailed(f"{self.host} {why}", hint="retry the job to order it again")
            if age_s > self._pace.patience_s:
                # Not dropped: a retry asks for this one again before it orders another.
                raise BackendFailed(
                    f"the picture was not ready at {self.host} after {age_s:.0f} s (it says {str(status)[:40]!r})",
                    hint="retry the job to look again; it is not ordered twice",
                )
            done = number_of(told.get("progress"))
            if done is not None and 0 < done <= 1:
                asked.tell(max(1, min(asked.drawing.steps - 1, int(done * asked.drawing.steps))))
            await asyncio.sleep(self._pace.poll_s)

    async def _told(self, order: Order) -> Mapping[str, object]:
        """What the service says of an order; what cannot be made out counts as pending."""
        try:
            answer = await self._asker.ask("GET", order.polling_url, headers={"x-key": self._key})
            if answer.status in {401, 403}:
                self._refuse(answer)
            if answer.status == 404:
                return {"status": "Task not found", **object_of(answer)}
            return answer.json() if answer.is_good else {"status": f"{answer.status}"}
        except (Unreachable, Lost, BadAnswer) as exc:
            log.info("asking for a picture again", extra={"backend": ID, "task": order.id, "why": str(exc)[:200]})
            return {"status": "not reached"}

    async def _fetch(self, url: str) -> bytes | None:
        """The file behind the address, or None when that has run out. Raises BackendFailed."""
        theirs = self._place.scheme == "https"
        try:
            parts = check_url("result.sample", url, allow_private=not theirs)
        except InvalidValue as exc:
            raise BackendFailed(f"{self.host} named no address for the picture: {exc.message}") from exc
        if theirs and parts.scheme != "https":
            raise BackendFailed(f"{self.host} named an address for the picture that is not https")
        web, why = Web(allow_private=not theirs), ""
        try:
            for attempt in range(N_TRIES):
                if attempt:
                    await asyncio.sleep(min(LONGEST_PAUSE_S, self._pace.first_pause_s * 2 ** (attempt - 1)))
                try:
                    answer = await web.ask("GET", url, max_bytes=pictures.MAX_FILE_BYTES)
                except (Unreachable, Lost) as exc:
                    why = str(exc)
                    continue
                except BadAnswer as exc:
                    raise BackendFailed(f"the picture from {parts.hostname} cannot be taken: {exc}") from exc
                if answer.is_good:
                    return answer.body
                if 300 <= answer.status < 400:
                    raise BackendFailed(f"{parts.hostname} leads elsewhere for the picture, which is not followed")
                if answer.status < 500 and answer.status != 429:
                    return None
                why = f"answered {answer.status}"
        finally:
            await web.close()
        raise BackendFailed(
            f"the picture could not be fetched from {parts.hostname}: {why}",
            hint="retry the job soon: it is kept there for ten minutes and not ordered twice",
        )

    def _check_may_be_asked(self, url: str) -> None:
        """Raise BackendFailed for an address that must not get the key."""
        try:
            parts = check_url("polling_url", url, allow_private=True)
        except InvalidValue as exc:
            raise _not_known(f"{self.host} named no address to ask at: {exc.message}") from exc
        is_same = (parts.scheme, parts.hostname, parts.port) == (
            self._place.scheme,
            self._place.hostname,
            self._place.port,
        )
        if not (is_same or (parts.scheme == "https" and _is_theirs(parts))):
            raise _not_known(f"{self.host} wants to be asked at {parts.hostname}, which is not its own")


@dataclass(slots=True, eq=False)
class _Ordered:
    """One picture of a job that is drawn. told: the last step its caller heard of."""

    drawing: Drawing
    index: int
    model: Model
    job: _Job
    on_progress: OnProgress | None
    told: int = 0

    def tell(self, step: int) -> None:
        """Say how far it is; a picture that comes at once had a first step too."""
        if self.on_progress is None:
            return
        steps = [1, step] if self.told == 0 and step > 1 else [step]
        for each in steps:
            if each > self.told:
                self.told = each
                self.on_progress(
                    Progress(job_id=self.drawing.job_id, image_index=self.index, step=each, n_steps=self.drawing.steps)
                )


def _not_known(what: str) -> BackendFailed:
    return BackendFailed(
        f"{what}; whether it was charged is not known",
        hint="look at https://dashboard.bfl.ai; it is not ordered again unless you retry the job",
    )


def _is_theirs(parts: SplitResult) -> bool:
    host = (parts.hostname or "").rstrip(".")
    return host == DOMAIN or host.endswith(f".{DOMAIN}")


async def _ended(task: asyncio.Task[object] | asyncio.Future[object]) -> None:
    """Have a task end, whatever it ends with."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, SdfleetError):
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def _as_base64(picture: Picture | None) -> str | None:
    return None if picture is None else base64.b64encode(pictures.encode(picture, "png")).decode()


def _digest(name: str, body: Mapping[str, object]) -> str:
    return hashlib.sha256(f"{name}\n{json.dumps(body, sort_keys=True)}".encode("utf-8", "surrogatepass")).hexdigest()


def _decoded(content: bytes, drawing: Drawing) -> Picture:
    picture = pictures.decode(content)
    if drawing.resize_to is None:
        return picture
    return pictures.resize(picture, width_px=drawing.resize_to[0], height_px=drawing.resize_to[1])


def _as_drawn(drawing: Drawing, found: Collection[Picture]) -> tuple[Drawing, tuple[str, ...]]:
    """The drawing with the size that came, and what to tell where that is another."""
    sizes = {(picture.width_px, picture.height_px) for picture in found}
    if drawing.resize_to is not None or sizes <= {(drawing.width_px, drawing.height_px)}:
        return drawing, ()
    width_px, height_px = max(sizes)
    asked = f"{drawing.width_px}x{drawing.height_px}"
    told = f"the service drew {width_px}x{height_px} where {asked} was asked for"
    return replace(drawing, width_px=width_px, height_px=height_px), (told,)
