"""The virtual environment of one engine of another project: `HOME/backends/NAME`, made after a yes.

Everything in it is pinned in NAME.toml and installed without its own dependencies, so that what runs is what was tried.
The note that it is whole is written last: an installation that was cut off is none, and the next one begins anew.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import get_args

from sdfleet.backends.local import LocalBackend
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import launch
from sdfleet.engine.guests.fitting import GuestId
from sdfleet.errors import BackendFailed, BackendUnavailable, InvalidValue, SdfleetError, UnknownName
from sdfleet.settings import engine_environment

GUESTS: tuple[GuestId, ...] = get_args(GuestId)
NOTE = "installed.json"
# An index may be slow and a wheel large; pip itself gives up on a connection after 15 s of silence, five times.
INSTALL_DEADLINE_S = 3600.0
_LAST_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One pin. n_bytes: installed, as measured on Linux; 0 where it was not."""

    name: str
    version: str
    licence: str
    n_bytes: int

    @property
    def requirement(self) -> str:
        """As pip wants it."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """What is installed for a guest on this kind of machine. fingerprint: changes with any of it."""

    guest: GuestId
    title: str
    about: str
    homepage: str
    python: tuple[int, int]
    module: str
    packages: tuple[Package, ...]
    fingerprint: str

    @property
    def version(self) -> str:
        """The guest's own."""
        return self.packages[0].version

    @property
    def n_bytes(self) -> int:
        """All of it on disk, about."""
        return sum(package.n_bytes for package in self.packages)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallConsent:
    """Somebody has seen these pins and said yes."""

    fingerprint: str


def guest_of(name: str) -> GuestId:
    """The guest of that name. Raises UnknownName."""
    for guest in GUESTS:
        if name.lower() == guest:
            return guest
    raise UnknownName("backend to install", name, GUESTS)


@functools.cache
def pins_of(guest: GuestId, *, system: str = sys.platform) -> Pins:
    """What this sdfleet was tried with. system: as `sys.platform` has it."""
    text = resources.files("sdfleet.backends.guests").joinpath(f"{guest}.toml").read_text(encoding="utf-8")
    read = tomllib.loads(text)
    packages = tuple(
        Package(name=each["name"], version=each["version"], licence=each["licence"], n_bytes=each.get("bytes", 0))
        for each in read["packages"]
        if each.get("only_on", system) == system
    )
    wanted = "\n".join(package.requirement for package in packages)
    return Pins(
        guest=guest,
        title=read["title"],
        about=read["about"],
        homepage=read["homepage"],
        python=(read["python"][0], read["python"][1]),
        module=read["module"],
        packages=packages,
        fingerprint=hashlib.sha256(wanted.encode()).hexdigest()[:16],
    )


def why_not_here(*, system: str = sys.platform, machine: str | None = None) -> str:
    """Why MLX cannot run on this kind of machine; empty where it can.

    >>> why_not_here(system="win32"), why_not_here(system="darwin", machine="arm64")
    ('MLX runs on Apple silicon, and on Linux for trying it; this is win32', '')
    """
    machine = platform.machine() if machine is None else machine
    if system == "linux" or (system == "darwin" and machine == "arm64"):
        return ""
    here = f"a Mac with {machine}" if system == "darwin" else system
    return f"MLX runs on Apple silicon, and on Linux for trying it; this is {here}"


