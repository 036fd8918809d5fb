"""Log lines: one line each, to stderr. Nothing is configured until `start_logging` is called."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import TextIO

# What every LogRecord carries; all else came in through `extra`.
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def start_logging(level: str = "warning", *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Send the records of `sdfleet` to `stream` (stderr); calling again replaces the earlier set-up."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLine() if as_json else TextLine())
    ours = logging.getLogger("sdfleet")
    for old in list(ours.handlers):
        ours.removeHandler(old)
    ours.addHandler(handler)
    ours.setLevel(level.upper())
    ours.propagate = False
    # Libraries warn about what our user cannot change (Pillow: odd EXIF); seen only where everything is.
    logging.captureWarnings(capture=True)
    theirs = logging.getLogger("py.warnings")
    theirs.handlers = [handler] if level == "debug" else [logging.NullHandler()]
    theirs.propagate = False


class TextLine(logging.Formatter):
    """`12:00:01 INFO sdfleet.runtime job finished job_id=ab12 spent_s=0.5`; a traceback follows on its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.gmtime(record.created))
        facts = "".join(f" {name}={_text(value)}" for name, value in _extras(record).items())
        line = f"{clock} {record.levelname} {record.name} {_one_line(record.getMessage())}{facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLine(logging.Formatter):
    """One JSON object per record; the traceback, if any, is one of its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _extras(record: logging.LogRecord) -> Mapping[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _PLAIN}


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _text(value: object) -> str:
    text = _one_line(str(value))
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text
