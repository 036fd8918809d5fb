"""LoRAs and embeddings of this machine: files in the models folder, those that were imported and those put there.

    models/loras/NAME.safetensors                     models/embeddings/NAME.safetensors
    models/loras/NAME/adapter_model.safetensors       PEFT's, with adapter_config.json beside it

A file's name without its ending is what it is called. Looked at anew with every call, so a file that is put there
needs no restart. Only safetensors are read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdfleet.catalog.adapter_header import PEFT_CONFIG, AdapterFacts, Kind, read_facts
from sdfleet.catalog.headers import PICKLES, Header, read_header
from sdfleet.catalog.single_file.gguf_header import is_gguf
from sdfleet.catalog.single_file.layout import refuse_pickle
from sdfleet.domain import MAX_LORA_NAME_CHARS, AdapterFile
from sdfleet.errors import (
    BrokenCheckpoint,
    CheckpointError,
    InvalidValue,
    PickleRefused,
    SdfleetError,
    UnknownName,
    UnsupportedByModel,
)

log = logging.getLogger(__name__)

FOLDERS: Mapping[Kind, str] = {"lora": "loras", "embedding": "embeddings"}
TITLES: Mapping[Kind, str] = {"lora": "LoRA", "embedding": "embedding"}
PEFT_FILE = "adapter_model.safetensors"
_ENDING = ".safetensors"
# What a name may hold: `<lora:name:1>` must be able to say it, and it is a file's.
_NAME = re.compile(r"[^/\\<>:\x00-\x1f]+")
_HASHED_AT_ONCE = 2**20
_SHOWN_DIGITS = 12
# Folders within folders that are looked into, as other programs' users keep them.
_DEEPEST = 4

_State = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One file, understood. facts: what it is; metadata: what its maker wrote into it."""

    name: str
    path: Path
    n_bytes: int
    facts: AdapterFacts
    metadata: Mapping[str, str]

    @property
    def alias(self) -> str:
        """What its maker called it; its name where nothing was said."""
        return self.metadata.get("ss_output_name") or self.name


