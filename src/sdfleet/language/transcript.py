"""What was said, in the shape that was asked for: JSON, text, subtitles, or events as it is heard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sdfleet.errors import InvalidValue
from sdfleet.language.asking import Ask

FORMATS = ("json", "verbose_json", "text", "srt", "vtt")


class Transcript:
    """One transcript in the making. Raises InvalidValue for a shape that is not known."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._format = str(ask.body.get("response_format") or "json")
        if self._format not in FORMATS:
            raise InvalidValue("response_format", f"{self._format[:40]!r} is not one of {', '.join(FORMATS)}")
        self._segments: list[Mapping[str, Any]] = []
        self._words: list[Mapping[str, Any]] = []
        self._info: Mapping[str, Any] = {}

    def take(self, line: Mapping[str, Any]) -> Iterator[bytes]:
        """Note a segment or the end; what may be told of it at once."""
        if "segment" in line:
            self._segments.append(line["segment"])
            self._words += line.get("words") or ()
            if self._ask.is_stream:
                yield json.dumps({"type": "transcript.text.delta", "delta": line["segment"]["text"]}).encode()
        self._info = line.get("done") or self._info

    def last(self) -> bytes:
        """The whole, or the last event."""
        text = "".join(one["text"] for one in self._segments).strip()
        if self._ask.is_stream:
            return json.dumps({"type": "transcript.text.done", "text": text}).encode()
        if self._ask.door == "/api/transcribe":
            return json.dumps({"text": text, "language": self._info.get("language", "")}).encode()
        match self._format:
            case "text":
                return text.encode() + b"\n"
            case "srt":
                return "".join(
                    f"{i}\n{_clock(one['start'], ',')} --> {_clock(one['end'], ',')}\n{one['text'].strip()}\n\n"
                    for i, one in enumerate(self._segments, start=1)
                ).encode()
            case "vtt":
                cues = (
                    f"{_clock(one['start'], '.')} --> {_clock(one['end'], '.')}\n{one['text'].strip()}\n\n"
                    for one in self._segments
                )
                return ("WEBVTT\n\n" + "".join(cues)).encode()
            case "verbose_json":
                is_english = self._ask.door == "/v1/audio/translations"
                facts: dict[str, Any] = {
                    "task": "translate" if is_english else "transcribe",
                    # Of the text; OpenAI spells it so here.
                    "language": "english" if is_english else self._info.get("language", ""),
                    "duration": self._info.get("duration", 0.0),
                    "text": text,
                    "segments": self._segments,
                }
                return json.dumps(facts | ({"words": self._words} if self._words else {})).encode()
            case _:
                return json.dumps({"text": text}).encode()


def _clock(seconds: float, point: str) -> str:
    """A time as subtitles have it.

    >>> _clock(3723.5, ",")
    '01:02:03,500'
    """
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{point}{ms % 1000:03d}"
