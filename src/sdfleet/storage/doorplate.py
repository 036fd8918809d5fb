"""Where the server of a home answers, and a key for commands of whoever owns that home: `home/server.json`.

The key is made anew at every start and lies in a file that its owner alone can read, beside the database that this
person could change anyway. It spares `sdfleet models load` a key where the server wants one from everybody.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sdfleet.errors import OutputNotWritable

_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what is listened on, not where we listen


@dataclass(frozen=True, slots=True, kw_only=True)
class Doorplate:
    """An address of this machine, and the key that is taken there."""

    host: str
    port: int
    key: str = field(repr=False)


@contextlib.contextmanager
def hung(home: Path, *, host: str, port: int) -> Iterator[Doorplate]:
    """While inside, `read` finds the server that listens on this address. Raises OutputNotWritable."""
    plate = Doorplate(host=_EVERY_ADDRESS.get(host, host), port=port, key=secrets.token_urlsafe(32))
    path = home / "server.json"
    try:
        home.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # so that the new one has the rights that it is made with
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            json.dump(asdict(plate), file)
    except OSError as exc:
        raise OutputNotWritable(f"{path} cannot be written: {exc.strerror or exc}", hint="see SD_HOME") from exc
    try:
        yield plate
    finally:
        path.unlink(missing_ok=True)


def read(home: Path) -> Doorplate | None:
    """The plate of the server that was started last; it may have been killed. None where there is none."""
    try:
        said = json.loads((home / "server.json").read_text(encoding="ascii"))
        return Doorplate(host=str(said["host"]), port=int(said["port"]), key=str(said["key"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
