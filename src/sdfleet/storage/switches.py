"""What was switched on or off while the server ran, kept in `home/switches.json` for its next life."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sdfleet.errors import OutputNotWritable, StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """image_generation: whether new requests for pictures are taken."""

    image_generation: bool = True


class SwitchBoard:
    """The switches of one home. Raises StorageError when its file makes no sense."""

    def __init__(self, home: Path) -> None:
        self._path = home / "switches.json"
        self.now = self._read()

    def turn(self, **switches: bool) -> Switches:
        """How they stand after this change, which is on the disk. Raises OutputNotWritable. Blocks."""
        now = replace(self.now, **switches)
        written = self._path.with_suffix(".new")
        try:
            with written.open("w", encoding="ascii") as file:
                json.dump(asdict(now), file)
                file.flush()
                os.fsync(file.fileno())
            written.replace(self._path)
        except OSError as exc:
            raise OutputNotWritable(
                f"{self._path} cannot be written: {exc.strerror or exc}", hint="see SD_HOME"
            ) from exc
        self.now = now
        return now

    def _read(self) -> Switches:
        try:
            # What a newer version may know beside these is left out.
            return TypeAdapter(Switches).validate_json(self._path.read_bytes(), strict=True)
        except FileNotFoundError:
            return Switches()
        except (OSError, ValidationError) as exc:
            raise StorageError(f"{self._path} cannot be read: {exc}", hint="remove it; everything is on then") from exc
