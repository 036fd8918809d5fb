"""One server for one home: two would draw every job twice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sdfleet.errors import OutputNotWritable, StorageError


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """While inside, no other process is. The lock ends with the process, however that ends; its files stay.

    Raises StorageError, naming the process that is inside; OutputNotWritable for a home that cannot be written.
    """
    lock, told = FileLock(home / "server.lock", mode=0o600), home / "server.pid"
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as exc:
        raise StorageError(
            f"another server (process {_read(told)}) uses {home}",
            hint="end it, or give this one a home of its own with SD_HOME",
        ) from exc
    except OSError as exc:
        raise OutputNotWritable(f"{home} cannot be used: {exc.strerror or exc}", hint="see SD_HOME") from exc
    try:
        told.write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        lock.release()


def _read(told: Path) -> str:
    try:
        return told.read_text(encoding="ascii", errors="replace").strip()[:20] or "unknown"
    except OSError:
        return "unknown"
