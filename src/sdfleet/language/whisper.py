"""Speech to text on this machine: faster-whisper in a process of its own, with the models of one folder.

A model is loaded with the first recording for it, in the place of another, and leaves the memory when it was idle for
as long as pictures' models may be. Nothing is downloaded: a model is a folder with `model.bin` that somebody put there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdfleet.errors import InvalidValue, UpstreamFailed, UpstreamRefused, from_wire
from sdfleet.language.asking import Ask, LanguageModel, not_found
from sdfleet.language.transcript import Transcript
from sdfleet.language.whisper_child import LENGTH

log = logging.getLogger(__name__)

# Importing the libraries and reading the largest model from a slow disk.
READY_WITHIN_S = 300.0
# After a cancelled recording the step that runs is waited for so long.
STOP_WITHIN_S = 20.0
# A segment with its tokens; the longest have some hundred.
MAX_LINE_BYTES = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class WhisperOptions:
    """folder: of the models, or one model itself. keep_alive_s: None keeps a model for ever. env: of the process."""

    folder: Path
    device: str = "auto"
    n_threads: int = 0
    keep_alive_s: float | None = 900.0
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


class WhisperEngine:
    """See the file's first lines."""

    def __init__(self, options: WhisperOptions) -> None:
        self._options = options
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._loaded: Path | None = None
        self._leaves: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Future[int]] = set()

    async def models(self) -> tuple[LanguageModel, ...]:
        if find_spec("faster_whisper") is None:
            raise UpstreamFailed("SD_SPEECH_MODELS needs faster-whisper", hint="pip install 'sdfleet[speech]'")
        found = await asyncio.to_thread(_found, self._options.folder)
        return tuple(
            LanguageModel(
                name=name, engine="whisper", capabilities=("transcription",), n_bytes=n_bytes, slots=1,
                is_warm=folder == self._loaded, details={"format": "ctranslate2", "family": "whisper"},
            )
            for name, (folder, n_bytes) in sorted(found.items())
        )  # fmt: skip

    async def answer(self, model: LanguageModel, ask: Ask) -> AsyncGenerator[bytes]:
        if ask.sound is None:
            raise UpstreamRefused(f"{model.name} writes down what is said, nothing else", hint="see /api/transcribe")
        options = _options(ask)
        transcript = Transcript(ask)
        found = (await asyncio.to_thread(_found, self._options.folder)).get(model.name)
        if found is None:
            raise not_found(model.name)
        async with self._turn, aclosing(self._lines(found[0], ask.sound.data, options)) as lines:
            async for line in lines:
                for piece in transcript.take(line):
                    yield piece
        yield transcript.last()

    async def close(self) -> None:
        self._stay()
        process, self._process, self._loaded = self._process, None, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._ending:
            await asyncio.wait(self._ending)

    async def _lines(self, folder: Path, sound: bytes, options: Mapping[str, object]) -> AsyncGenerator[dict[str, Any]]:
        """What the process says of one recording, to its end; leaving before stops it after its next segment."""
        process = await self._started(folder)
        assert process.stdin is not None
        name = secrets.token_hex(8)
        is_over = False
        try:
            head = json.dumps({"id": name, "n_bytes": len(sound), "options": options}).encode()
            process.stdin.write(LENGTH.pack(len(head)) + head)
            process.stdin.write(sound)
            await process.stdin.drain()
            while not is_over:
                line = await self._line(process)
                if line.get("id") != name:
                    continue  # of a recording that nobody waits for any more
                is_over = "done" in line or "error" in line
                if "error" in line:
                    raise from_wire(line["error"])
                yield line
        except (BrokenPipeError, ConnectionResetError) as exc:
            await self.close()
            raise UpstreamFailed("the process that listens has ended", hint="its model may need more memory") from exc
        finally:
            if not is_over and process.returncode is None:
                await self._stop(process, name)
            self._leave_later()

    async def _stop(self, process: asyncio.subprocess.Process, name: str) -> None:
        """Have it give up a recording; a process that does not within seconds is killed."""
        assert process.stdin is not None
        head = json.dumps({"cancel": name}).encode()
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                process.stdin.write(LENGTH.pack(len(head)) + head)
                while (line := await self._line(process)).get("id") != name or not ("done" in line or "error" in line):
                    pass
        except (TimeoutError, UpstreamFailed, OSError):
            await self.close()

    async def _line(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            await self.close()
            raise UpstreamFailed("the process that listens has ended", hint="its model may need more memory")
        value: dict[str, Any] = json.loads(line)
        return value

    async def _started(self, folder: Path) -> asyncio.subprocess.Process:
        """The process with this model in its memory."""
        self._stay()
        if self._process is not None and self._process.returncode is None and self._loaded == folder:
            return self._process
        await self.close()
        options = self._options
        words = ["-m", "sdfleet.language.whisper_child", str(folder), options.device, str(options.n_threads)]
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, env=dict(options.env) or None, limit=MAX_LINE_BYTES,
        )  # fmt: skip
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                await self._line(process)
        except TimeoutError as exc:
            await self.close()
            raise UpstreamFailed(f"the speech model was not loaded within {READY_WITHIN_S:.0f} s") from exc
        except BaseException:
            await self.close()
            raise
        self._loaded = folder
        log.info("a speech model was loaded", extra={"model": folder.name})
        return process

    def _stay(self) -> None:
        if self._leaves is not None:
            self._leaves.cancel()
            self._leaves = None

    def _leave_later(self) -> None:
        self._stay()
        if self._options.keep_alive_s is not None and self._process is not None:
            self._leaves = asyncio.get_running_loop().call_later(self._options.keep_alive_s, self._leave)

    def _leave(self) -> None:
        """The process ends with its input."""
        process, self._process, self._loaded = self._process, None, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            ending = asyncio.ensure_future(process.wait())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


def _found(folder: Path) -> dict[str, tuple[Path, int]]:
    """The models of a folder by name, with the bytes of their weights. Blocks."""
    places = [folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())]
    return {place.name: (place, file.stat().st_size) for place in places if (file := place / "model.bin").is_file()}


def _options(ask: Ask) -> dict[str, object]:
    """What a form says, as faster-whisper's words. Raises InvalidValue."""
    asked, options = ask.body, dict[str, object]()
    if ask.door == "/v1/audio/translations":
        options["task"] = "translate"
    if asked.get("language"):
        options["language"] = str(asked["language"])
    if asked.get("prompt"):
        options["initial_prompt"] = str(asked["prompt"])
    if (temperature := asked.get("temperature")) not in (None, "", "0"):
        try:
            options["temperature"] = float(str(temperature))
        except ValueError as exc:
            raise InvalidValue("temperature", "it is no number") from exc
    granularities = asked.get("timestamp_granularities[]") or asked.get("timestamp_granularities") or ()
    if "word" in (granularities if isinstance(granularities, list) else [granularities]):
        options["word_timestamps"] = True
    return options
