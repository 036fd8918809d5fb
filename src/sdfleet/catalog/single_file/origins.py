"""Where the weights of a component lie, when they are not in its own folder.

An import of a single file leaves a folder in the diffusers layout without weights: each component has its config.json
and an origin.json, which names the file, or another checkpoint's folder of the same component.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdfleet.catalog.headers import Header, read_json
from sdfleet.catalog.single_file.layout import read_any_header, read_layout, whole
from sdfleet.errors import BrokenCheckpoint

ORIGIN = "origin.json"
# Where imports of single files lie, beside the cards. No model's name begins like this.
SINGLE_FILES = "_single_files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A file that holds a whole checkpoint (n_file_bytes: its size at import), or a folder with one component."""

    path: Path
    n_file_bytes: int | None = None


def write_origin(folder: Path, origin: Origin) -> None:
    """Say in a component's folder where its weights are."""
    said: dict[str, object] = {"folder": str(origin.path)}
    if origin.n_file_bytes is not None:
        said = {"file": str(origin.path), "n_file_bytes": origin.n_file_bytes}
    (folder / ORIGIN).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """Where the weights of the component in `folder` are; None: in the folder itself.

    A folder that is pointed to may point on. Raises BrokenCheckpoint where the file or the folder is gone or changed.
    """
    if not (folder / ORIGIN).is_file():
        return None
    label = f"{folder.name}/{ORIGIN}"
    said = read_json(folder / ORIGIN, label=label)
    match said:
        case {"file": str(name), "n_file_bytes": int(n_file_bytes)}:
            return _checked(Origin(path=Path(name), n_file_bytes=n_file_bytes), component=folder.name)
        case {"folder": str(name)}:
            path = Path(name)
            if path == folder or not path.is_dir():
                raise BrokenCheckpoint(
                    f"the {folder.name} was taken from {path}, which is not there any more",
                    hint="put it back, or import the file again with another --base",
                )
            return read_origin(path) or Origin(path=path)
    raise BrokenCheckpoint(f"{label} names no file and no folder", hint="import the file again")


def _checked(origin: Origin, *, component: str) -> Origin:
    try:
        n_file_bytes = origin.path.stat().st_size
    except OSError as exc:
        raise BrokenCheckpoint(
            f"the {component} is in {origin.path}, which cannot be read: {exc.strerror or exc}",
            hint="put the file back, or import it again from where it is now",
        ) from exc
    if n_file_bytes != origin.n_file_bytes:
        raise BrokenCheckpoint(
            f"{origin.path} has {n_file_bytes} bytes and had {origin.n_file_bytes} when it was imported",
            hint="import it again under the same name",
        )
    return origin


def header_within(file: Path, component: str) -> Header:
    """The header of one component of a single file, under the component's own names. Raises as `read_layout`."""
    header = read_any_header(file)
    parts = read_layout(header, label=str(file)).parts
    if component not in parts:
        raise BrokenCheckpoint(f"{file} has no {component}", hint="import it again under the same name")
    return whole(parts, header, component)
