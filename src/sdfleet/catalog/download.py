"""Weights from a hub: first a plan that costs nothing, then, with somebody's yes to it, the files.

    plan_download(card, hub, weights)  ->  DownloadPlan     what would come, how much, under which licence
    fetch(plan, consent, hub, weights) ->  the folder       each file resumed and checked, then all at once

Only what the engine reads is taken: the configs, the tokenizers and one set of safetensors per component.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from sdfleet.catalog.cards import Card
from sdfleet.catalog.consent import Consent
from sdfleet.catalog.hubs.hub import TITLES, Hub, HubFile, Listing, Source, unreachable
from sdfleet.catalog.identify import identify
from sdfleet.catalog.pulled import READ_BYTES, Manifest, ManifestFile, PulledWeights, hash_of, not_writable
from sdfleet.catalog.selection import select
from sdfleet.errors import (
    ConfirmationRequired,
    DiskFull,
    DownloadCancelled,
    DownloadDamaged,
    HubRateLimited,
    HubUnreachable,
    SdfleetError,
    UnsupportedByModel,
)

log = logging.getLogger(__name__)

# In a row without a byte of progress; each waits twice as long as the one before.
MAX_TRIES = 5
FIRST_WAIT_S = 1.0
# A hub that wants longer than this is asked again by the person, not by us.
MAX_RATE_LIMIT_WAIT_S = 300.0
# Beside the files: the file system's own books, and other programs must go on.
SPARE_BYTES = 64 * 2**20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadPlan:
    """What a download would bring. Nothing has been downloaded for it but the hub's list of files.

    n_left_bytes: what is still to come, where an earlier download was cut off. n_free_bytes: of the disk.
    refusal: what the hub would answer to a download now (no token, licence not accepted); None: nothing known.
    is_here: exactly these files are on this machine already.
    """

    name: str
    source: Source
    endpoint: str
    repo_id: str
    listing: Listing = field(repr=False)
    files: tuple[HubFile, ...] = field(repr=False)
    n_left_bytes: int
    n_free_bytes: int
    folder: Path
    licence: str | None
    licence_url: str | None
    is_gated: bool
    refusal: SdfleetError | None = None
    is_here: bool = False

    @property
    def n_bytes(self) -> int:
        """All files together."""
        return sum(file.n_bytes for file in self.files)

    @property
    def id(self) -> str:
        """The same for the same files under the same licence, and for no others: what a consent is given to."""
        facts = [self.name, self.source, self.endpoint, self.repo_id, self.listing.revision, self.licence]
        files = sorted((file.path, file.n_bytes, file.digest.hex) for file in self.files)
        return hashlib.sha256(json.dumps([facts, files]).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """Where a download stands. waits_s: the hub wants a pause, or the connection broke; None while bytes come."""

    file: HubFile
    n_file_bytes: int
    n_bytes: int
    n_total_bytes: int
    waits_s: float | None = None


def plan_download(card: Card, hub: Hub, weights: PulledWeights) -> DownloadPlan:
    """What `fetch` would do. Raises UnsupportedByModel, PickleRefused, DownloadError or HubRateLimited.

    That the hub would refuse the files themselves is told in the plan, so that the rest of it can be seen.
    """
    repo_id = card.hf if hub.source == "hf" else card.modelscope
    if repo_id is None:
        other = next((source for source, found in (("hf", card.hf), ("modelscope", card.modelscope)) if found), None)
        raise UnsupportedByModel(
            f"{card.name} has no repository on {TITLES[hub.source]} in its card",
            hint=f"use --from {other}" if other else "add `hf` or `modelscope` to its card",
        )
    listing = hub.listing(repo_id)
    files = select(listing.files, family=card.family, repo_id=repo_id)
    refusal: SdfleetError | None = None
    try:
        hub.check_access(repo_id, listing)
    except SdfleetError as exc:
        refusal = exc
    plan = DownloadPlan(
        name=card.name,
        source=hub.source,
        endpoint=hub.endpoint,
        repo_id=repo_id,
        listing=listing,
        files=files,
        n_left_bytes=sum(file.n_bytes - _n_here(weights.staging(card.name), file) for file in files),
        n_free_bytes=free_bytes(weights.folder),
        folder=weights.path(card.name),
        licence=card.licence,
        licence_url=card.licence_url,
        is_gated=card.is_gated or listing.is_gated,
        refusal=refusal,
    )
    return _noting_what_is_here(plan, weights)


def fetch(
    plan: DownloadPlan,
    consent: Consent | None,
    hub: Hub,
    weights: PulledWeights,
    *,
    on_progress: Callable[[PullProgress], None] | None = None,
    cancel: threading.Event | None = None,
    wait: Callable[[float], object] | None = None,
) -> Path:
    """The folder of the weights, whole and checked; it appears at once or not at all. Blocks; run it in a thread.

    What has arrived is kept when this is cut off, however hard, and the next call goes on from there.
    on_progress: called for every chunk. cancel: set it from another thread. wait: sleeps so many seconds.
    Raises ConfirmationRequired (no yes, or one to another plan), AlreadyPulling, DiskFull, DownloadCancelled,
    DownloadDamaged, HubRateLimited, any other DownloadError, CheckpointError.
    """
    if consent is None or consent.plan_id != plan.id:
        raise ConfirmationRequired(
            f"nobody has said yes to downloading {plan.name} as it is on the hub now",
            hint=f"look at it with `sdfleet models plan {plan.name}`",
        )
    stop = cancel or threading.Event()
    with weights.locked(plan.name):
        if _noting_what_is_here(plan, weights).is_here:
            return plan.folder
        download = _Download(plan, hub, weights, on_progress=on_progress, stop=stop, wait=wait or stop.wait)
        log.info("download started", extra={"model": plan.name, "repo_id": plan.repo_id, "given_by": consent.given_by})
        return download.run()


def free_bytes(folder: Path) -> int:
    """What the disk under a folder has free; the folder need not be there yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


