"""Whether this router reigns: of several that share a broker one gives out work, the others stand by.

A reign that is not renewed for 10 s is over, and any router that asks next has the following one, with a higher epoch.
Nodes obey no lower epoch than they have seen, so an old router that has not noticed yet can do no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.transport import KEEP_EVERY_S, Crown, Reign

log = logging.getLogger(__name__)

# A router that stands by asks for the crown this often.
ASK_EVERY_S = 1.0


class Throne:
    """See the file's first lines. router: this one's name. epoch: the highest one that it remembers from earlier lives.

    note_epoch: called with each new one, to be remembered.
    """

    def __init__(self, crown: Crown, *, router: str, epoch: int, note_epoch: Callable[[int], None]) -> None:
        self.epoch = epoch
        self.since_s = 0.0
        self._crown = crown
        self._router = router
        self._note_epoch = note_epoch
        self._reign: Reign | None = None
        self._reigns = asyncio.Event()
        self._lost = asyncio.Event()

    @property
    def is_held(self) -> bool:
        """Whether this router reigns."""
        return self._reign is not None

    async def reigned(self) -> None:
        """Return when this router reigns."""
        await self._reigns.wait()

    async def dethroned(self) -> None:
        """Return when another router has taken this one's place."""
        await self._lost.wait()

    async def run(self, begun: Callable[[], Awaitable[None]]) -> NoReturn:
        """Reach for the crown and keep it, until cancelled. begun: called with each new reign."""
        while True:
            try:
                await self._once(begun)
            except StoreUnavailable as exc:
                # The broker carries no order of anybody's meanwhile, and a rival would have to find it up.
                log.warning("the crown cannot be renewed now", extra={"why": str(exc)})
            await asyncio.sleep(KEEP_EVERY_S if self.is_held else ASK_EVERY_S)

    async def resign(self) -> None:
        """Let another begin at once."""
        reign, self._reign = self._reign, None
        if reign is not None:
            await self._crown.resign(reign)

    async def _once(self, begun: Callable[[], Awaitable[None]]) -> None:
        if self._reign is not None and await self._crown.keep(self._reign):
            return
        # A reign can also end because the broker was away for longer than it lasts: then nobody else has it.
        reign = await self._crown.take(self._router, above=self.epoch)
        if reign is None:
            if self._reign is not None:
                self._reign = None
                self._reigns.clear()
                self._lost.set()
                log.error("another router reigns now; this one gives out no more work", extra={"epoch": self.epoch})
            return
        self._reign, self.epoch, self.since_s = reign, reign.epoch, asyncio.get_running_loop().time()
        self._note_epoch(reign.epoch)
        self._lost.clear()
        self._reigns.set()
        log.info("this router reigns", extra={"epoch": reign.epoch})
        await begun()