class Adapters:
    """What lies in the two folders. Raises the errors of a file only to who asks for that file by name."""

    def __init__(self, models_folder: Path) -> None:
        self._models_folder = models_folder
        # By path; both are kept for as long as the file is what it was.
        self._understood: dict[Path, tuple[_State, Adapter | None]] = {}
        self._hashed: dict[Path, tuple[_State, str]] = {}

    def folder(self, kind: Kind) -> Path:
        """Where the files of one kind lie."""
        return self._models_folder / FOLDERS[kind]

    def all(self, kind: Kind) -> tuple[Adapter, ...]:
        """Every readable one, by name; one that cannot be read is logged and left out."""
        found = []
        for name, path in self._files(kind).items():
            try:
                adapter = self._understand(path, name=name)
            except SdfleetError as exc:
                log.warning("an adapter cannot be read", extra={"path": str(path), "reason": str(exc)})
                continue
            if adapter is not None and adapter.facts.kind == kind:
                found.append(adapter)
        return tuple(sorted(found, key=lambda adapter: adapter.name.casefold()))

    def find(self, kind: Kind, name: str) -> Adapter:
        """The one of this name, whatever its case, or of this alias. Raises UnknownName, and the fault of its file."""
        files = self._files(kind)
        same = [known for known in files if known == name] or [k for k in files if k.casefold() == name.casefold()]
        if same:
            adapter = self._understand(files[same[0]], name=same[0])
            if adapter is None or adapter.facts.kind != kind:
                raise UnsupportedByModel(
                    f"{files[same[0]]} is no {TITLES[kind]}",
                    hint="move it away, or get it again from where it came from",
                )
            return adapter
        known = self.all(kind)
        for adapter in known:
            if adapter.alias == name:
                return adapter
        raise self._unknown(kind, name, (adapter.name for adapter in known))

    def used(self, adapter: Adapter) -> AdapterFile:
        """The adapter as a drawing names it. Reads the whole file the first time."""
        return AdapterFile(name=adapter.name, path=str(adapter.path), content=self.content(adapter.path))

    def content(self, path: Path) -> str:
        """The first 12 hex digits of the SHA-256 of a file's weights; what is written beside them does not count.

        It is what AUTOMATIC1111's "Lora hashes" have.
        """
        state = _state(path)
        known = self._hashed.get(path)
        if known is None or known[0] != state:
            known = self._hashed[path] = (state, _hash(path))
        return known[1]

    def words(self) -> dict[str, Adapter]:
        """Embeddings by what they are called in a prompt, in small letters: their names, and the words inside them."""
        found: dict[str, Adapter] = {}
        for adapter in self.all("embedding"):
            if adapter.facts.word:
                found.setdefault(adapter.facts.word.casefold(), adapter)
        return found | {adapter.name.casefold(): adapter for adapter in self.all("embedding")}

    def identify(self, file: Path) -> AdapterFacts | None:
        """What a file outside the folders is; None when it is no adapter. Raises PickleRefused and its faults."""
        refuse_pickle(file)
        return None if is_gguf(file) else read_facts(read_header(file), label=str(file))

    def add(self, file: Path, facts: AdapterFacts, *, name: str | None = None) -> Adapter:
        """A copy of the file in its folder, under its own name or another. The same again renews it.

        Raises InvalidValue for a name that is taken or cannot be one, CheckpointError where nothing can be written.
        """
        file = file.expanduser().absolute()
        is_peft = file.name == PEFT_FILE or (file.parent / PEFT_CONFIG).is_file()
        name = name or (file.parent.name if file.name == PEFT_FILE else file.stem)
        check_name(name)
        other: Kind = "embedding" if facts.kind == "lora" else "lora"
        taken = self._files(facts.kind).get(name)
        if taken is not None and self.content(taken) != self.content(file):
            raise InvalidValue("name", f"{name!r} already stands for {taken}", hint="give another one with --name")
        if name in self._files(other):
            raise InvalidValue("name", f"{name!r} is an {TITLES[other]} here", hint="give another one with --name")
        folder = self.folder(facts.kind)
        target = folder / name / PEFT_FILE if is_peft else folder / f"{name}{_ENDING}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_peft and (file.parent / PEFT_CONFIG).is_file():
                _copy(file.parent / PEFT_CONFIG, target.parent / PEFT_CONFIG)
            _copy(file, target)
        except OSError as exc:
            raise CheckpointError(
                f"{file} cannot be copied to {target}: {exc.strerror or exc}", hint="make room there, or set SD_HOME"
            ) from exc
        return self.find(facts.kind, name)

    def remove(self, adapter: Adapter) -> int:
        """Delete the file from its folder; the bytes freed. What a link points at stays. Raises CheckpointError."""
        folder = self.folder(adapter.facts.kind)
        own_folder = folder.resolve() == folder.absolute()
        if not own_folder or not adapter.path.parent.resolve().is_relative_to(self._models_folder.resolve()):
            raise CheckpointError(f"{adapter.path} is in a folder of another program", hint="remove it there")
        try:
            n_bytes = 0 if adapter.path.is_symlink() else adapter.n_bytes
            adapter.path.unlink()
            if adapter.path.name == PEFT_FILE:
                (adapter.path.parent / PEFT_CONFIG).unlink(missing_ok=True)
                if not any(adapter.path.parent.iterdir()):
                    adapter.path.parent.rmdir()
        except OSError as exc:
            raise CheckpointError(f"{adapter.path} cannot be removed: {exc.strerror or exc}") from exc
        return n_bytes

    def _unknown(self, kind: Kind, name: str, known: Iterable[str]) -> SdfleetError:
        """UnknownName with what to do; or PickleRefused where just that file lies there as a pickle."""
        for ending in PICKLES:
            pickle = self.folder(kind) / f"{name}{ending}"
            if _NAME.fullmatch(name) and pickle.is_file():
                return PickleRefused(str(pickle))
        error = UnknownName(TITLES[kind], name, known)
        error.hint += f"; put its .safetensors file into {self.folder(kind)}, or `sdfleet models import FILE`"
        return error

    def _files(self, kind: Kind) -> dict[str, Path]:
        """Files by name; of two with one name the first by path."""
        found: dict[str, Path] = {}
        root = self.folder(kind)
        for parent, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            if len(Path(parent).relative_to(root).parts) >= _DEEPEST:
                folders.clear()
            for file in sorted(files):
                path = Path(parent, file)
                if path.suffix.lower() == _ENDING:
                    found.setdefault(path.parent.name if file == PEFT_FILE and path.parent != root else path.stem, path)
        return found

    def _understand(self, path: Path, *, name: str) -> Adapter | None:
        state = _state(path)
        known = self._understood.get(path)
        if known is None or known[0] != state:
            header = read_header(path)
            facts = read_facts(header, label=str(path))
            adapter = None if facts is None else _adapter(path, header, facts, name=name, n_bytes=state[0])
            known = self._understood[path] = (state, adapter)
        return known[1]


def check_name(name: str) -> None:
    """Raises InvalidValue for what cannot be an adapter's name."""
    is_one = _NAME.fullmatch(name) is not None and not name.startswith(".") and len(name) <= MAX_LORA_NAME_CHARS
    if not is_one or name != name.strip():
        raise InvalidValue("name", f"{name[:80]!r} cannot be used", hint="leave out / \\ < > : and dots in front")


def pattern_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """What finds these words where they stand alone in a text, the longest first; None for no words.

    >>> pattern_of(["bad-hands", "bad", "<cat>"]).findall("Bad-hands, (bad:1.2) badly a <cat>")
    ['Bad-hands', 'bad', '<cat>']
    """
    longest_first = sorted(words, key=len, reverse=True)
    if not longest_first:
        return None
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def _adapter(path: Path, header: Header, facts: AdapterFacts, *, name: str, n_bytes: int) -> Adapter:
    return Adapter(name=name, path=path, n_bytes=n_bytes, facts=facts, metadata=header.metadata)


def _state(path: Path) -> _State:
    try:
        found = path.stat()
    except OSError as exc:
        raise BrokenCheckpoint(f"{path} cannot be read: {exc.strerror or exc}", hint="put the file back") from exc
    return found.st_size, found.st_mtime_ns


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            file.seek(8 + n_header)
            digest = hashlib.sha256()
            while chunk := file.read(_HASHED_AT_ONCE):
                digest.update(chunk)
    except OSError as exc:
        raise BrokenCheckpoint(f"{path} cannot be read: {exc.strerror or exc}", hint="put the file back") from exc
    return digest.hexdigest()[:_SHOWN_DIGITS]


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    if target.exists() and target.samefile(source):
        return
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    os.close(handle)
    try:
        shutil.copyfile(source, temporary)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