class GuestVenv:
    """The environment of one guest below `home`, whether it is there or not."""

    def __init__(self, home: Path, guest: GuestId) -> None:
        self.guest = guest
        self.folder = home / "backends" / guest
        self.pins = pins_of(guest)

    @property
    def python(self) -> Path:
        """Its Python."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def command(self) -> Sequence[str]:
        """What starts the guest's engine, as `LocalBackend` wants it."""
        return (str(self.python), "-I", str(launch.__file__), "--engine", self.pins.module)

    def reason(self) -> str:
        """Why the guest cannot draw, and what to do; empty where it can. Reads one small file."""
        install = f"sdfleet backend install {self.guest}"
        if why := why_not_here():
            return why
        try:
            note = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
            fingerprint = note["fingerprint"]
        except FileNotFoundError:
            return f"{self.pins.title} is not installed: {install}"
        except (OSError, ValueError, KeyError, TypeError):
            return f"the installation of {self.pins.title} cannot be read; make it again: {install}"
        if fingerprint != self.pins.fingerprint:
            return f"another {self.pins.title} is installed than this sdfleet was tried with: {install}"
        if not self.python.exists():
            return f"the Python that {self.pins.title} was installed with is gone; make it again: {install}"
        return ""

    @property
    def is_here(self) -> bool:
        """Whether there is anything to remove."""
        return self.folder.exists()

    def consent(self) -> InstallConsent:
        """For whoever has shown the pins and was told yes."""
        return InstallConsent(fingerprint=self.pins.fingerprint)

    def install(self, consent: InstallConsent, *, say: Callable[[str], None]) -> None:
        """Make it whole; one that is whole is left alone. say: is told what is done, a line each.

        Raises BackendUnavailable (what failed, and how to go on), InvalidValue (the consent is for other pins).
        """
        if consent.fingerprint != self.pins.fingerprint:
            raise InvalidValue("consent", "the yes was given to other packages", hint="ask again")
        if why := why_not_here():
            raise BackendUnavailable(self.guest, why)
        if sys.version_info[:2] < self.pins.python:
            least = ".".join(map(str, self.pins.python))
            raise BackendUnavailable(self.guest, f"{self.pins.title} needs Python {least} or newer")
        if not self.reason():
            say(f"{self.pins.title} {self.pins.version} is installed already")
            return
        self.remove()
        venv = self.folder / "venv"
        say(f"making {venv}")
        self._run([sys.executable, "-m", "venv", str(venv)], what="its virtual environment could not be made")
        say(f"installing {len(self.pins.packages)} packages")
        requirements = [package.requirement for package in self.pins.packages]
        # -I: what a PYTHONPATH of ours holds would count as installed already.
        pip = [str(self.python), "-I", "-m", "pip", "--disable-pip-version-check"]
        self._run([*pip, "install", "--quiet", "--no-deps", *requirements], what="its packages could not be installed")
        say(f"trying {self.pins.title}")
        asyncio.run(self._try())
        note = {"fingerprint": self.pins.fingerprint, "python": platform.python_version()}
        (self.folder / NOTE).write_text(json.dumps(note), encoding="utf-8")

    def remove(self) -> int:
        """Delete it, whole or not. Gives back the bytes freed."""
        n_bytes = 0
        for path in self.folder.rglob("*"):
            with suppress(OSError):
                n_bytes += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
        # The note first: what is cut off from here on is no installation any more.
        (self.folder / NOTE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            raise BackendFailed(f"{self.folder} cannot be removed", hint="delete it, and try again")
        return n_bytes

    async def _try(self) -> None:
        """Start the engine once. Raises what kept it from starting."""
        backend = LocalBackend(EngineOptions(), command=self.command, env=guest_environment(), name=self.guest)
        try:
            await backend.start()
        except SdfleetError as exc:
            raise BackendFailed(
                f"{self.pins.title} is installed and does not start: {exc}", hint=self._again()
            ) from exc
        finally:
            await backend.close()

    def _again(self) -> str:
        return f"when that is mended, run `sdfleet backend install {self.guest}` again"

    def _run(self, command: Sequence[str], *, what: str) -> None:
        try:
            done = subprocess.run(  # noqa: S603 - Python itself, and the pins of this package
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=INSTALL_DEADLINE_S,
                check=False,
            )
            code, said = done.returncode, done.stdout
        except OSError as exc:
            code, said = -1, str(exc).encode()
        except subprocess.TimeoutExpired as exc:
            code, said = -1, (exc.stdout or b"") + f"no end within {INSTALL_DEADLINE_S:.0f} s".encode()
        if code != 0:
            lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
            last = " / ".join(lines[-_LAST_LINES:]) or f"exit code {code}"
            raise BackendFailed(f"{self.pins.title}: {what}: {last}", hint=self._again())


def guest_environment() -> dict[str, str]:
    """The environment of a guest's process: no hub is asked, and no bars are drawn into our log."""
    return {**engine_environment(), "TQDM_DISABLE": "1"}
