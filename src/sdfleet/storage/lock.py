"""One server for one home: two would draw every job twice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from sdfleet.errors import OutputNotWritable, StorageError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has none: there nothing tells that two servers share a home
    fcntl = None


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """While inside, no other process is. The lock ends with the process, however that ends; its file stays.

    Raises StorageError, naming the process that is inside; OutputNotWritable for a home that cannot be written.
    """
    path = home / "server.lock"
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise OutputNotWritable(f"{path} cannot be used: {exc.strerror or exc}", hint="see SD_HOME") from exc
    try:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                pid = os.read(file, 20).decode("ascii", "replace").strip()
                raise StorageError(
                    f"another server (process {pid or 'unknown'}) uses {home}",
                    hint="end it, or give this one a home of its own with SD_HOME",
                ) from exc
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(file)
