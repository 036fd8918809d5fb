"""What a node has finished and the router has not stored yet, on the node's disk.

One file a job: `<job>.<lease>`, `<job>.<lease>.failed` for a failure; written whole or not at all. A job's pictures
outlive the node's process, its network and the router. While the disk is full a few are kept in memory instead, and
sent from there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
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
    """One finished job. path: its packed outcome; None while that is only in memory, in `packed`.

    is_failure: the outcome is no picture.
    """

    job: JobId
    lease: str
    path: Path | None
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

    def put(self, job: JobId, lease: str, packed: bytes, *, is_failure: bool = False) -> Spooled:
        """Keep an outcome; returns when it is on disk, or in memory where the disk is full.

        Raises OutputNotWritable where memory is full too; blocks: not for the event loop.
        """
        if _NAME.fullmatch(f"{job}.{lease}") is None:
            raise OutputNotWritable(f"job {job[:80]!r} cannot be spooled under that name")
        path = self._folder / (f"{job}.{lease}.failed" if is_failure else f"{job}.{lease}")
        temporary = path.with_name(f"new-{job}")
        try:
            with temporary.open("wb") as file:
                file.write(packed)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink()
            why = f"a finished job cannot be kept in {self._folder}: {exc.strerror or exc}"
            if self._held_bytes() + len(packed) > MOST_HELD_BYTES:
                raise OutputNotWritable(why, hint="make room on that disk, or set SD_HOME to another one") from exc
            log.warning("a finished job is kept in memory until it is sent", extra={"job_id": job, "why": why})
            spooled = Spooled(job=job, lease=lease, path=None, packed=packed, is_failure=is_failure)
        else:
            spooled = Spooled(job=job, lease=lease, path=path, is_failure=is_failure)
        self._here[job] = spooled
        return spooled

    def renew(self, job: JobId, lease: str) -> None:
        """The job goes on under another lease: the router gave it here again. The file keeps its name.

        After a restart of the node it has the old lease again: any that the router has made for this job and node is
        good for pictures, and for a failure the router asks anew.
        """
        self._here[job] = replace(self._here[job], lease=lease)

    def drop(self, job: JobId) -> bool:
        """The router has it, or nobody wants it; False if it is not here. Blocks: not for the event loop."""
        spooled = self._here.pop(job, None)
        if spooled is not None and spooled.path is not None:
            with contextlib.suppress(OSError):
                spooled.path.unlink()
        return spooled is not None

    def _held_bytes(self) -> int:
        return sum(len(each.packed) for each in self.all() if each.packed is not None)