class _Download:
    """One run of `fetch`, with everything decided."""

    def __init__(
        self,
        plan: DownloadPlan,
        hub: Hub,
        weights: PulledWeights,
        *,
        on_progress: Callable[[PullProgress], None] | None,
        stop: threading.Event,
        wait: Callable[[float], object],
    ) -> None:
        self._plan = plan
        self._hub = hub
        self._weights = weights
        self._staging = weights.staging(plan.name)
        self._tell = on_progress
        self._stop = stop
        self._wait = wait
        self._n_done = 0

    def run(self) -> Path:
        plan = self._plan
        self._clear_what_is_not_planned()
        n_left = sum(file.n_bytes - _n_here(self._staging, file) for file in plan.files)
        n_free = free_bytes(self._weights.folder)
        if n_left + SPARE_BYTES > n_free:
            raise DiskFull(
                f"{plan.name} needs {_gb(n_left)} more and the disk of {self._weights.folder} has {_gb(n_free)} free",
                hint="make room, see `sdfleet models du`, or set SD_HOME to a larger disk",
            )
        for file in plan.files:
            try:
                self._fetch(file)
            except OSError as exc:
                raise self._as_ours(exc) from exc
        identify(self._staging)
        manifest = Manifest(
            name=plan.name,
            source=plan.source,
            endpoint=plan.endpoint,
            repo_id=plan.repo_id,
            revision=plan.listing.revision,
            files=tuple(
                ManifestFile(path=file.path, n_bytes=file.n_bytes, digest_kind=file.digest.kind, digest=file.digest.hex)
                for file in plan.files
            ),
        )
        folder = self._weights.publish(manifest)
        log.info("download finished", extra={"model": plan.name, "n_bytes": plan.n_bytes})
        return folder

    def _clear_what_is_not_planned(self) -> None:
        """Remove what an earlier download of other files left, which would fill the disk for nothing."""
        wanted = {self._staging / file.path for file in self._plan.files}
        wanted |= {_partial(self._staging, file) for file in self._plan.files}
        try:
            for path in self._staging.rglob("*"):
                if path not in wanted and (path.is_file() or path.is_symlink()):
                    path.unlink()
        except OSError as exc:
            raise not_writable(self._staging, exc) from exc

    def _fetch(self, file: HubFile) -> None:
        final, partial = self._staging / file.path, _partial(self._staging, file)
        final.parent.mkdir(parents=True, exist_ok=True)
        # Checked when it got its name; checked again, because a power cut can lose what was written before it.
        if final.exists() and final.stat().st_size == file.n_bytes and hash_of(final, file.digest) == file.digest.hex:
            self._told(file, file.n_bytes)
            self._n_done += file.n_bytes
            return
        was_resumed = partial.exists() and partial.stat().st_size > 0
        with partial.open("r+b" if partial.exists() else "w+b") as target:
            found = self._receive(file, target)
            if found != file.digest.hex and was_resumed:
                # What was kept from before may be what is damaged: once more, from the first byte.
                target.seek(0)
                target.truncate()
                found = self._receive(file, target)
        if found != file.digest.hex:
            partial.unlink()
            raise DownloadDamaged(
                f"{file.path} arrived damaged: its hash is not the one that {TITLES[self._plan.source]} announced",
                hint="try again; if it happens again, use the other hub with --from, or the official address",
            )
        partial.replace(final)
        self._n_done += file.n_bytes

    def _receive(self, file: HubFile, target: BinaryIO) -> str:
        """Write what is missing of the file and give back its hash. However often the connection breaks, it goes on."""
        arriving = _Arriving(file, target)
        n_kept = os.fstat(target.fileno()).st_size
        if n_kept > file.n_bytes:
            arriving.start_over()
        else:
            while arriving.n_bytes < n_kept and (data := target.read(READ_BYTES)):
                arriving.count(data)
                self._check_stop()
        self._told(file, arriving.n_bytes)
        n_tries = 0
        while arriving.n_bytes < file.n_bytes:
            n_before = arriving.n_bytes
            try:
                self._append(file, arriving)
            except HubUnreachable as exc:
                n_tries = 0 if arriving.n_bytes > n_before else n_tries + 1
                if n_tries >= MAX_TRIES:
                    raise
                log.info("download goes on after a fault", extra={"file": file.path, "reason": str(exc)})
                self._pause(file, arriving.n_bytes, FIRST_WAIT_S * 2**n_tries)
            except HubRateLimited as exc:
                n_tries += 1
                if n_tries >= MAX_TRIES or exc.retry_after_s > MAX_RATE_LIMIT_WAIT_S:
                    raise
                self._pause(file, arriving.n_bytes, exc.retry_after_s)
        target.flush()
        os.fsync(target.fileno())
        return arriving.hash()

    def _append(self, file: HubFile, arriving: _Arriving) -> None:
        """One connection's worth of the file. Raises HubUnreachable when it ends before the file does."""
        start = arriving.n_bytes
        with self._hub.open(self._plan.repo_id, self._plan.listing, file.path, start=start) as transfer:
            if transfer.start != start:
                arriving.start_over()
            for chunk in transfer.chunks:
                self._check_stop()
                if arriving.n_bytes + len(chunk) > file.n_bytes:
                    raise DownloadDamaged(
                        f"{file.path} is longer than {TITLES[self._plan.source]} announced",
                        hint="try again: the repository may have just changed",
                    )
                arriving.append(chunk)
                self._told(file, arriving.n_bytes)
        if arriving.n_bytes < file.n_bytes:
            raise unreachable(self._plan.source, self._plan.endpoint, "the connection ended early")

    def _pause(self, file: HubFile, n_here: int, seconds: float) -> None:
        self._told(file, n_here, waits_s=seconds)
        self._wait(seconds)
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise DownloadCancelled(
                f"the download of {self._plan.name} was stopped",
                hint=f"`sdfleet models pull {self._plan.name}` goes on where it stopped",
            )

    def _told(self, file: HubFile, n_here: int, *, waits_s: float | None = None) -> None:
        if self._tell is not None:
            self._tell(
                PullProgress(
                    file=file,
                    n_file_bytes=n_here,
                    n_bytes=self._n_done + n_here,
                    n_total_bytes=self._plan.n_bytes,
                    waits_s=waits_s,
                )
            )

    def _as_ours(self, exc: OSError) -> SdfleetError:
        if exc.errno in _NO_ROOM:
            return DiskFull(
                f"the disk of {self._weights.folder} became full while {self._plan.name} was downloaded",
                hint="make room and pull again: what has arrived is kept",
            )
        if exc.errno == errno.EFBIG:
            return DiskFull(
                f"the file system of {self._weights.folder} takes no file as large as those of {self._plan.name}",
                hint="set SD_HOME to a disk with another file system: FAT32 ends at 4 GiB",
            )
        return not_writable(self._weights.folder, exc)


