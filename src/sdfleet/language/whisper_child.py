"""The process that listens: `python -m sdfleet.language.whisper_child FOLDER DEVICE N_THREADS`, over its pipes.

in     frames: 4 bytes length, JSON, and after `{"id", "n_bytes", "options"}` the recording; or `{"cancel": id}`
out    lines of JSON: {"ready"}, then for each id {"segment"}..., {"done"} or {"error"}

CTranslate2 computes in its own threads and holds the interpreter while it starts them; a server beside it would stand
still now and then. One recording at a time. It ends with its standard input.
"""

from __future__ import annotations

import io
import json
import os
import queue
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

LENGTH = struct.Struct(">I")
# Decoded, an hour is 230 MB. What says nothing of its length is read as far as it goes.
MAX_HOURS = 6.0


@dataclass(slots=True)
class _Heard:
    """What came in: recordings in order, and the ids that nobody waits for any more."""

    recordings: queue.Queue[tuple[Mapping[str, Any], bytes] | None] = field(default_factory=queue.Queue)
    cancelled: set[str] = field(default_factory=set)

    def read(self, source: BinaryIO) -> None:
        """Take in frames to the end of the pipe."""
        while len(head := source.read(LENGTH.size)) == LENGTH.size:
            facts = json.loads(source.read(LENGTH.unpack(head)[0]))
            if "cancel" in facts:
                self.cancelled.add(facts["cancel"])
                continue
            self.recordings.put((facts, source.read(facts["n_bytes"])))
        self.recordings.put(None)


def main() -> None:
    """Serve until standard input ends."""
    # What libraries print must not come between our lines.
    told = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    folder, device, n_threads = sys.argv[1:4]
    from faster_whisper import WhisperModel

    model = WhisperModel(folder, device=device, cpu_threads=int(n_threads), local_files_only=True)

    def tell(facts: Mapping[str, object]) -> None:
        told.write(json.dumps(facts).encode() + b"\n")

    tell({"ready": True})
    heard = _Heard()
    threading.Thread(target=heard.read, args=(sys.stdin.buffer,), daemon=True).start()
    while (one := heard.recordings.get()) is not None:
        facts, sound = one
        for line in _written_down(model, facts["options"], sound, name=facts["id"], cancelled=heard.cancelled):
            tell({"id": facts["id"], **line})
        heard.cancelled.discard(facts["id"])


def _written_down(
    model: Any, options: Mapping[str, Any], sound: bytes, *, name: str, cancelled: set[str]
) -> Iterator[Mapping[str, object]]:
    """The lines about one recording."""
    import av
    from faster_whisper.audio import decode_audio

    if options.get("task") == "translate" and not model.model.is_multilingual:
        why = "the model knows English only, so it cannot translate into it"
        yield _fault("unsupported_by_model", why, "take one whose name does not end in .en")
        return
    try:
        with av.open(io.BytesIO(sound), "r") as container:
            hours = (container.duration or 0) / av.time_base / 3600
        if hours > MAX_HOURS:
            yield _fault("upstream_refused", f"the recording is {hours:.1f} hours long, more than {MAX_HOURS:g}")
            return
        wave = decode_audio(io.BytesIO(sound))
    except (av.FFmpegError, IndexError, ValueError) as exc:  # IndexError: there is no sound in it
        yield _fault("upstream_refused", f"the recording cannot be read: {type(exc).__name__}")
        return
    try:
        segments, info = model.transcribe(wave, **options)
        for one in segments:
            if name in cancelled:
                break
            words = [{"word": word.word, "start": word.start, "end": word.end} for word in one.words or ()]
            yield {
                "segment": {
                    "id": one.id, "seek": one.seek, "start": round(one.start, 3), "end": round(one.end, 3),
                    "text": one.text, "tokens": list(one.tokens), "temperature": one.temperature,
                    "avg_logprob": one.avg_logprob, "compression_ratio": one.compression_ratio,
                    "no_speech_prob": one.no_speech_prob,
                },
                "words": words,
            }  # fmt: skip
    except ValueError as exc:  # a language that it does not know, say
        yield _fault("upstream_refused", str(exc)[:300])
    except (RuntimeError, MemoryError) as exc:
        yield _fault("upstream_failed", f"the speech model met a fault: {str(exc)[:300]}")
    else:
        yield {"done": {"language": info.language, "duration": round(info.duration, 3)}}


def _fault(code: str, message: str, hint: str = "") -> dict[str, object]:
    return {"error": {"code": code, "message": message, "hint": hint}}


if __name__ == "__main__":
    main()
