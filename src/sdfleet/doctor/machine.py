"""What is examined: this machine's settings and where the system keeps its facts. Tests give others."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdfleet import compose
from sdfleet.backends.base import Capabilities
from sdfleet.catalog.store import Catalog
from sdfleet.doctor.upstreams import UpstreamProbe
from sdfleet.settings import Settings

# Importing torch takes 2 s, and was seen to take 30 on a busy machine with a cold disk.
PROBE_DEADLINE_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A graphics card as torch sees it. capability: (9, 0) for an H100."""

    name: str
    capability: tuple[int, int]
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchView:
    """What torch sees. fault: why it cannot be imported, or asked. cuda_build: the CUDA it was built with, if any.

    cuda_said: what it warned of while it looked for cards. is_built_for: `sm_90` and such.
    """

    fault: str = ""
    version: str = ""
    file: str = ""
    import_s: float = 0.0
    cuda_build: str | None = None
    has_cuda: bool = False
    has_mps: bool = False
    cuda_said: str = ""
    is_built_for: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()


class TorchProbe:
    """Asks torch in a process of its own, once, for however many checks want to know."""

    def __init__(self, command: Sequence[str] = (), *, deadline_s: float = PROBE_DEADLINE_S) -> None:
        self._command = tuple(command) or (sys.executable, "-m", "sdfleet.engine.probe")
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._view: TorchView | None = None

    def view(self) -> TorchView:
        """What torch sees; the first caller waits for it."""
        with self._lock:
            if self._view is None:
                self._view = self._look()
            return self._view

    def _look(self) -> TorchView:
        try:
            done = subprocess.run(  # noqa: S603 - our own module, or what a test gives
                self._command, capture_output=True, text=True, check=False, timeout=self._deadline_s, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return TorchView(fault=f"it was not imported within {self._deadline_s:.0f} s")
        except OSError as exc:
            return TorchView(fault=f"it could not be asked: {exc.strerror or exc}")
        try:
            told = json.loads(done.stdout.strip().splitlines()[-1])
            cards = tuple(
                Card(name=card["name"], capability=tuple(card["capability"]), total_bytes=card["total_bytes"])
                for card in told.pop("cards", ())
            )
            return TorchView(**told | {"is_built_for": tuple(told.get("is_built_for", ())), "cards": cards})
        except (ValueError, IndexError, KeyError, TypeError):
            said = " ".join((done.stderr.strip() or "nothing").splitlines()[-1:])[:300]
            return TorchView(fault=f"a process that imports it ended with {_ending(done.returncode)}; it said: {said}")


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the machine's memory and of its swap."""

    total: int
    available: int
    swap_total: int
    swap_used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine to examine, and what may be done meanwhile.

    variables: those of `settings.read_surroundings`. search_path: where Python looks for packages.
    may_ask_hub: somebody agreed that a hub is contacted. asked_model: whose access to look at there.
    standing: of the backend of the server that asks; None at the command line. known: its catalogue, or one that is
    kept for all checks, so that a model's files are read once.
    """

    settings: Settings
    variables: Mapping[str, str]
    torch: TorchProbe = field(default_factory=TorchProbe)
    upstreams: UpstreamProbe = field(default_factory=UpstreamProbe)
    search_path: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))
    python: tuple[int, int] = field(default_factory=lambda: (sys.version_info.major, sys.version_info.minor))
    proc: Path = Path("/proc")
    cgroups: Path = Path("/sys/fs/cgroup")
    devices: Path = Path("/dev")
    may_ask_hub: bool = False
    asked_model: str | None = None
    standing: Capabilities | None = None
    known: Catalog | None = None
    clock: Callable[[], float] = time.time

    def catalog(self) -> Catalog:
        """The checkpoints of this machine."""
        return self.known or compose.catalog(self.settings)

    def memory(self) -> Memory:
        """What the system says of its memory now."""
        try:
            lines = (self.proc / "meminfo").read_text(encoding="ascii").splitlines()
            kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
            return Memory(
                total=kib["MemTotal"] * 1024,
                available=kib["MemAvailable"] * 1024,
                swap_total=kib["SwapTotal"] * 1024,
                swap_used=(kib["SwapTotal"] - kib["SwapFree"]) * 1024,
            )
        except (OSError, ValueError, KeyError, IndexError):
            import psutil

            main, swap = psutil.virtual_memory(), psutil.swap_memory()
            return Memory(total=main.total, available=main.available, swap_total=swap.total, swap_used=swap.used)

    def has_nvidia_card(self) -> bool:
        """Whether the system shows a card of NVIDIA, whatever torch thinks of it."""
        places = ("nvidia0", "dxg", "nvmap")
        return any((self.devices / name).exists() for name in places) or (self.proc / "driver/nvidia/version").exists()


def gb(n_bytes: float) -> str:
    """Bytes for people.

    >>> gb(2_500_000_000), gb(40_000_000)
    ('2.5 GB', '40 MB')
    """
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.0f} MB"