class _Arriving:
    """A file on its way to the disk: what is written and hashed so far."""

    def __init__(self, file: HubFile, target: BinaryIO) -> None:
        self._file = file
        self._target = target
        self._hasher = file.digest.hasher(file.n_bytes)
        self.n_bytes = 0

    def count(self, data: bytes) -> None:
        """Bytes that are on the disk already."""
        self._hasher.update(data)
        self.n_bytes += len(data)

    def append(self, data: bytes) -> None:
        """Bytes that have just come."""
        self._target.write(data)
        self.count(data)

    def start_over(self) -> None:
        """Throw away what is there: it does not belong to this file, or the hub sends it again."""
        self._target.seek(0)
        self._target.truncate()
        self._hasher = self._file.digest.hasher(self._file.n_bytes)
        self.n_bytes = 0

    def hash(self) -> str:
        """Of all bytes so far."""
        return self._hasher.hexdigest()


def _noting_what_is_here(plan: DownloadPlan, weights: PulledWeights) -> DownloadPlan:
    if not weights.is_here(plan.name):
        return plan
    here = {(file.path, file.digest) for file in weights.manifest(plan.name).files}
    if here != {(file.path, file.digest.hex) for file in plan.files}:
        return plan
    return replace(plan, is_here=True, n_left_bytes=0)


