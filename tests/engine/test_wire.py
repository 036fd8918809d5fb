"""Frames between the parent and an engine's process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import struct
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfleet.domain import Drawing, FinishedPicture, JobId, Picture, Progress, TokenCount
from sdfleet.engine import wire
from sdfleet.engine.events import EngineOptions, JobDone, JobFailed, PictureDone
from sdfleet.errors import EngineFailed, OutOfMemory, SdfleetError, UnsupportedByModel

texts = st.text(st.characters(), max_size=40)  # lone surrogates too: JSON bodies may carry them
names = st.text(min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
job_ids = texts.map(JobId)


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    width_px, height_px = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    mode = draw(st.sampled_from(["RGB", "L"]))
    n_bytes = width_px * height_px * (3 if mode == "RGB" else 1)
    data = draw(st.binary(min_size=n_bytes, max_size=n_bytes))
    return Picture(width_px=width_px, height_px=height_px, mode=mode, data=data)  # type: ignore[arg-type]


drawings = st.builds(
    Drawing,
    job_id=job_ids,
    checkpoint=texts,
    prompt=texts,
    guidance=numbers,
    seed=st.integers(0, 2**64 - 1),
    image=st.none() | pictures(),
    mask=st.none() | pictures(),
    strength=numbers,
    resize_to=st.none() | st.tuples(st.integers(), st.integers()),
)
errors = st.builds(UnsupportedByModel, texts, hint=texts) | st.builds(OutOfMemory, texts)
commands = (
    st.builds(wire.Submit, drawing=drawings)
    | st.builds(wire.Cancel, job_id=job_ids)
    | st.builds(wire.Watch, job_id=job_ids, previews=st.booleans())
    | st.just(wire.Close())
)
facts = st.dictionaries(
    names, st.none() | st.booleans() | st.integers() | texts | st.lists(texts, max_size=2), max_size=3
)
progresses = st.builds(
    Progress, job_id=job_ids, image_index=st.integers(), eta_s=st.none() | numbers, preview=st.none() | pictures()
)
finished = st.builds(FinishedPicture, picture=pictures(), seed=st.integers(0), reproducible=st.booleans())
dones = st.builds(
    JobDone,
    job_id=job_ids,
    timings_s=st.dictionaries(names, numbers, max_size=3),
    tokens=st.lists(st.builds(TokenCount, encoder=texts), max_size=2).map(tuple),
    warnings=st.lists(texts, max_size=2).map(tuple),
    rungs=st.lists(texts, max_size=2).map(tuple),
    device=texts,
    dtype=texts,
)
reports = (
    st.builds(wire.Ready, facts=facts, protocol=st.just(wire.PROTOCOL))
    | st.builds(wire.Facts, facts=facts)
    | progresses
    | st.builds(PictureDone, job_id=job_ids, image_index=st.integers(), finished=finished)
    | dones
)


def read_commands(stream: bytes) -> list[wire.Command]:
    pipe = io.BytesIO(stream)
    read = []
    while (command := wire.read_command(pipe.read)) is not None:
        read.append(command)
    return read


def read_reports(stream: bytes) -> list[wire.Report]:
    async def all_of_them() -> list[wire.Report]:
        reader = asyncio.StreamReader()
        reader.feed_data(stream)
        reader.feed_eof()
        read = []
        while (report := await wire.read_report(reader)) is not None:
            read.append(report)
        return read

    return asyncio.run(all_of_them())


def written(*messages: wire.Command | wire.Report) -> bytes:
    return b"".join(part for message in messages for part in wire.encode(message))


def frame(header: object, *blobs: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text + b"".join(blobs)


def drawing(**fields: Any) -> Drawing:
    given: dict[str, Any] = {
        "job_id": JobId("j"),
        "checkpoint": "c",
        "family": "sd",
        "prompt": "p",
        "negative_prompt": "",
        "width_px": 64,
        "height_px": 64,
        "steps": 4,
        "guidance": 5.0,
        "seed": 1,
        "n_images": 1,
        "sampler": "euler",
    }
    return Drawing(**(given | fields))


def grey(width_px: int, height_px: int) -> Picture:
    return Picture(width_px=width_px, height_px=height_px, mode="L", data=b"\x80" * (width_px * height_px))


@given(st.lists(commands, max_size=3))
def test_commands_arrive_as_they_were_sent(sent: list[wire.Command]) -> None:
    assert read_commands(written(*sent)) == sent


@given(st.lists(reports, max_size=3))
def test_reports_arrive_as_they_were_sent(sent: list[wire.Report]) -> None:
    assert read_reports(written(*sent)) == sent


@given(job_ids, errors)
def test_errors_arrive_as_the_same_class(job_id: JobId, error: SdfleetError) -> None:
    failed, fault = read_reports(written(JobFailed(job_id=job_id, error=error), wire.Fault(error=error)))
    assert isinstance(failed, JobFailed)
    assert isinstance(fault, wire.Fault)
    assert failed.job_id == job_id
    for arrived in (failed.error, fault.error):
        assert (type(arrived), arrived.message, arrived.hint) == (type(error), error.message, error.hint)


@given(st.binary(max_size=200))
def test_garbage_is_a_broken_stream_or_message_and_nothing_else(garbage: bytes) -> None:
    with contextlib.suppress(wire.BrokenStream, wire.BrokenMessage):
        read_commands(garbage)


@given(commands, st.data())
def test_a_cut_frame_is_a_broken_stream(sent: wire.Command, data: st.DataObject) -> None:
    whole = written(sent)
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    with pytest.raises(wire.BrokenStream, match=r"the stream ended|ended \d+ bytes before"):
        read_commands(cut)


def test_pixels_travel_as_they_are_and_are_not_copied_on_the_way_out() -> None:
    image = grey(64, 64)
    parts = wire.encode(wire.Submit(drawing=drawing(image=image)))
    assert parts[1] is image.data
    assert len(parts[0]) < 1000


def test_a_frame_is_what_its_description_says() -> None:
    stream = written(wire.Watch(job_id=JobId("a"), previews=True))
    assert stream == frame(b'{"type":"watch","blobs":[],"job_id":"a","previews":true}')


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"Hello, world", "is no header length"),
        (b"\x00\x00\x00\x00", "is no header length"),
        (struct.pack(">I", wire.MAX_HEADER_BYTES + 1) + b"{}", "is no header length"),
        (frame(b"{not json}"), "not JSON"),
        (frame(b'{"blobs":[],"x":NaN}'), "not JSON"),
        (frame(b"[" * 5000), "not JSON"),
        (frame(b"\xff\xfe\xfd"), "not JSON"),
        (frame([1, 2]), "not a JSON object"),
        (frame({"type": "close"}), "does not declare its blobs"),
        (frame({"type": "close", "blobs": [-1]}), "does not declare its blobs"),
        (frame({"type": "close", "blobs": [True]}), "does not declare its blobs"),
        (frame({"type": "close", "blobs": [wire.MAX_FRAME_BYTES, 1]}), "more than one frame"),
        (frame({"type": "close", "blobs": [0] * 9}), "more than one frame"),
        (frame({"type": "close", "blobs": [10]}, b"short"), "ended 5 bytes before"),
    ],
)
def test_a_stream_that_lost_its_frames_says_why(stream: bytes, why: str) -> None:
    with pytest.raises(wire.BrokenStream, match=why):
        read_commands(stream)


CANCEL: Mapping[str, object] = {"type": "cancel", "blobs": [], "job_id": "a"}


@pytest.mark.parametrize(
    ("header", "job_id", "why"),
    [
        ({"type": "dance", "blobs": [], "job_id": "a"}, "a", "'dance' is not one of submit, cancel"),
        ({"type": ["x"], "blobs": []}, None, "is not one of"),
        ({"type": "ready", "blobs": [], "facts": {}, "protocol": 1}, None, "is not one of"),
        ({**CANCEL, "colour": "red"}, "a", r"unknown fields \['colour'\]"),
        ({"type": "cancel", "blobs": []}, None, r"missing fields \['job_id'\]"),
        ({**CANCEL, "job_id": 3}, None, "cancel.job_id: '3' does not fit"),
        ({"type": "watch", "blobs": [], "job_id": "a", "previews": 1}, "a", "watch.previews"),
        ({"type": "submit", "blobs": [], "drawing": {"job_id": "a"}}, "a", "missing fields"),
        ({"type": "submit", "blobs": [], "drawing": "cat"}, None, "submit.drawing: an object was expected"),
    ],
)
def test_a_broken_message_names_its_job_and_leaves_the_stream_whole(
    header: Mapping[str, object], job_id: str | None, why: str
) -> None:
    pipe = io.BytesIO(frame(header) + written(wire.Close()))
    with pytest.raises(wire.BrokenMessage, match=why) as caught:
        wire.read_command(pipe.read)
    assert caught.value.job_id == job_id
    assert wire.read_command(pipe.read) == wire.Close()


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("steps", 4.5, "submit.drawing.steps: '4.5' does not fit"),
        ("steps", True, "submit.drawing.steps: 'True' does not fit"),
        ("guidance", "5", "submit.drawing.guidance"),
        ("t5", "maybe", "submit.drawing.t5: 'maybe' does not fit"),
        ("resize_to", [1, 2, 3], "submit.drawing.resize_to"),
        ("image", {"width_px": 1, "height_px": 1, "mode": "L", "data": {"blob": 0}}, "no such blob"),
        ("image", {"width_px": 1, "height_px": 1, "mode": "L", "data": "AAAA"}, "no such blob"),
    ],
)
def test_a_field_that_does_not_fit_is_named(field: str, value: object, why: str) -> None:
    (part,) = wire.encode(wire.Submit(drawing=drawing()))
    header = json.loads(part[4:])
    header["drawing"][field] = value
    with pytest.raises(wire.BrokenMessage, match=why) as caught:
        read_commands(frame(header))
    assert caught.value.job_id == "j"


def test_a_picture_of_the_wrong_size_is_a_broken_message() -> None:
    head, blob = wire.encode(wire.Submit(drawing=drawing(image=grey(3, 3))))
    header = json.loads(head[4:])
    header["drawing"]["image"]["width_px"] = 4
    with pytest.raises(wire.BrokenMessage, match="4x3 L picture has 12 bytes, not 9"):
        read_commands(frame(header, blob))


def test_a_whole_number_is_a_fine_value_for_a_float() -> None:
    (part,) = wire.encode(wire.Submit(drawing=drawing()))
    header = json.loads(part[4:])
    header["drawing"]["guidance"] = 5
    (command,) = read_commands(frame(header))
    assert command == wire.Submit(drawing=drawing(guidance=5.0))


def test_another_protocol_is_refused_before_anything_else_is_read() -> None:
    with pytest.raises(wire.BrokenStream, match="speaks protocol 9, this one speaks"):
        read_reports(frame({"type": "ready", "blobs": [], "protocol": 9, "new_field": 1}))


@pytest.mark.parametrize("eta_s", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_cannot_be_sent(eta_s: float) -> None:
    with pytest.raises(wire.BrokenMessage) as caught:
        wire.encode(Progress(job_id=JobId("a"), image_index=0, step=1, n_steps=2, eta_s=eta_s))
    assert caught.value.job_id == "a"


def test_a_message_over_the_limits_cannot_be_sent() -> None:
    error = EngineFailed("x" * wire.MAX_HEADER_BYTES)
    with pytest.raises(wire.BrokenMessage, match="too large to send"):
        wire.encode(JobFailed(job_id=JobId("a"), error=error))


def test_options_travel_as_one_argument() -> None:
    options = EngineOptions(device="cpu", max_rows=3, memory_limit_bytes=2**40)
    assert wire.decode_options(wire.encode_options(options)) == options
    assert wire.decode_options("{}") == EngineOptions()


@pytest.mark.parametrize("text", ["{", "[]", '{"device": "abacus"}', '{"n_cores": 2}'])
def test_options_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        wire.decode_options(text)
