"""The weights that sdfleet itself downloaded: `<models folder>/weights/<name>/`, and nothing else is ever deleted.

    weights/sd15/               whole and checked; `sdfleet.json` inside lists its files and where they came from
    weights/.sd15.part/         a download that is not finished; kept when it is cut off
    weights/.sd15.lock          held by the process that downloads or removes

A folder gets its name only when everything in it was checked: a name without a dot is a model that works.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sdfleet.catalog.cards import Name
from sdfleet.catalog.hubs.hub import Digest, Source
from sdfleet.errors import AlreadyPulling, BrokenCheckpoint, CheckpointError

log = logging.getLogger(__name__)

MANIFEST = "sdfleet.json"
READ_BYTES = 2**22


class ManifestFile(BaseModel):
    """A file as the hub announced it and as it arrived."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    n_bytes: int
    digest_kind: Literal["sha256", "git"]
    digest: str


class Manifest(BaseModel):
    """What was downloaded, and from where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    source: Source
    endpoint: str
    repo_id: str
    revision: str
    files: tuple[ManifestFile, ...]

    @property
    def n_bytes(self) -> int:
        """All files together."""
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What one model takes. n_unfinished_bytes: of a download that was cut off."""

    name: str
    n_bytes: int
    n_unfinished_bytes: int


class PulledWeights:
    """The downloads under one folder, which is made by the first. Names come from cards, never from a request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Where the weights are, or would be."""
        return self.folder / name

    def staging(self, name: str) -> Path:
        """Where an unfinished download is kept."""
        return self.folder / f".{name}.part"

    def is_here(self, name: str) -> bool:
        """Whether the model is whole and checked."""
        return (self.path(name) / MANIFEST).is_file()

    def manifest(self, name: str) -> Manifest:
        """What was downloaded. Raises BrokenCheckpoint."""
        try:
            return Manifest.model_validate_json((self.path(name) / MANIFEST).read_bytes())
        except (OSError, ValidationError) as exc:
            raise BrokenCheckpoint(
                f"{self.path(name) / MANIFEST} cannot be read", hint=f"get it again: sdfleet models pull {name}"
            ) from exc

    def misfits(self, name: str) -> tuple[str, ...]:
        """What of a downloaded model is missing, or has another size than the hub announced; its hashes are not read.

        Raises BrokenCheckpoint.
        """
        told = []
        for file in self.manifest(name).files:
            try:
                n_bytes = (self.path(name) / file.path).stat().st_size
            except OSError:
                told.append(f"{file.path} is missing")
            else:
                if n_bytes != file.n_bytes:
                    told.append(f"{file.path} has {n_bytes} bytes, the hub announced {file.n_bytes}")
        return tuple(told)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Nobody else downloads or removes this model meanwhile; a killed process holds nothing.

        Raises AlreadyPulling, CheckpointError.
        """
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{name}.lock")
            lock.acquire(timeout=0)
        except Timeout as exc:
            raise AlreadyPulling(
                f"another process is downloading or removing {name}", hint="wait until it has ended"
            ) from exc
        except OSError as exc:
            raise not_writable(self.folder, exc) from exc
        try:
            yield
        finally:
            lock.release()

    def publish(self, manifest: Manifest) -> Path:
        """Give the finished download its name; one that was here before is replaced. Call it locked."""
        staging, path = self.staging(manifest.name), self.path(manifest.name)
        old = self.folder / f".{manifest.name}.old"
        try:
            _write(staging / MANIFEST, manifest.model_dump_json(indent=1).encode())
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            staging.rename(path)
            _sync_folder(self.folder)
        except OSError as exc:
            raise not_writable(self.folder, exc) from exc
        shutil.rmtree(old, ignore_errors=True)
        return path

    def remove(self, name: str) -> int:
        """Delete the weights and what an unfinished download left; the bytes that were freed."""
        space = self._space(name)
        with self.locked(name):
            path, old = self.path(name), self.folder / f".{name}.old"
            try:
                shutil.rmtree(old, ignore_errors=True)
                if self.is_here(name):
                    # Renamed first: half a model must not look like a whole one, wherever this is cut off.
                    path.rename(old)
                    shutil.rmtree(old)
                if self.staging(name).exists():
                    shutil.rmtree(self.staging(name))
            except OSError as exc:
                raise not_writable(path, exc) from exc
        return space.n_bytes + space.n_unfinished_bytes

    def verify(self, name: str, *, on_progress: Callable[[str, int], None] | None = None) -> tuple[str, ...]:
        """What is wrong with the files, one line each; none when all are as they were announced.

        on_progress: called with a file's path and the bytes of it that were read.
        """
        faults = []
        for file in self.manifest(name).files:
            path = self.path(name) / file.path
            try:
                n_bytes = path.stat().st_size
                if n_bytes != file.n_bytes:
                    faults.append(f"{file.path} has {n_bytes} bytes instead of {file.n_bytes}")
                elif hash_of(path, Digest(file.digest_kind, file.digest), on_progress=on_progress) != file.digest:
                    faults.append(f"{file.path} has changed: its hash is not the announced one")
            except FileNotFoundError:
                faults.append(f"{file.path} is missing")
            except OSError as exc:
                faults.append(f"{file.path} cannot be read: {exc.strerror or exc}")
        return tuple(faults)

    def usage(self) -> tuple[Space, ...]:
        """What each model takes here, by name."""
        try:
            found = {path.name for path in self.folder.iterdir() if path.is_dir()}
        except OSError:
            return ()
        names = {_name_of(folder) for folder in found}
        return tuple(self._space(name) for name in sorted(names))

    def _space(self, name: str) -> Space:
        hidden = (self.staging(name), self.folder / f".{name}.old")
        return Space(
            name=name, n_bytes=_size(self.path(name)), n_unfinished_bytes=sum(_size(folder) for folder in hidden)
        )


def hash_of(path: Path, digest: Digest, *, on_progress: Callable[[str, int], None] | None = None) -> str:
    """The file's hash of the same kind. Raises OSError."""
    n_read = 0
    with path.open("rb") as file:
        hasher = digest.hasher(os.fstat(file.fileno()).st_size)
        while data := file.read(READ_BYTES):
            hasher.update(data)
            n_read += len(data)
            if on_progress is not None:
                on_progress(path.name, n_read)
    return hasher.hexdigest()


def not_writable(folder: Path, exc: OSError) -> CheckpointError:
    """The error of a data folder that takes no files."""
    return CheckpointError(
        f"{folder} cannot be written: {exc.strerror or exc}",
        hint="make that folder writable, or set SD_HOME to another one",
    )


def _name_of(folder: str) -> str:
    return folder.removeprefix(".").removesuffix(".part").removesuffix(".old")


def _size(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A new name is sure to survive a power cut only once its folder is synced too; Windows has no such call.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