def _partial(staging: Path, file: HubFile) -> Path:
    """The hash in its name: a partial file of an older revision is never continued."""
    final = staging / file.path
    return final.with_name(f"{final.name}.{file.digest.hex[:12]}.partial")


def _n_here(staging: Path, file: HubFile) -> int:
    """Bytes of the file that an earlier download left."""
    for path in (staging / file.path, _partial(staging, file)):
        if path.is_file():
            return min(path.stat().st_size, file.n_bytes)
    return 0


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def facts_of(plan: DownloadPlan) -> dict[str, Any]:
    """The plan as data for other programs, without a secret in it."""
    return {
        "name": plan.name,
        "source": plan.source,
        "endpoint": plan.endpoint,
        "repo_id": plan.repo_id,
        "revision": plan.listing.revision,
        "files": [
            {"path": file.path, "n_bytes": file.n_bytes, file.digest.kind: file.digest.hex} for file in plan.files
        ],
        "n_bytes": plan.n_bytes,
        "n_left_bytes": plan.n_left_bytes,
        "n_free_bytes": plan.n_free_bytes,
        "folder": str(plan.folder),
        "licence": plan.licence,
        "licence_url": plan.licence_url,
        "is_gated": plan.is_gated,
        "is_here": plan.is_here,
        "refusal": None if plan.refusal is None else plan.refusal.to_wire(),
    }
