"""Every entry, and how one is found by its id."""

from __future__ import annotations

from collections.abc import Iterable

from sdfleet.doctor import backends, devices, files, hubs, installation, language, memory, models, serving
from sdfleet.doctor.entry import Entry
from sdfleet.errors import UnknownName

GROUPS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
    ("What is installed", installation.ENTRIES),
    ("Devices and number formats", devices.ENTRIES),
    ("Memory", memory.ENTRIES),
    ("Files and folders", files.ENTRIES),
    ("The server", serving.ENTRIES),
    ("Models", models.ENTRIES),
    ("Hubs: downloads, 401 and 403", hubs.ENTRIES),
    ("Other backends", backends.ENTRIES),
    ("Text, embeddings and speech", language.ENTRIES),
)
ENTRIES: tuple[Entry, ...] = tuple(entry for _, entries in GROUPS for entry in entries)


def entry(name: str) -> Entry:
    """The entry of this id. Raises UnknownName with the nearest ones."""
    found = next((each for each in ENTRIES if each.id == name), None)
    if found is None:
        raise UnknownName("check", name, (each.id for each in ENTRIES))
    return found


def checks(named: Iterable[str] = ()) -> tuple[Entry, ...]:
    """What to run: every check, or for each name its own or the one that would meet it.

    Raises UnknownName, also for an entry that nothing can be looked at for.
    """
    asked = [entry(name) for name in named]
    if not asked:
        return tuple(each for each in ENTRIES if each.check is not None)
    found: dict[str, Entry] = {}
    for each in asked:
        if each.check is None and each.checked_by:
            each = entry(each.checked_by)  # noqa: PLW2901 - the check that stands for it
        found[each.id] = each
    return tuple(found.values())


def quick_checks() -> tuple[Entry, ...]:
    """Those that a server can run beside its work."""
    return tuple(each for each in ENTRIES if each.check is not None and each.effort == "quick")
