"""Log lines."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from sdfleet.observe import start_logging


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    ours = logging.getLogger("sdfleet")
    before = (ours.handlers[:], ours.level, ours.propagate)
    yield
    ours.handlers[:], level, ours.propagate = before
    ours.setLevel(level)
    logging.captureWarnings(capture=False)


def _lines(level: str, *, as_json: bool = False) -> list[str]:
    stream = io.StringIO()
    start_logging(level, as_json=as_json, stream=stream)
    log = logging.getLogger("sdfleet.test")
    log.info("job finished", extra={"job_id": "ab", "reason": "two\nlines here"})
    log.debug("detail")
    return stream.getvalue().splitlines()


def test_a_record_is_one_line_with_its_facts() -> None:
    (line,) = _lines("info")
    assert line.endswith('INFO sdfleet.test job finished job_id=ab reason="two\\\\nlines here"')


def test_a_record_can_be_one_json_object() -> None:
    (line,) = _lines("info", as_json=True)
    record = json.loads(line)
    assert (record["message"], record["job_id"], record["reason"]) == ("job finished", "ab", "two\nlines here")


def test_quiet_levels_write_nothing() -> None:
    assert _lines("warning") == []


def test_setting_up_twice_writes_every_line_once() -> None:
    stream = io.StringIO()
    start_logging("info", stream=stream)
    start_logging("info", stream=stream)
    logging.getLogger("sdfleet.test").info("once")
    assert len(stream.getvalue().splitlines()) == 1


def test_warnings_of_libraries_are_kept_from_the_reader() -> None:
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        start_logging("info", stream=stream)
        warnings.warn("odd EXIF", UserWarning, stacklevel=1)
    assert stream.getvalue() == ""
