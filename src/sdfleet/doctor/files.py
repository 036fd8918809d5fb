"""The folders of sdfleet: writable, with room, private where they should be, and not full of leftovers."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, ok, warning
from sdfleet.doctor.machine import Machine, gb
from sdfleet.errors import InvalidValue, StorageError
from sdfleet.storage.examination import look

# A picture takes 2 MB and the database far less; a download says by itself what it needs.
LEAST_FREE_BYTES = 500_000_000
FEW_FREE_BYTES = 5_000_000_000
LARGE_CACHE_BYTES = 10_000_000_000
OLD_S = 7 * 24 * 3600.0
# A clock may be wrong by this without anybody noticing; certificates and tokens are finer than that.
CLOCK_SLACK_S = 24 * 3600.0
# A clock from before this release: a board without a battery wakes up in 1970 or at its firmware's date.
RELEASED_S = 1_795_000_000.0
MOST_FILES = 200_000


def writable(machine: Machine) -> Finding:
    """Whether files can be made in the data folder and in the folder of pictures."""
    settings = machine.settings
    faults, seen = [], set()
    for folder in (settings.home, settings.models_folder, settings.outputs_folder, settings.cache_folder):
        place = _nearest(folder)
        if place in seen:
            continue
        seen.add(place)
        try:
            with tempfile.TemporaryFile(dir=place, prefix=".sdfleet-doctor-") as file:
                file.write(b"\0" * 4096)
                file.flush()
        except OSError as exc:
            faults.append(f"{folder}: {exc.strerror or exc}")
    if faults:
        return fault(f"nothing can be written to {'; '.join(faults)}")
    return ok(f"{settings.home} can be written to")


def disk(machine: Machine) -> Finding:
    """Whether the disks of these folders have room."""
    settings = machine.settings
    worst: tuple[int, Path] | None = None
    for folder in (settings.home, settings.models_folder, settings.outputs_folder):
        try:
            free = shutil.disk_usage(_nearest(folder)).free
        except OSError:
            continue
        if worst is None or free < worst[0]:
            worst = (free, folder)
    if worst is None:
        return not_applicable("the system does not tell how much is free")
    free, folder = worst
    what = f"{gb(free)} are free on the disk of {folder}"
    if free < LEAST_FREE_BYTES:
        return fault(what)
    return warning(what) if free < FEW_FREE_BYTES else ok(what)


def leftovers(machine: Machine) -> Finding:
    """What nobody needs any more: downloads that were given up, folders without a card, a cache that has grown."""
    settings, now_s = machine.settings, machine.clock()
    found, cures = [], []
    for part in _children(settings.models_folder / "weights", ".*.part"):
        newest_s, n_bytes = _extent(part)
        if now_s - newest_s > OLD_S:
            name = part.name.removeprefix(".").removesuffix(".part")
            found.append(f"a download of {name} that stopped {_days(now_s - newest_s)} ago holds {gb(n_bytes)}")
            cures.append(f"sdfleet models pull {name} (goes on), or rm -r '{part}'")
    for folder in _children(settings.models_folder / "weights", "[!.]*"):
        if folder.is_dir() and not (folder / "sdfleet.json").is_file():
            found.append(f"{folder} has no sdfleet.json: it is no download of ours, or a broken one")
            cures.append(f"rm -r '{folder}'")
    _, n_bytes = _extent(settings.cache_folder)
    if n_bytes > LARGE_CACHE_BYTES:
        found.append(f"the cache holds {gb(n_bytes)}; all of it can be made again")
        cures.append(f"rm -r '{settings.cache_folder}'")
    faults = _children(settings.logs_folder, "fault-*.log")
    if len(faults) > 20:
        found.append(f"{len(faults)} tracebacks of faults lie in {settings.logs_folder}")
        cures.append(f"report the newest, then rm '{settings.logs_folder}'/fault-*.log")
    return warning("; ".join(found), "; ".join(cures)) if found else ok("nothing was left behind")


def private(machine: Machine) -> Finding:
    """Whether other users of this machine can read keys and prompts."""
    home = machine.settings.home
    names = ("signing.key", "server.json", "sdfleet.db", "sdfleet.db-wal", "sdfleet.toml")
    files = [home / name for name in names if (home / name).is_file()]
    if not files:
        return not_applicable(f"there is neither a key nor a database in {home} yet")
    if not hasattr(files[0].stat(), "st_uid") or _is_windows():
        return not_applicable("this system has other rights than those that are looked at")
    # The file of settings may hold keys and tokens, and often does not.
    secret_words = (b"key", b"token", b"database_url")
    loose = []
    for file in files:
        if file.stat().st_mode & 0o077 == 0:
            continue
        if file.name == "sdfleet.toml" and not any(word in file.read_bytes() for word in secret_words):
            continue
        loose.append(file)
    if not loose:
        return ok("keys and prompts can be read by their owner alone")
    names_shown = ", ".join(file.name for file in loose)
    quoted = " ".join(f"'{file}'" for file in loose)
    return warning(f"other users of this machine can read {names_shown} in {home}", f"chmod 600 {quoted}")


def clock(machine: Machine) -> Finding:
    """Whether the clock is believable: by this release, by the newest job, and by a hub where one may be asked."""
    now_s = machine.clock()
    shown = time.strftime("%Y-%m-%d %H:%M", time.gmtime(now_s))
    if now_s < RELEASED_S:
        return fault(f"the clock says {shown} UTC, a time before this sdfleet was made")
    url = machine.settings.database_url
    try:
        seen = look(None if url is None else url.get_secret_value(), home=machine.settings.home, since_s=now_s)
    except (StorageError, InvalidValue):
        seen = None  # the check `database` tells
    if seen is not None and seen.newest_s is not None and seen.newest_s > now_s + CLOCK_SLACK_S:
        later = _days(seen.newest_s - now_s)
        return warning(f"the clock says {shown} UTC, and the newest job was accepted {later} after that")
    return ok(f"the clock says {shown} UTC")


def _nearest(folder: Path) -> Path:
    """The folder, or where it would be made."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            if place.exists():
                return place
    return folder


