"""Whether a server stands ready, with the steps it took to get there: on one machine, its model loaded and tried."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from sdfleet.domain import ImageRequest
from sdfleet.errors import NotReady, SdfleetError
from sdfleet.runtime import Runtime

log = logging.getLogger(__name__)

# What a caller is told to wait while the model is loaded; the built-in one takes two or three seconds.
RETRY_AFTER_S = 2.0


# What makes a server ready; tells its steps as it goes.
Preparing = Callable[[Callable[[str], None]], Awaitable[None]]


def warm_up(runtime: Runtime, *, model: str) -> Preparing:
    """Start the engine and draw one picture of the default model, for nobody, in as few steps as it takes.

    Not where another program or a service would draw it: that could cost money.
    """

    async def prepare(note: Callable[[str], None]) -> None:
        if not await runtime.draws_with_its_own(model):
            note(f"{model} is not drawn by sdfleet itself: nothing is loaded")
            return
        note("starting the engine")
        await runtime.start()
        note(f"loading {model}")
        await runtime.generate(ImageRequest(prompt="warm-up", model=model, steps=1, seed=0))
        note(f"{model} is loaded")

    return prepare


class Readiness:
    """Gets ready behind HTTP, once, at the start of the server. prepare: what that takes."""

    def __init__(self, prepare: Preparing) -> None:
        self._prepare = prepare
        self._steps: list[str] = []
        self._begun_s = time.monotonic()
        self.is_loading = True
        self._has_ended = asyncio.Event()
        self.error: str | None = None

    @property
    def is_ready(self) -> bool:
        """Loaded and warmed up. When that failed, jobs are taken all the same and tell why."""
        return not self.is_loading and self.error is None

    @property
    def steps(self) -> tuple[str, ...]:
        """What was done so far, each with the seconds since the start."""
        return tuple(self._steps)

    def check(self) -> None:
        """Raise NotReady while the model is being loaded."""
        if self.is_loading:
            now = self._steps[-1] if self._steps else "starting"
            raise NotReady(
                f"the server is getting ready: {now}", retry_after_s=RETRY_AFTER_S, hint="try again in a few seconds"
            )

    async def wait(self) -> None:
        """Return when loading has ended, well or not."""
        await self._has_ended.wait()

    async def load(self) -> None:
        """Do what it takes; what fails is told, and jobs meet it again."""
        try:
            await self._prepare(self._note)
        except SdfleetError as exc:
            self.error = str(exc)
            self._note(f"failed: {exc}")
            log.warning("the server is not ready", extra={"why": str(exc)})
        finally:
            self.is_loading = False
            self._has_ended.set()

    def _note(self, step: str) -> None:
        self._steps.append(f"{time.monotonic() - self._begun_s:.1f} s: {step}")
        log.info("getting ready", extra={"step": step})
