"""Pictures that a service was asked for and that may cost money, remembered until they are surely done with.

    sending   -> ordered -> fetched        one small file for each picture, beside it the picture once it is here

A server that is killed and draws its jobs again finds here what it has ordered already, and does not order it twice.
Only between `sending` and `ordered` nobody can know: such a picture is not ordered again without a person's word.
Nothing here says what the picture shows: of the request there is only a hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from sdfleet.domain import JobId
from sdfleet.errors import StorageError

# A job that is drawn again after a restart asks at once; after a day nobody does.
KEPT_S = 24 * 3600.0

State = Literal["sending", "ordered", "fetched"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One picture. digest: of the request. ordered_s: seconds since 1970. cost_credits: as the service said."""

    digest: str
    state: State
    ordered_s: float
    id: str = ""
    polling_url: str = ""
    cost_credits: float | None = None
    seed: int | None = None


class Orders:
    """The orders in a folder, which is made when it is needed. Every method blocks. clock: seconds since 1970."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def find(self, job_id: JobId, index: int, *, digest: str) -> Order | None:
        """What was ordered for picture `index` of a job with this very request; None if nothing was."""
        try:
            order = Order(**json.loads(self._path(job_id, index).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            # Damaged: nobody can say what it was.
            return Order(digest=digest, state="sending", ordered_s=0.0)
        return order if order.digest == digest else None

    def send(self, job_id: JobId, index: int, *, digest: str) -> Order:
        """Note that the picture is about to be ordered. Raises StorageError: then it must not be."""
        self._forget_old()
        order = Order(digest=digest, state="sending", ordered_s=self._clock())
        self._write(job_id, index, order)
        return order

    def take(self, job_id: JobId, index: int, order: Order) -> None:
        """Note how the order stands now. Raises StorageError."""
        self._write(job_id, index, order)

    def keep(self, job_id: JobId, index: int, order: Order, content: bytes) -> None:
        """Note that the picture is here, and keep its file. Raises StorageError."""
        self._place(self._picture(job_id, index), content)
        self._write(job_id, index, replace(order, state="fetched"))

    def kept(self, job_id: JobId, index: int) -> bytes | None:
        """The picture's file, if it is here."""
        try:
            return self._picture(job_id, index).read_bytes()
        except OSError:
            return None

    def drop(self, job_id: JobId, index: int) -> None:
        """Forget the order: it has come to nothing, or nobody wants it."""
        for path in (self._path(job_id, index), self._picture(job_id, index)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, job_id: JobId, index: int) -> Path:
        # Hashed: an id never becomes part of a path.
        return self._folder / f"{hashlib.sha256(f'{job_id}/{index}'.encode()).hexdigest()[:32]}.json"

    def _picture(self, job_id: JobId, index: int) -> Path:
        return self._path(job_id, index).with_suffix(".picture")

    def _write(self, job_id: JobId, index: int, order: Order) -> None:
        self._place(self._path(job_id, index), json.dumps(asdict(order)).encode())

    def _place(self, path: Path, content: bytes) -> None:
        """The file, whole and on the disk. For its owner alone: the address in it leads to the picture."""
        temporary = path.with_suffix(f"{path.suffix}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as exc:
            raise StorageError(
                f"{path.parent} cannot be written: {exc.strerror or exc}",
                hint="nothing is ordered that cannot be noted; make room there, or make it writable",
            ) from exc

    def _forget_old(self) -> None:
        border_s = self._clock() - KEPT_S
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.stat().st_mtime < border_s:
                    path.unlink(missing_ok=True)
