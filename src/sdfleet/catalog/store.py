"""Which checkpoints exist on this machine: those inside the package, and folders somebody imported.

An import is one small TOML card that points at the folder; the weights are never copied, changed or deleted.
A name from a request is looked up among the cards and never becomes part of a path.
"""

from __future__ import annotations

import logging
import os
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from sdfleet.catalog.cards import Card, is_name
from sdfleet.catalog.identify import Identified, identify
from sdfleet.errors import BrokenCheckpoint, CheckpointError, CheckpointNotFound, InvalidValue, UnknownName

log = logging.getLogger(__name__)

MAX_CARD_BYTES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A checkpoint that a request can name, and where its weights lie."""

    card: Card
    folder: Path
    is_built_in: bool


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A card inside the package, and how to find its weights (asked only when they are needed)."""

    card: Card
    find_folder: Callable[[], Path]


class Catalog:
    """The checkpoints of this machine. Reads the cards anew on every call, so an import needs no restart."""

    def __init__(self, models_folder: Path, *, built_in: tuple[BuiltIn, ...] | None = None) -> None:
        self._models_folder = models_folder
        self._built_in = packaged() if built_in is None else built_in

    def entries(self) -> tuple[Entry, ...]:
        """Every checkpoint with a readable card: the built-in ones first, then imports by name.

        A card that cannot be read is logged and left out; asking for it by name says what is wrong with it.
        """
        found = []
        for built_in in self._built_in:
            try:
                found.append(Entry(card=built_in.card, folder=built_in.find_folder(), is_built_in=True))
            except CheckpointNotFound as exc:
                log.warning("built-in model is missing", extra={"card": built_in.card.name, "reason": str(exc)})
        for name in self._imported_names():
            try:
                found.append(self._imported(name))
            except BrokenCheckpoint as exc:
                log.warning("card cannot be read", extra={"card": name, "reason": str(exc)})
        return tuple(found)

    def resolve(self, name: str) -> Entry:
        """The checkpoint that answers to this name or alias. Raises UnknownName, or BrokenCheckpoint for a bad card."""
        for built_in in self._built_in:
            if name == built_in.card.name or name in built_in.card.aliases:
                return Entry(card=built_in.card, folder=built_in.find_folder(), is_built_in=True)
        imported = self._imported_names()
        if name in imported:
            return self._imported(name)
        entries = self.entries()
        for entry in entries:
            if name in entry.card.aliases:
                return entry
        known = {entry.card.name for entry in entries} | {alias for entry in entries for alias in entry.card.aliases}
        raise UnknownName("model", name, known)

    def inspect(self, entry: Entry) -> Identified:
        """The checked contents of the folder. Raises a CheckpointError that says everything wrong with it."""
        found = identify(entry.folder)
        if found.family != entry.card.family:
            raise BrokenCheckpoint(
                f"the card of {entry.card.name} says {entry.card.family}, its folder holds {found.family}",
                hint="import the folder under another name",
            )
        return found

    def add(self, folder: Path, *, name: str) -> Entry:
        """Make the folder known under this name. The same folder again renews its card.

        Raises InvalidValue (name), CheckpointError or UnsupportedByModel (folder), OSError never: an unwritable
        data folder is a CheckpointError.
        """
        if not is_name(name) or ".." in name:
            raise InvalidValue(
                "name", f"{name[:80]!r} cannot be used", hint="use small letters, digits, '.', '-' and '_', at most 64"
            )
        folder = folder.expanduser().absolute()
        self._check_is_free(name, folder)
        found = identify(folder)
        card = Card(
            name=name,
            family=found.family,
            width_px=found.width_px,
            height_px=found.height_px,
            steps=found.steps,
            guidance=found.guidance,
            sampler=found.sampler,
            strength=found.strength,
            ignores=found.ignores,
            folder=str(folder),
        )
        try:
            _write(self._models_folder / f"{name}.toml", card)
        except OSError as exc:
            raise CheckpointError(
                f"the card cannot be saved in {self._models_folder}: {exc.strerror or exc}",
                hint="make that folder writable, or set SD_HOME to another one",
            ) from exc
        return Entry(card=card, folder=folder, is_built_in=False)

    def _check_is_free(self, name: str, folder: Path) -> None:
        for built_in in self._built_in:
            if name == built_in.card.name or name in built_in.card.aliases:
                raise InvalidValue("name", f"{name!r} is a built-in model", hint="choose another name")
        if name not in self._imported_names():
            return
        try:
            taken_by = self._imported(name).folder
        except BrokenCheckpoint:
            # Importing again is the cure that the broken card's own error names.
            return
        if taken_by != folder:
            raise InvalidValue("name", f"{name!r} already stands for {taken_by}", hint="choose another name")

    def _imported_names(self) -> tuple[str, ...]:
        try:
            names = [path.stem for path in self._models_folder.iterdir() if path.suffix == ".toml"]
        except FileNotFoundError:
            return ()
        except OSError as exc:
            raise CheckpointError(
                f"{self._models_folder} cannot be read: {exc.strerror or exc}", hint="set SD_HOME to another folder"
            ) from exc
        return tuple(sorted(name for name in names if is_name(name)))

    def _imported(self, name: str) -> Entry:
        """The entry of a name out of `_imported_names`, and of no other."""
        path = self._models_folder / f"{name}.toml"
        card = read_card(path)
        if card.folder is None or not Path(card.folder).is_absolute():
            raise BrokenCheckpoint(f"{path} names no absolute folder", hint="remove that file and import it again")
        if card.name != name:
            raise BrokenCheckpoint(f"{path} is the card of {card.name!r}", hint="rename the file or its `name`")
        return Entry(card=card, folder=Path(card.folder), is_built_in=False)


def packaged() -> tuple[BuiltIn, ...]:
    """The checkpoints that come with sdfleet."""
    text = resources.files("sdfleet.catalog").joinpath("data/starter.toml").read_text(encoding="utf-8")
    return (BuiltIn(Card.model_validate(tomllib.loads(text)), _starter_folder),)


def _starter_folder() -> Path:
    try:
        from sdfleet.starter import weights_path
    except ImportError as exc:
        raise CheckpointNotFound(
            "the built-in model is not part of this installation", hint="install sdfleet again"
        ) from exc
    folder = Path(weights_path())
    if not folder.is_dir():
        raise CheckpointNotFound(
            f"the weights of the built-in model are not at {folder}",
            hint="install sdfleet again, or make them with `sdfleet train starter`",
        )
    return folder


def read_card(path: Path) -> Card:
    """The card in a TOML file. Raises BrokenCheckpoint, naming the first field that is wrong."""
    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            raise BrokenCheckpoint(f"{path} is too large for a card", hint="remove that file and import it again")
        return Card.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as exc:
        fault = exc.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "card"
        raise BrokenCheckpoint(f"{path}: {where}: {fault['msg']}", hint="correct it, or import again") from exc
    except (OSError, ValueError) as exc:
        raise BrokenCheckpoint(f"{path} cannot be read: {exc}", hint="correct it, or import again") from exc


def _write(path: Path, card: Card) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = tomli_w.dumps(card.model_dump(mode="json", exclude_none=True, exclude_defaults=True))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".card-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
