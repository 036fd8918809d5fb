"""How a node's finished jobs get to the router: in chunks, each acknowledged, until the router says it has them.

A few chunks are on their way at once (credits): a slow reader then loses nothing, and what else shares the line waits
for at most those. Whatever is lost, the router tells from where to go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from typing import NoReturn

from sdfleet.domain import JobId
from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.messages import CREDIT_WINDOW, Chunk, ChunkAnswer
from sdfleet.fleet.packing import CHUNK_BYTES, BrokenMessage, pack, unpack
from sdfleet.fleet.spool import Spool, Spooled
from sdfleet.fleet.subjects import up
from sdfleet.fleet.transport import Bus, NoAnswer

log = logging.getLogger(__name__)

# The last chunk is answered when the router has it all on its disk.
ANSWER_TIMEOUT_S = 15.0
# A router that is away, or does not know the job yet, is asked again.
AGAIN_S = 1.0
# From here on a hash is not for the event loop: 1 ms.
_LARGE_BYTES = 2**20
# Jobs whose results are on their way at once.
N_AT_ONCE = 4


class Shipping:
    """Sends what is in the spool, for as long as `run` runs. on_change: an entry has left the spool."""

    def __init__(self, node: str, *, bus: Bus, spool: Spool, on_change: Callable[[], None]) -> None:
        self._subject = up(node, "res")
        self._bus = bus
        self._spool = spool
        self._on_change = on_change
        self._news = asyncio.Event()
        self._not_before_s: dict[JobId, float] = {}

    def nudge(self, job: JobId) -> None:
        """There is something to send, or the router asked for it anew."""
        self._not_before_s.pop(job, None)
        self._news.set()

    async def run(self) -> NoReturn:
        """Send until cancelled."""
        loop = asyncio.get_running_loop()
        sending: dict[JobId, asyncio.Task[None]] = {}
        while True:
            self._news.clear()
            for job in [job for job, task in sending.items() if task.done()]:
                sending.pop(job).result()
            now_s = loop.time()
            for each in self._spool.all():
                is_due = self._not_before_s.get(each.job, 0.0) <= now_s
                if is_due and each.job not in sending and len(sending) < N_AT_ONCE:
                    task = asyncio.create_task(self._ship(each), name=f"ship {each.job}")
                    task.add_done_callback(lambda _: self._news.set())
                    sending[each.job] = task
            here = {each.job for each in self._spool.all()}
            # Dropped by a cancel while it waited.
            self._not_before_s = {job: s for job, s in self._not_before_s.items() if job in here}
            # What is due already and is not being sent waits for one of those that are.
            waits = [s - now_s for job, s in self._not_before_s.items() if job not in sending and s > now_s]
            try:
                async with asyncio.timeout(min(waits, default=None)):
                    await self._news.wait()
            except TimeoutError:
                continue
            except asyncio.CancelledError:
                for task in sending.values():
                    task.cancel()
                if sending:
                    await asyncio.wait(sending.values())
                raise

    async def _ship(self, spooled: Spooled) -> None:
        job = spooled.job
        try:
            answer = await self._sent(spooled)
        except OSError as exc:
            # It cannot be read: the router misses it, and gives the job out again.
            log.warning("a finished job in the spool cannot be read", extra={"job_id": job, "why": str(exc)})
            await asyncio.to_thread(self._spool.drop, job)
            self._on_change()
            return
        except (NoAnswer, BrokenMessage, StoreUnavailable) as exc:
            log.info("a finished job is sent again later", extra={"job_id": job, "why": str(exc)[:200]})
            answer = None
        if answer is None or answer.verdict not in {"stored", "dup"}:
            if answer is not None:
                log.info("the router does not take a finished job yet", extra={"job_id": job, "why": answer.why})
            self._not_before_s[job] = asyncio.get_running_loop().time() + AGAIN_S
            return
        self._not_before_s.pop(job, None)
        # `dup` may be about an older lease: if the router has given the job here again meanwhile, it is sent again.
        here = self._spool.get(job)
        if answer.verdict == "stored" or (here is not None and here.lease == spooled.lease):
            await asyncio.to_thread(self._spool.drop, job)
        self._on_change()

    async def _sent(self, spooled: Spooled) -> ChunkAnswer:
        """The router's last word. Raises NoAnswer, BrokenMessage."""
        in_memory = spooled.packed is not None and len(spooled.packed) < _LARGE_BYTES
        data, sha256 = _read(spooled) if in_memory else await asyncio.to_thread(_read, spooled)
        total = len(data)
        offset, under_way = 0, list[asyncio.Task[ChunkAnswer]]()

        async def send(at: int) -> ChunkAnswer:
            chunk = Chunk(
                job=spooled.job, lease=spooled.lease, offset=at, total=total, sha256=sha256,
                data=data[at : at + CHUNK_BYTES],
            )  # fmt: skip
            answer = await self._bus.request(self._subject, pack(chunk), timeout_s=ANSWER_TIMEOUT_S)
            return unpack(ChunkAnswer, answer.data)

        try:
            while True:
                while offset < total and len(under_way) < CREDIT_WINDOW:
                    under_way.append(asyncio.create_task(send(offset)))
                    offset += CHUNK_BYTES
                answer = await under_way.pop(0)
                if answer.verdict == "again":
                    await _drained(under_way)
                    offset = min(max(0, answer.offset), total - 1) // CHUNK_BYTES * CHUNK_BYTES
                elif answer.verdict != "ok" or (not under_way and offset >= total):
                    return answer
        finally:
            await _drained(under_way)


def _read(spooled: Spooled) -> tuple[bytes, str]:
    data = spooled.read()
    return data, sha256_of(data)


async def _drained(tasks: list[asyncio.Task[ChunkAnswer]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    tasks.clear()


def sha256_of(data: bytes | bytearray) -> str:
    """In lower-case hex."""
    return hashlib.sha256(data).hexdigest()
