"""Converted models on disk, each beside what was measured of it. Never inside a checkpoint's own folder.

    <cache>/<checkpoint and component>-<their files and the versions>/model.xml, model.bin, trial-<setting>.json

A conversion is written into a folder of another name, which is then renamed: whoever finds a model finds a whole one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdfleet.engine.openvino_convert import MODEL_FILE

log = logging.getLogger(__name__)

# To be counted up when the same checkpoint would now be converted to something else.
_FORMAT = 1
# SD 1.5 is 3.4 GB, SDXL 10 GB, SD3.5 medium 9 GB in float32; the least recently used go first.
_MOST_BYTES = 30_000_000_000
_ABANDONED_S = 24 * 3600
# A conversion only begins in a pause, but jobs may come while it runs: they go first, as far as the system can tell.
_NICENESS = 19


class ConversionFailed(Exception):
    """A denoiser cannot be had as an OpenVINO model. Caught in executors.py: torch goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Seconds per call by rows, for both executors, and how far their answers are apart (rms, relative).

    int8_apart: how far 8 bits are from torch; None: not tried. int8_s: empty where they were too far to be timed.
    """

    torch_s: Mapping[int, float]
    openvino_s: Mapping[int, float]
    apart: float
    int8_s: Mapping[int, float] = field(default_factory=dict)
    int8_apart: float | None = None


class ModelCache:
    """The folder of converted models; without one, a temporary folder that goes with this object."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def key(self, checkpoint: Path, component: str) -> str:
        """Names a conversion: other files, or other versions of what converts them, are another one."""
        folder = checkpoint / component
        files = sorted(path for path in folder.iterdir() if path.is_file())
        said = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        versions = [_version(name) for name in ("openvino", "torch", "diffusers")]
        return f"{_hashed(str(folder.resolve()))}-{_hashed(json.dumps([_FORMAT, said, versions]))}"

    def find(self, key: str) -> Path | None:
        """The model file of a conversion that is there."""
        model = self._root() / key / MODEL_FILE
        if not model.is_file():
            return None
        os.utime(model.parent)
        return model

    def convert(self, checkpoint: Path, component: str, key: str, *, in_background: bool) -> Conversion:
        """Begin a conversion in a process of its own."""
        root = self._root()
        root.mkdir(parents=True, exist_ok=True)
        return Conversion(checkpoint, component, part=Path(tempfile.mkdtemp(prefix=".part-", dir=root)),
                          target=root / key, niceness=_NICENESS if in_background else 0)  # fmt: skip

    def tidy(self, kept_key: str) -> None:
        """Remove older conversions of the same checkpoint, what was abandoned half-way, and the oldest past a limit."""
        root, now_s = self._root(), time.time()
        entries = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime)
        n_bytes, of_same = 0, kept_key[: kept_key.index("-") + 1]
        for entry in entries:
            is_part = entry.name.startswith(".part-")
            is_abandoned = is_part and now_s - entry.stat().st_mtime > _ABANDONED_S
            is_superseded = entry.name.startswith(of_same) and entry.name != kept_key
            n_bytes += sum(path.stat().st_size for path in entry.iterdir())
            is_too_much = n_bytes > _MOST_BYTES and not is_part and entry.name != kept_key
            if is_abandoned or is_superseded or is_too_much:
                shutil.rmtree(entry, ignore_errors=True)

    def remove(self, key: str) -> None:
        """Forget a conversion that cannot be used."""
        shutil.rmtree(self._root() / key, ignore_errors=True)

    def trial(self, key: str, *, dtype: str, n_threads: int) -> Trial | None:
        """What was measured on this machine before, in the same format with as many threads."""
        try:
            said = json.loads(self._trial_file(key, dtype, n_threads).read_text(encoding="utf-8"))
            times = [{int(rows): float(spent_s) for rows, spent_s in said[name].items()} for name in _TIMES]
            int8_s = {int(rows): float(spent_s) for rows, spent_s in said.get("int8_s", {}).items()}
            int8_apart = None if said.get("int8_apart") is None else float(said["int8_apart"])
            apart = float(said["apart"])
            return Trial(torch_s=times[0], openvino_s=times[1], apart=apart, int8_s=int8_s, int8_apart=int8_apart)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
            log.warning("a note in the cache cannot be read and is measured again", extra={"why": str(exc)})
            return None

    def keep_trial(self, key: str, trial: Trial, *, dtype: str, n_threads: int) -> None:
        """Write down what was measured."""
        file = self._trial_file(key, dtype, n_threads)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(trial)), encoding="utf-8")
        part.replace(file)

    def close(self) -> None:
        """Remove what was only for this process."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _trial_file(self, key: str, dtype: str, n_threads: int) -> Path:
        # A home folder may be shared by machines.
        return self._root() / key / f"trial-{_hashed(platform.node())}-{dtype}-{n_threads}.json"

    def _root(self) -> Path:
        if self._folder is not None:
            return self._folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="sdfleet-openvino-")
        return Path(self._temporary.name)


class Conversion:
    """A conversion on its way in another process."""

    def __init__(self, checkpoint: Path, component: str, *, part: Path, target: Path, niceness: int) -> None:
        self._part = part
        self._target = target
        command = [sys.executable, "-m", "sdfleet.engine.openvino_convert", str(checkpoint), component, str(part)]
        with (part / "log").open("wb") as said:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*command, "--niceness", str(niceness)], stdin=subprocess.PIPE, stdout=said, stderr=said
            )

    @property
    def has_ended(self) -> bool:
        """Whether `result` will answer at once."""
        return self._process.poll() is not None

    def result(self) -> Path:
        """The model file, waited for. Raises ConversionFailed with the last words of the process."""
        code = self._process.wait()
        words = (self._part / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        self._end()
        if code or not (self._part / MODEL_FILE).is_file():
            self.cancel()
            raise ConversionFailed((words or [f"exit code {code}"])[-1][:300])
        (self._part / "log").unlink()
        try:
            self._part.rename(self._target)
        except OSError:  # another engine was first
            shutil.rmtree(self._part, ignore_errors=True)
        return self._target / MODEL_FILE

    def cancel(self) -> None:
        """End it and leave nothing behind."""
        self._process.kill()
        self._process.wait()
        self._end()
        shutil.rmtree(self._part, ignore_errors=True)

    def _end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()


_TIMES = ("torch_s", "openvino_s")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # built by hand, or under another name
        return "unknown"


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
