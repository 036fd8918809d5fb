"""What a node has finished and the router has not stored yet, on the node's disk.

A result is sent from memory while it is written: one file a job, `<job>.<lease>` or `<job>.<lease>.failed`, whole or
not at all. From then on it outlives the node's process, its network and the router. While the disk is full a few stay
in memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from sdfleet.domain import JobId
from sdfleet.errors import OutputNotWritable

log = logging.getLogger(__name__)

# Beside a full disk: 20 pictures of 2048x2048. What is beyond it keeps its slot until there is room.
MOST_HELD_BYTES = 2**28

_NAME = re.compile(r"([0-9a-f]{1,64})\.(\d{1,9}\.[0-9a-f]{32})(\.failed)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """One finished job. path: its packed outcome; None while that is in memory, in `packed`.

    is_failure: the outcome is no picture.
    """

    job: JobId
    lease: str
    path: Path | None = None
    packed: bytes | None = field(default=None, repr=False)
    is_failure: bool = False

    def read(self) -> bytes:
        """The packed outcome. Raises OSError; blocks: not for the event loop."""
        return self.packed if self.path is None and self.packed is not None else cast("Path", self.path).read_bytes()


class Spool:
    """See the file's first lines. folder: made if it is not there; nobody else may write into it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Between the event loop and the threads that write and unlink.
        self._lock = threading.Lock()
        self._here: dict[JobId, Spooled] = {}
        for path in sorted(folder.iterdir()):
            found = _NAME.fullmatch(path.name)
            if found is None:
                with contextlib.suppress(OSError):  # half a file of a node that was killed while it wrote
                    path.unlink()
                continue
            job = JobId(found[1])
            self._here[job] = Spooled(job=job, lease=found[2], path=path, is_failure=found[3] is not None)

    def all(self) -> tuple[Spooled, ...]:
        """What is here, the oldest first."""
        return tuple(self._here.values())

    def get(self, job: JobId) -> Spooled | None:
        """A job's entry, under whatever lease."""
        return self._here.get(job)

    @property
    def has_room(self) -> bool:
        """Whether memory may take another outcome besides those that are not on the disk."""
        with self._lock:
            return sum(len(each.packed or b"") for each in self._here.values()) <= MOST_HELD_BYTES

    def put(self, job: JobId, lease: str, packed: bytes, *, is_failure: bool = False) -> Spooled:
        """Take an outcome into memory, from where it can be sent at once; `keep` brings it to the disk."""
        if _NAME.fullmatch(f"{job}.{lease}") is None:
            raise OutputNotWritable(f"job {job[:80]!r} cannot be spooled under that name")
        spooled = Spooled(job=job, lease=lease, packed=packed, is_failure=is_failure)
        with self._lock:
            self._here[job] = spooled
        return spooled

    def keep(self, spooled: Spooled) -> None:
        """Return when it is on the disk, or has left. It stays in memory where the disk takes no more.

        Blocks: not for the event loop.
        """
        job, lease, packed = spooled.job, spooled.lease, spooled.packed
        if packed is None or not self.is_in_memory(spooled):
            return
        path = self._folder / (f"{job}.{lease}.failed" if spooled.is_failure else f"{job}.{lease}")
        temporary = path.with_name(f"new-{path.name}")
        try:
            with temporary.open("wb") as file:
                file.write(packed)
                file.flush()
                os.fsync(file.fileno())
            with self._lock:
                if self.is_in_memory(spooled):
                    temporary.replace(path)
                    self._here[job] = replace(self._here[job], path=path, packed=None)
                    return
            temporary.unlink()
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink()
            why = f"{self._folder}: {exc.strerror or exc}"
            log.warning("a finished job is kept in memory until it is sent", extra={"job_id": job, "why": why})

    def is_in_memory(self, spooled: Spooled) -> bool:
        """Whether that outcome is here, under whatever lease, and not on the disk."""
        here = self._here.get(spooled.job)
        return here is not None and here.packed is spooled.packed

    def renew(self, job: JobId, lease: str) -> None:
        """The job goes on under another lease: the router gave it here again. The file keeps its name.

        After a restart of the node it has the old lease again: any that the router has made for this job and node is
        good for pictures, and for a failure the router asks anew.
        """
        with self._lock:
            here = self._here.get(job)
            if here is not None:
                self._here[job] = replace(here, lease=lease)

    def drop(self, job: JobId) -> bool:
        """The router has it, or nobody wants it; False if it is not here. Blocks: not for the event loop."""
        with self._lock:
            spooled = self._here.pop(job, None)
            if spooled is not None and spooled.path is not None:
                with contextlib.suppress(OSError):
                    spooled.path.unlink()
        return spooled is not None
