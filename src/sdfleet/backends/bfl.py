"""Black Forest Labs' service: submit, ask how it stands, fetch the picture while it is there. It costs money.

    ordered  POST /v1/<model>            not asked again once it may have arrived (see `orders.py`)
    waited   GET polling_url             until it is ready, refused, failed, or too long under way
    fetched  GET result.sample           good for ten minutes; kept until the job is surely done

What is not known to be final counts as pending. The key goes to the service's own hosts over https and nowhere else.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

from sdfleet.addresses import check_url
from sdfleet.backends.base import BackendState, Capabilities, OnProgress
from sdfleet.backends.bfl_answers import details_of, number_of, object_of, refusal, retry_after_s, seed_of, text_of
from sdfleet.backends.bfl_models import ID, MODELS, Model, body_of
from sdfleet.backends.errands import Errands, ended
from sdfleet.backends.orders import Order, Orders
from sdfleet.backends.sent_pictures import Asked, as_asked, as_base64, as_result, model_of
from sdfleet.backends.web import Answer, BadAnswer, Lost, Unreachable, Web
from sdfleet.domain import Drawing, FinishedPicture, ImageResult, JobId
from sdfleet.errors import (
    BackendFailed,
    BackendUnavailable,
    BrokenPicture,
    CreditsNeeded,
    InvalidValue,
    JobCancelled,
    Moderated,
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
        self._errands = Errands(ID)
        self._n_under_way = 0
        self._room = asyncio.Semaphore(MOST_ACTIVE)
        self._why_not = ""

    @property
    def host(self) -> str:
        """Who is sent what is asked for."""
        return self._place.hostname or ""

    def capabilities(self) -> Capabilities:
        is_closed = self._errands.is_closed
        state: BackendState = "closed" if is_closed else "unavailable" if self._why_not else "ready"
        n_running = min(len(self._errands), self._n_under_way)
        return Capabilities(
            name=ID,
            state=state,
            reason="the backend was closed" if is_closed else self._why_not,
            n_running=n_running,
            n_waiting=len(self._errands) - n_running,
            facts={"device": self.host},
        )

    async def start(self) -> None:
        self._errands.check_is_open()

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        return await self._errands.run(drawing.job_id, self._draw(drawing, on_progress))

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Nothing: there are no previews."""

    async def cancel(self, job_id: JobId) -> None:
        """Nobody waits for it any more; the service cannot be told, and may charge it."""
        self._errands.stop(
            job_id, JobCancelled(f"job {job_id} was cancelled", hint="what was ordered may still be charged")
        )

    async def load(self, drawing: Drawing) -> None:
        """Nothing: the service has its models ready."""

    async def unload(self, checkpoint: str) -> None:
        """Nothing is held here."""

    async def pin(self, checkpoints: Collection[str]) -> None:
        """Nothing is held here."""

    async def close(self) -> None:
        self._errands.close()
        await self._orderer.close()
        await self._asker.close()

    # ------------------------------------------------------------------------------------------------------ one job

    async def _draw(self, drawing: Drawing, on_progress: OnProgress | None) -> ImageResult:
        model = self._models[model_of(drawing)]
        begun_s = time.monotonic()
        image, mask = await asyncio.to_thread(lambda: (as_base64(drawing.image), as_base64(drawing.mask)))
        tasks = [
            asyncio.create_task(self._picture(Asked(drawing, index, on_progress), model, image, mask))
            for index in range(drawing.n_images)
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                await ended(task)
        spent_s = time.monotonic() - begun_s
        return as_result(drawing, found, by=self.host, device=self.host, spent_s=spent_s, unsaid=model.unsaid)

    async def _picture(self, asked: Asked, model: Model, image: str | None, mask: str | None) -> FinishedPicture:
        drawing, index = asked.drawing, asked.index
        body = body_of(model, drawing, seed=drawing.seed + index, image=image, mask=mask)
        name = model_of(drawing)
        digest = await asyncio.to_thread(_digest, name, body)
        async with self._room:
            self._n_under_way += 1
            try:
                content, order = await self._brought(asked, name, body, digest=digest)
            finally:
                self._n_under_way -= 1
        try:
            picture = await asyncio.to_thread(as_asked, content, drawing)
        except BrokenPicture as exc:
            await self._drop(asked)
            raise BackendFailed(f"{self.host} sent what is no picture: {exc.message}") from exc
        asked.tell(drawing.steps)
        seed = drawing.seed + index if order.seed is None else order.seed
        return FinishedPicture(picture=picture, seed=seed, reproducible=False, cost_credits=order.cost_credits)

    async def _brought(
        self, asked: Asked, name: str, body: Mapping[str, object], *, digest: str
    ) -> tuple[bytes, Order]:
        """The picture's file: of an order made before, else of one made now."""
        job_id, index = asked.drawing.job_id, asked.index
        order = await asyncio.to_thread(self._orders.find, job_id, index, digest=digest)
        if order is None:
            order = await self._order(asked, name, body, digest=digest)
        elif order.state == "sending":
            await self._drop(asked)
            raise _not_known(f"the server ended while it ordered picture {index} of this job")
        if order.state == "fetched":
            content = await asyncio.to_thread(self._orders.kept, job_id, index)
            if content is not None:
                return content, order
        return await self._wait(asked, order)

    async def _drop(self, asked: Asked) -> None:
        await asyncio.to_thread(self._orders.drop, asked.drawing.job_id, asked.index)

    # ------------------------------------------------------------------------------------------------- to order it

    async def _order(self, asked: Asked, name: str, body: Mapping[str, object], *, digest: str) -> Order:
        """The picture ordered, and that noted. Raises what the service refuses it with."""
        job_id, index = asked.drawing.job_id, asked.index
        answer = await self._submit_patiently(asked, f"{self._endpoint}/v1/{name}", body, digest=digest)
        self._why_not = ""
        try:
            told = answer.json()
            order = Order(
                digest=digest, state="ordered", ordered_s=self._clock(), id=text_of(told, "id"),
                polling_url=text_of(told, "polling_url"), cost_credits=number_of(told.get("cost")),
            )  # fmt: skip
        except BadAnswer as exc:
            raise _not_known(f"{self.host} took the order and answered what makes no sense: {exc}") from exc
        self._check_may_be_asked(order.polling_url)
        await asyncio.to_thread(self._orders.take, job_id, index, order)
        facts = {"job_id": job_id, "task": order.id, "cost_credits": order.cost_credits}
        log.info("picture ordered", extra={"backend": ID, **facts})
        return order

    async def _submit_patiently(self, asked: Asked, url: str, body: Mapping[str, object], *, digest: str) -> Answer:
        """The answer to an order that was taken; asked for again while the service is busy, at fault, or not reached.

        Raises what it is refused with.
        """
        pause_s, n_faults, begun_s = self._pace.first_pause_s, 0, time.monotonic()
        while True:
            answer, why = await self._submit(asked, url, body, digest=digest)
            wait_s = pause_s
            if answer is None:
                n_faults += 1
            elif answer.is_good:
                return answer
            elif answer.status == 429:
                wait_s = retry_after_s(answer, now_s=self._clock()) or pause_s
                if time.monotonic() - begun_s + wait_s > self._pace.busy_s:
                    self._refuse(answer)
            elif answer.status >= 500 and n_faults + 1 < N_TRIES:
                n_faults += 1
            else:
                self._refuse(answer)
            if n_faults >= N_TRIES:
                self._why_not = why
                raise BackendUnavailable(ID, why, hint="is this machine connected?")
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _submit(
        self, asked: Asked, url: str, body: Mapping[str, object], *, digest: str
    ) -> tuple[Answer | None, str]:
        """The answer; None, and why, where the service is not reached. While nobody knows it stands as `sending`."""
        await asyncio.to_thread(self._orders.send, asked.drawing.job_id, asked.index, digest=digest)
        try:
            answer = await self._orderer.ask("POST", url, headers={"x-key": self._key}, body=body)
        except Unreachable as exc:
            await self._drop(asked)
            return None, f"{self.host} is not reached: {exc}"
        except (Lost, BadAnswer) as exc:
            await self._drop(asked)
            raise _not_known(f"the connection to {self.host} broke while a picture was ordered: {exc}") from exc
        if not answer.is_good:
            await self._drop(asked)
        return answer, ""

    def _refuse(self, answer: Answer) -> NoReturn:
        """Raise what an answer that is no 2xx means."""
        error = refusal(answer, host=self.host, now_s=self._clock())
        if isinstance(error, CreditsNeeded | BackendUnavailable):
            self._why_not = error.message
        raise error

    # ------------------------------------------------------------------------------------- to wait for it and fetch it

    async def _wait(self, asked: Asked, order: Order) -> tuple[bytes, Order]:
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

    async def _ready(self, asked: Asked, order: Order) -> Mapping[str, object]:
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


def _not_known(what: str) -> BackendFailed:
    return BackendFailed(
        f"{what}; whether it was charged is not known",
        hint="look at https://dashboard.bfl.ai; it is not ordered again unless you retry the job",
    )


def _is_theirs(parts: SplitResult) -> bool:
    host = (parts.hostname or "").rstrip(".")
    return host == DOMAIN or host.endswith(f".{DOMAIN}")


def _digest(name: str, body: Mapping[str, object]) -> str:
    return hashlib.sha256(f"{name}\n{json.dumps(body, sort_keys=True)}".encode("utf-8", "surrogatepass")).hexdigest()