def _children(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _extent(folder: Path) -> tuple[float, int]:
    """When something under the folder last changed, and its bytes."""
    newest_s, n_bytes = 0.0, 0
    for path in _some(folder):
        with contextlib.suppress(OSError):
            about = path.lstat()
            newest_s, n_bytes = max(newest_s, about.st_mtime), n_bytes + about.st_size
    return newest_s, n_bytes


def _some(folder: Path) -> Iterator[Path]:
    yield folder
    for n, path in enumerate(folder.rglob("*")):
        if n > MOST_FILES:
            return
        yield path


def _days(seconds: float) -> str:
    days = round(seconds / 86400)
    return "a day" if days == 1 else f"{days} days"


def _is_windows() -> bool:
    import sys

    return sys.platform == "win32"


ENTRIES = (
    Entry(
        id="home-not-writable",
        title="The data folder cannot be written to",
        symptoms=("Permission denied", "Read-only file system", "cannot be used: Not a directory"),
        cause="The folder belongs to another user (a command was run with sudo once), its disk is mounted read-only, "
        "or a container has it without the right to write.",
        looks="a file is made, and removed, in the data folder and in those of models and pictures",
        cure='give it to yourself: sudo chown -R "$USER" FOLDER; or name another with SD_HOME and SD_OUTPUTS',
        check=writable,
        signs=(
            r"permission denied", r"read-only file system", r"errno (13|30)\b", r"permissionerror", r"not a directory",
            r"attempt to write a readonly database", r"it may not be written", r"quota exceeded",
        ),
        codes=("output_not_writable",),
    ),
    Entry(
        id="disk-full",
        title="The disk is full, or nearly",
        symptoms=("No space left on device", "database or disk is full", "a download stops in the middle"),
        cause="Models take gigabytes each; pictures and caches add up.",
        looks="what is free on the disks of models, pictures and the database",
        cure="sdfleet models du shows what models take; sdfleet models rm NAME; SD_KEEP_OUTPUTS_DAYS=30",
        check=disk,
        signs=(
            r"no space left", r"disk is full", r"errno 28\b", r"not enough (free )?(disk )?space", r"enospc",
            r"file too large", r"has no room for",
        ),
        codes=("disk_full",),
    ),
    Entry(
        id="leftovers",
        title="Old downloads and caches take room",
        symptoms=("the data folder grows", "a model that was never finished"),
        cause="A download that was cut off is kept for the next try; caches of compiled models are kept for speed.",
        looks="unfinished downloads older than a week, folders among the weights that are none of ours, large caches",
        cure="sdfleet models du; then remove what it names",
        check=leftovers,
        limit_s=10.0,
    ),
    Entry(
        id="file-rights",
        title="Keys can be read by other users",
        symptoms=("another user of this machine can call the server", "signing.key is world-readable"),
        cause="The file was copied or restored with other rights than sdfleet gives it.",
        looks="the rights of signing.key, server.json, the database and sdfleet.toml where it holds a secret",
        cure="chmod 600 FILE",
        check=private,
    ),
    Entry(
        id="clock",
        title="The clock is wrong",
        symptoms=("certificate is not yet valid", "links to pictures have expired at once", "token used too early"),
        cause="A machine without a battery for its clock, a virtual machine that slept, or no synchronisation.",
        looks="the clock against the date of this release and against the newest job",
        cure="synchronise it: sudo timedatectl set-ntp true (Linux), sudo sntp -sS time.apple.com (macOS)",
        check=clock,
        signs=(
            r"certificate is not yet valid", r"certificate has expired", r"request time too skewed",
            r"used too early",
        ),
    ),
)  # fmt: skip
