"""A download that tells where it stands, in Ollama's words; for a server that goes on with other things meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sdfleet.catalog.consent import Consent
from sdfleet.catalog.download import DownloadPlan, PullProgress, fetch
from sdfleet.catalog.hubs.hub import Hub
from sdfleet.catalog.pulled import PulledWeights

# How often a transfer says where it stands.
TELL_EVERY_S = 0.2


class Pulling:
    """One download, in a thread of its own; its caller listens to `statuses`, and leaving them stops it.

    Not one of the threads that the server shares: a few downloads of hours would leave none for anything else.
    """

    def __init__(self, plan: DownloadPlan, consent: Consent | None, hub: Hub, weights: PulledWeights) -> None:
        self._plan = plan
        self._consent = consent
        self._hub = hub
        self._weights = weights
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._stop = threading.Event()
        self._last = ("", 0.0)

    async def statuses(self) -> AsyncGenerator[dict[str, Any]]:
        """What to tell the client, to the end. Raises what `fetch` raises."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="pull")
        ended = asyncio.wrap_future(thread.submit(self._fetch))
        ended.add_done_callback(self._end)
        thread.shutdown(wait=False)
        try:
            yield {"status": "pulling manifest"}
            while (told := await self._told.get()) is not None:
                yield told
            await ended
        finally:
            self._stop.set()

    def _end(self, ended: asyncio.Future[None]) -> None:
        if not ended.cancelled():
            # Looked at, so that nobody is told of an error whose caller has gone.
            ended.exception()
        self._told.put_nowait(None)

    def _fetch(self) -> None:
        if not self._plan.is_here:
            told = self._on_progress
            fetch(self._plan, self._consent, self._hub, self._weights, on_progress=told, cancel=self._stop)
        for status in ("verifying sha256 digest", "writing manifest", "success"):
            self._say({"status": status})

    def _on_progress(self, progress: PullProgress) -> None:
        file, now_s = progress.file, time.monotonic()
        is_news = file.path != self._last[0] or progress.n_file_bytes == file.n_bytes or progress.waits_s is not None
        if not is_news and now_s - self._last[1] < TELL_EVERY_S:
            return
        self._last = (file.path, now_s)
        status: dict[str, Any] = {
            "status": f"pulling {file.digest.hex[:12]}",
            "digest": f"sha256:{file.digest.hex}" if file.digest.kind == "sha256" else f"git:{file.digest.hex}",
            "total": file.n_bytes,
            "completed": progress.n_file_bytes,
            "file": file.path,
        }
        if progress.waits_s is not None:
            status["waits_s"] = progress.waits_s
        self._say(status)

    def _say(self, status: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._told.put_nowait, status)
