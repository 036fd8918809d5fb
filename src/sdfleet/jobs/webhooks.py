"""Telling the end of a job to a URL its caller named: signed, tried again for a day, and never into a private network.

The store writes the delivery in the transaction that ends the job, so no end is forgotten by a kill; a receiver may
hear of one end twice (`X-Sdfleet-Delivery` stays the same) but never of none, while it can be reached.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import httpcore2

from sdfleet import __version__
from sdfleet.addresses import GuardedNetwork, Resolve, check_url, resolve
from sdfleet.domain import Job, Webhook
from sdfleet.errors import StoreUnavailable
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.webhooks import Delivery, WebhookStore

log = logging.getLogger(__name__)

# Seconds from one try to the next: a restart of the receiver, a deployment, a night. Then it is given up.
PAUSES_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 21_600.0, 43_200.0)
ANSWER_WITHIN_S = 10.0
AT_ONCE = 16
_STORE_PAUSE_S = 5.0
_GONE = 410


class Webhooks:
    """Delivers what is due.

    body: the JSON a receiver gets for a job. secret: signs bodies of webhooks that came without their own
    (`storage/signing.py` keeps one); None: these go unsigned. allow_private: also call addresses of our own networks.
    """

    def __init__(
        self,
        *,
        store: WebhookStore,
        jobs: JobStore,
        body: Callable[[Job], bytes],
        secret: str | None = None,
        allow_private: bool = False,
        pauses_s: tuple[float, ...] = PAUSES_S,
        answer_within_s: float = ANSWER_WITHIN_S,
        resolve: Resolve = resolve,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._body = body
        self._secret = secret
        self._allow_private = allow_private
        self._pauses_s = pauses_s
        self._answer_within_s = answer_within_s
        self._network = GuardedNetwork(allow_private=allow_private, resolve=resolve)
        self._clock = clock
        self._nudged = asyncio.Event()

    def check(self, webhook: Webhook) -> None:
        """Raise InvalidValue for a URL that would never be called."""
        check_url("webhook", webhook.url, allow_private=self._allow_private)

    def nudge(self) -> None:
        """A job with a webhook has just ended."""
        self._nudged.set()

    async def run(self) -> NoReturn:
        """Deliver for ever."""
        while True:
            self._nudged.clear()
            try:
                wait_s = await self._deliver_due()
            except StoreUnavailable as exc:
                log.warning("webhooks wait for the store", extra={"why": str(exc)})
                wait_s = _STORE_PAUSE_S
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._nudged.wait()

    async def _deliver_due(self) -> float | None:
        """Try everything that is due; seconds until the next is, None if nothing waits."""
        while due := await self._store.due(now_s=self._clock(), limit=AT_ONCE):
            try:
                async with asyncio.TaskGroup() as tasks:
                    for delivery in due:
                        tasks.create_task(self._deliver(delivery))
            except* StoreUnavailable as group:
                raise StoreUnavailable(str(group.exceptions[0])) from group
        next_s = await self._store.next_due_s()
        return None if next_s is None else max(0.0, next_s - self._clock())

    async def _deliver(self, delivery: Delivery) -> None:
        job = await self._jobs.job(delivery.job_id)
        facts = {"job_id": delivery.job_id, "delivery": delivery.id, "attempt": delivery.attempts + 1}
        if job is None or not job.has_ended:
            await self._store.delivered(delivery.id)  # it is drawn again: its new end has a delivery of its own
            return
        try:
            status = await self._post(delivery, self._body(job))
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError) as exc:
            status, why = 0, f"{type(exc).__name__}: {exc}"
        except Exception as exc:  # one delivery is given up with its cause, the others go on
            log.exception("a webhook met a fault of ours", extra=facts)
            status, why = _GONE, f"{type(exc).__name__}: {exc}"
        else:
            why = f"answered {status}"
        if 200 <= status < 300:
            await self._store.delivered(delivery.id)
            log.info("webhook delivered", extra=facts)
        elif status == _GONE or delivery.attempts >= len(self._pauses_s):
            await self._store.postpone(delivery.id, due_s=None)
            log.warning("webhook given up", extra={**facts, "why": why})
        else:
            await self._store.postpone(delivery.id, due_s=self._clock() + self._pauses_s[delivery.attempts])
            log.info("webhook will be tried again", extra={**facts, "why": why})

    async def _post(self, delivery: Delivery, body: bytes) -> int:
        """The status of the answer; its body is not read, a redirect is not followed."""
        headers = [
            ("Content-Type", "application/json"),
            ("User-Agent", f"sdfleet/{__version__}"),
            ("X-Sdfleet-Delivery", f"{delivery.job_id}-{delivery.id}"),
        ]
        secret = delivery.webhook.secret or self._secret
        if secret is not None:
            headers.append(("X-Sdfleet-Signature", sign(body, secret)))
        limits = dict.fromkeys(("connect", "read", "write", "pool"), self._answer_within_s)
        async with (
            asyncio.timeout(self._answer_within_s),
            # A connection of its own: a receiver that keeps others waiting keeps only itself.
            httpcore2.AsyncConnectionPool(network_backend=self._network, max_connections=1) as pool,
            pool.stream(
                "POST", delivery.webhook.url, headers=headers, content=body, extensions={"timeout": limits}
            ) as answer,
        ):
            return int(answer.status)


def sign(body: bytes, secret: str) -> str:
    """The value of `X-Sdfleet-Signature`: a receiver computes the same and compares.

    >>> sign(b"{}", "secret")[:20]
    'sha256=77325902caca8'
    """
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
