"""Which checkpoints exist on this machine: inside the package, downloaded from a hub, or imported by somebody.

A published model has a card in the package, or one without `folder` that somebody wrote into the models folder; it can
be used once its weights are in weights/<name>. An import is one small TOML card that points at the folder; the weights
are never copied, changed or deleted.
A name from a request is looked up among the cards and never becomes part of a path.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from sdfleet.catalog.adapters import Adapters
from sdfleet.catalog.cards import Card, is_name
from sdfleet.catalog.identify import Identified, drawn_elsewhere, identify
from sdfleet.catalog.published import published
from sdfleet.catalog.pulled import PulledWeights
from sdfleet.catalog.single_file.origins import ORIGIN, SINGLE_FILES
from sdfleet.errors import BrokenCheckpoint, CheckpointError, CheckpointNotFound, InvalidValue, UnknownName

log = logging.getLogger(__name__)

MAX_CARD_BYTES = 2**16
# What stands for the folder of a model whose weights are not on this machine: no path, only unlike any other.
ELSEWHERE = Path("elsewhere")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A checkpoint that a request can name, and where its weights lie.

    Where `card.backend` says that another engine or a service has it, folder may be no more than a name for it.
    """

    card: Card
    folder: Path
    is_built_in: bool


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A card inside the package, and how to find its weights (asked only when they are needed)."""

    card: Card
    find_folder: Callable[[], Path]


# (path, bytes, time of the last change in ns) of every file.
_Files = tuple[tuple[str, int, int], ...]


class Catalog:
    """The checkpoints of this machine. Looks anew on every call, so an import or a download needs no restart.

    weights: what was downloaded; adapters: LoRAs and embeddings. Nothing else is ever deleted.
    elsewhere: by the id of a backend, the cards of models that it alone has; asked on every call, must not wait.
    """

    def __init__(
        self,
        models_folder: Path,
        *,
        built_in: tuple[BuiltIn, ...] | None = None,
        published_cards: tuple[Card, ...] | None = None,
        elsewhere: Callable[[], Mapping[str, Sequence[Card]]] = dict,
    ) -> None:
        self._models_folder = models_folder
        self._inspected: dict[Path, tuple[_Files, Identified]] = {}
        self._built_in = packaged() if built_in is None else built_in
        self._published = published() if published_cards is None else published_cards
        self._elsewhere = elsewhere
        self.weights = PulledWeights(models_folder / "weights")
        self.adapters = Adapters(models_folder)

    def entries(self) -> tuple[Entry, ...]:
        """Every checkpoint that is here and has a readable card: the built-in ones first, then the others by name.

        Last those that only another backend has, except where one of that name is here.
        A card that cannot be read is logged and left out; asking for it by name says what is wrong with it.
        """
        found = []
        for built_in in self._built_in:
            try:
                found.append(Entry(card=built_in.card, folder=built_in.find_folder(), is_built_in=True))
            except CheckpointNotFound as exc:
                log.warning("built-in model is missing", extra={"card": built_in.card.name, "reason": str(exc)})
        here = [entry for card in self._cards() if (entry := self._here(card)) is not None]
        found += sorted(here, key=lambda entry: entry.card.name)
        taken = {entry.card.name for entry in found}
        for cards in self._elsewhere().values():
            found += [entry_elsewhere(card) for card in cards if card.name not in taken]
            taken |= {card.name for card in cards}
        return tuple(found)

    def resolve(self, name: str, *, backend: str | None = None) -> Entry:
        """The checkpoint that answers to this name or alias.

        backend: what that backend has by itself goes before weights on this machine; else it comes after them.
        Raises CheckpointNotFound (its weights are not here), UnknownName, or BrokenCheckpoint for a bad card.
        """
        if backend is not None and (entry := _answering(name, self._elsewhere().get(backend, ()))) is not None:
            return entry
        try:
            return self.resolve_here(name)
        except (CheckpointNotFound, UnknownName):
            cards = [card for own in self._elsewhere().values() for card in own]
            if (entry := _answering(name, cards)) is not None:
                return entry
            raise

    def resolve_here(self, name: str) -> Entry:
        """The same among those whose weights are on this machine alone. Raises as `resolve`."""
        for built_in in self._built_in:
            if built_in.card.answers_to(name):
                return Entry(card=built_in.card, folder=built_in.find_folder(), is_built_in=True)
        if name in self._own_names():
            # A card that cannot be read is left out of the others; its name says what is wrong with it.
            self._own(name)
        card = self._card(name)
        entry = self._here(card)
        if entry is None:
            raise CheckpointNotFound(
                f"the weights of {card.name} are not on this machine", hint=f"get them: sdfleet models pull {card.name}"
            )
        return entry

    def card(self, name: str) -> Card:
        """What is known of a model, whether its weights are here or not. Raises UnknownName or BrokenCheckpoint."""
        for built_in in self._built_in:
            if built_in.card.answers_to(name):
                return built_in.card
        return self._own(name) if name in self._own_names() else self._card(name)

    def absent(self) -> tuple[Card, ...]:
        """The cards of models whose weights could be pulled, by name."""
        cards = (card for card in self._cards() if self._here(card) is None)
        return tuple(sorted(cards, key=lambda card: card.name))

    def is_pulled(self, entry: Entry) -> bool:
        """Whether its weights were downloaded by sdfleet, which may delete them again."""
        return entry.folder == self.weights.path(entry.card.name)

    def forget(self, name: str) -> int:
        """Delete a downloaded model, or the card of an import, whose folder stays. Gives back the bytes freed.

        Raises UnknownName, CheckpointNotFound, InvalidValue (built in), AlreadyPulling, CheckpointError.
        """
        if any(built_in.card.answers_to(name) for built_in in self._built_in):
            raise InvalidValue("name", f"{name!r} is built in", hint="it cannot be removed")
        if name in self._own_names():
            try:
                card = self._own(name)
            except BrokenCheckpoint:
                # The cure that the card's own error names.
                return self._remove_card(name)
        else:
            card = self._card(name)
        if card.folder is not None:
            return self._remove_card(card.name)
        freed = self.weights.remove(card.name)
        if not freed:
            raise CheckpointNotFound(f"the weights of {card.name} are not on this machine", hint="nothing to remove")
        return freed

    def _remove_card(self, name: str) -> int:
        try:
            (self._models_folder / f"{name}.toml").unlink()
        except OSError as exc:
            raise CheckpointError(
                f"the card of {name} cannot be removed: {exc.strerror or exc}", hint="make its folder writable"
            ) from exc
        # What an import of a single file wrote; the file itself is not in there.
        shutil.rmtree(self._models_folder / SINGLE_FILES / name, ignore_errors=True)
        return 0

    def _card(self, name: str) -> Card:
        cards = self._cards()
        # Its own name first: another card's alias must not hide a model.
        for card in cards:
            if card.name == name:
                return card
        meant = [card for card in cards if card.answers_to(name)]
        if meant:
            return next((card for card in meant if self._here(card) is not None), meant[0])
        known = {built_in.card.name for built_in in self._built_in} | {card.name for card in cards}
        here = [*(built_in.card for built_in in self._built_in), *(card for card in cards if self._here(card))]
        raise UnknownName("model", name, known | {alias for card in here for alias in card.aliases})

    def _cards(self) -> tuple[Card, ...]:
        """Those in the models folder, and the published ones whose names they leave free."""
        own = []
        for name in self._own_names():
            try:
                own.append(self._own(name))
            except BrokenCheckpoint as exc:
                log.warning("card cannot be read", extra={"card": name, "reason": str(exc)})
        taken = {card.name for card in own}
        return (*own, *(card for card in self._published if card.name not in taken))

    def _here(self, card: Card) -> Entry | None:
        if card.folder is not None:
            return Entry(card=card, folder=Path(card.folder), is_built_in=False)
        if self.weights.is_here(card.name):
            return Entry(card=card, folder=self.weights.path(card.name), is_built_in=False)
        return None

    def inspect(self, entry: Entry) -> Identified:
        """The checked contents of the folder. Raises a CheckpointError that says everything wrong with it.

        What another backend has by itself is taken for what its card says.
        Asked for with every request, twice for a job: a folder whose files are what they were is not read again.
        """
        if entry.card.backend is not None:
            return drawn_elsewhere(entry.card, entry.folder)
        files = _files_of(entry.folder)
        known = self._inspected.get(entry.folder)
        if known is None or files is None or known[0] != files:
            known = (files or (), self._identified(entry))
            self._inspected[entry.folder] = known
        found = known[1]
        if found.family != entry.card.family:
            raise BrokenCheckpoint(
                f"the card of {entry.card.name} says {entry.card.family}, its folder holds {found.family}",
                hint="import the folder under another name",
            )
        return found

    def state_of(self, entry: Entry) -> Hashable:
        """What tells one state of a folder's files from another, as `inspect` saw it last."""
        known = self._inspected.get(entry.folder)
        return None if known is None else known[0]

    def _identified(self, entry: Entry) -> Identified:
        if not self.is_pulled(entry):
            return identify(entry.folder)
        name = entry.card.name
        cure = f"get it again: sdfleet models rm {name}, then sdfleet models pull {name}"
        return identify(entry.folder, known=self.weights.misfits(name), cure=cure)

    def add(self, folder: Path, *, name: str) -> Entry:
        """Make the folder known under this name. The same folder again renews its card.

        Raises InvalidValue (name), CheckpointError or UnsupportedByModel (folder), OSError never: an unwritable
        data folder is a CheckpointError.
        """
        folder = folder.expanduser().absolute()
        self.check_is_free(name, folder)
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

    @property
    def models_folder(self) -> Path:
        """Where cards lie, and what sdfleet wrote beside them."""
        return self._models_folder

    def check_is_free(self, name: str, folder: Path) -> None:
        """Raises InvalidValue for what cannot be a name, and for a name that stands for another folder."""
        if not is_name(name) or ".." in name:
            raise InvalidValue(
                "name", f"{name[:80]!r} cannot be used", hint="use small letters, digits, '.', '-' and '_', at most 64"
            )
        for built_in in self._built_in:
            if built_in.card.answers_to(name):
                raise InvalidValue("name", f"{name!r} is a built-in model", hint="choose another name")
        taken_by: Path | None = self.weights.path(name) if self.weights.is_here(name) else None
        if name in self._own_names():
            try:
                card = self._own(name)
                taken_by = taken_by if card.folder is None else Path(card.folder)
            except BrokenCheckpoint:
                # Importing again is the cure that the broken card's own error names.
                return
        if taken_by is not None and taken_by != folder:
            raise InvalidValue("name", f"{name!r} already stands for {taken_by}", hint="choose another name")

    def _own_names(self) -> tuple[str, ...]:
        try:
            names = [path.stem for path in self._models_folder.iterdir() if path.suffix == ".toml"]
        except FileNotFoundError:
            return ()
        except OSError as exc:
            raise CheckpointError(
                f"{self._models_folder} cannot be read: {exc.strerror or exc}", hint="set SD_HOME to another folder"
            ) from exc
        return tuple(sorted(name for name in names if is_name(name)))

    def _own(self, name: str) -> Card:
        """The card of a name out of `_own_names`, and of no other."""
        path = self._models_folder / f"{name}.toml"
        card = read_card(path)
        is_published = card.hf is not None or card.modelscope is not None
        if not is_published if card.folder is None else not Path(card.folder).is_absolute():
            raise BrokenCheckpoint(
                f"{path} names no absolute folder, and no repository on a hub",
                hint="remove that file and import it again",
            )
        if card.name != name:
            raise BrokenCheckpoint(f"{path} is the card of {card.name!r}", hint="rename the file or its `name`")
        return card


def entry_elsewhere(card: Card) -> Entry:
    """The entry of a model that only another backend has."""
    folder = ELSEWHERE / str(card.backend) / card.name if card.folder is None else Path(card.folder)
    return Entry(card=card, folder=folder, is_built_in=False)


def _answering(name: str, cards: Sequence[Card]) -> Entry | None:
    """The model of this name, else the first that answers to it."""
    found = [card for card in cards if card.answers_to(name)]
    best = next((card for card in found if card.name == name), found[0] if found else None)
    return None if best is None else entry_elsewhere(best)


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


def _files_of(folder: Path) -> _Files | None:
    """What tells one state of a folder from another; None where that also hangs on files elsewhere."""
    found = []
    try:
        for parent, _, names in os.walk(folder, followlinks=True):
            if ORIGIN in names:
                return None
            for name in names:
                path = os.path.join(parent, name)  # noqa: PTH118 - a Path for each file took most of the time
                about = os.stat(path)  # noqa: PTH116 - as above
                found.append((path, about.st_size, about.st_mtime_ns))
    except OSError:
        return None
    return tuple(sorted(found)) or None
