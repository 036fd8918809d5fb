"""Bodies that lie, dawdle, explode or hold what no encoder writes again: refused, cheaply, in the route's own words."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any

import httpx2
import psutil
import pytest
from PIL import Image

from sdfleet.api import limits
from sdfleet.api.bodies import MAX_JSON_DEPTH, MAX_JSON_VALUES, from_base64, read_json
from sdfleet.api.dialect import BadBody
from sdfleet.errors import InvalidValue
from sdfleet.storage import pictures
from tests.api.serving import PATIENCE_S, Running

MAX_BODY = 100_000


def connect(here: Running) -> socket.socket:
    port = int(here.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass  # it was closed under what we still sent
    return b"".join(parts)


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode()


PICTURE_ROUTES = (
    "/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img",
    "/api/generate", "/api/generate-image", "/v1/flux-pro-1.1", "/generate", "/api/txt2img", "/api/img2img",
    "/api/jobs",
)  # fmt: skip
OTHER_ROUTES = (
    "/sdapi/v1/options", "/sdapi/v1/png-info", "/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images",
    "/api/show",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ how long it is


def test_a_body_that_says_it_is_too_long_is_refused_before_a_byte_of_it_comes(server: Callable[..., Running]) -> None:
    here = server(max_body=MAX_BODY, is_loaded=False)
    for path in PICTURE_ROUTES + OTHER_ROUTES:
        with connect(here) as connection:
            connection.sendall(head(path, "Content-Length: 9999999999999999999"))
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 413 "), path
        assert b"connection: close" in answer.lower()


def test_a_body_without_a_length_is_read_to_the_limit_and_no_further(server: Callable[..., Running]) -> None:
    here = server(max_body=MAX_BODY)
    n_sent = 0
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    with connect(here) as connection:
        connection.sendall(head("/api/txt2img", "Transfer-Encoding: chunked"))
        try:
            # 64 MB, if it is let; what the kernels of both sides hold is sent before the answer stops us.
            while n_sent < 64 * 2**20:
                connection.sendall(chunk)
                n_sent += len(chunk)
        except (ConnectionResetError, BrokenPipeError):
            pass
        answer = read_all(connection)
    assert n_sent < 48 * 2**20, "everything was read"
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_longer_than_it_said_is_not_taken_for_a_second_request(server: Callable[..., Running]) -> None:
    here = server()
    smuggled = b'{"prompt": "a"}GET /api/jobs HTTP/1.1\r\nHost: evil.example\r\n\r\n'
    with connect(here) as connection:
        connection.sendall(head("/api/show", "Content-Length: 2") + smuggled)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200") == 0
    assert b"HTTP/1.1 400" in answer


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -1",),
        ("Content-Length: +5",),
        ("Content-Length: 0x5",),
    ],
)
def test_a_length_of_two_meanings_is_refused(server: Callable[..., Running], lines: tuple[str, ...]) -> None:
    with connect(server(is_loaded=False)) as connection:
        connection.sendall(head("/api/show", *lines) + b"{}   0\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_a_body_that_stops_coming_is_given_up(server: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_PAUSE_S", 0.2)
    with connect(server(is_loaded=False)) as connection:
        connection.sendall(head("/v1/images/generations", "Content-Length: 1000") + b'{"prompt": ')
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_slow"


def test_a_body_that_drips_is_given_up_though_it_never_stops(
    server: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_PAUSE_S", 0.5)
    with connect(server(is_loaded=False)) as connection:
        connection.sendall(head("/api/jobs", "Content-Length: 10000"))
        connection.settimeout(0.05)
        answer = b""
        for _ in range(1000):  # a byte each 50 ms: never a pause of half a second
            connection.send(b" ")
            try:
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_head_without_end_is_cut_off(server: Callable[..., Running]) -> None:
    here = server(is_loaded=False)
    for endless in (b"X-Long: " + b"a" * 2**20, b"X-Many: 1\r\n" * 100_000):
        with connect(here) as connection:
            try:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + endless)
            except (ConnectionResetError, BrokenPipeError):
                continue
            assert b"200 OK" not in read_all(connection)
    assert httpx2.get(f"{here.url}/health").status_code == 200


def test_a_head_that_never_comes_is_not_waited_for_ever(
    server: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdfleet.api import http

    here = server(is_loaded=False)
    monkeypatch.setattr(http, "HEAD_WITHIN_S", 0.2)
    with connect(here) as silent, connect(here) as slow:
        slow.sendall(b"GET /health HT")
        assert silent.recv(1) == b""
        assert slow.recv(1) == b""


# ------------------------------------------------------------------------------------------------------- what JSON says


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}', '{"a": Infinity}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": -1e999}',
        '{"a": 1' + "0" * 400 + "}",
        '{"a": 1' + "0" * 5000 + "}", r'{"a": "\ud800"}', r'{"\udfff": 1}', r'{"a": [{"b": "x\udc00y"}]}',
        '{"a": ' + "[" * 5000 + "]" * 5000 + "}", '{"a": ' + "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH + "}",
        '{"a": [' + "," .join(["0"] * (MAX_JSON_VALUES + 1)) + "]}", "[]", '"a"', "1", "null", "{", '{"a": 01}',
        "\ufeff{}x",
    ],
    ids=range(20),
)  # fmt: skip
def test_json_that_is_no_sane_object_is_a_bad_body(text: str) -> None:
    with pytest.raises(BadBody):
        read_json(text.encode())


@pytest.mark.parametrize("data", [b"", b"  \n", b"{}", '{"ä": "😀", "b": [1, 2.5, -0.0, 1e300, null]}'.encode()])
def test_json_of_any_client_is_read(data: bytes) -> None:
    assert read_json(data) == (json.loads(data) if data.strip() else {})


@pytest.mark.parametrize("path", PICTURE_ROUTES + OTHER_ROUTES)
@pytest.mark.parametrize(
    "value",
    ["NaN", "1e999", "1" + "0" * 400, r'"\ud800"', "[" * 900 + "]" * 900, "[" + "0," * 100_001 + "0]"],
    ids=["NaN", "infinite", "huge", "half a character", "deep", "wide"],
)
def test_no_field_of_any_route_takes_what_no_encoder_writes(fake_server: Running, path: str, value: str) -> None:
    """In a field that is known, one that is ignored, and one that holds anything and is given back."""
    with httpx2.Client(base_url=fake_server.url) as client:
        for name in ("prompt", "seed", "anything", "override_settings", "options", "model", "image"):
            body = f'{{"prompt": "a", "model": "starter", "steps": 1, "{name}": {value}}}'.encode()
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in {400, 422}, f"{name}: {answer.text[:200]}"


def test_options_that_are_kept_stay_small(fake_server: Running) -> None:
    with httpx2.Client(base_url=fake_server.url) as client:
        answers = [client.post("/sdapi/v1/options", json={f"option {i}": "x" * 200_000}) for i in range(3)]
        assert [answer.status_code for answer in answers] == [200, 422, 422]
        assert client.get("/sdapi/v1/options").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {"model": "starter", "prompt": "a", "stream": False, "options": {"seed": 1e300}}),
        ("/api/generate", {"model": "starter", "prompt": "a", "stream": False, "options": {"seed": 10**39}}),
        ("/api/generate", {"model": "starter", "prompt": "a", "stream": False, "width": 10**39}),
        ("/api/generate-image", {"model": "starter", "prompt": "a", "steps": -(10**39)}),
        ("/api/txt2img", {"prompt": "a", "n": 10**39}),
        ("/api/txt2img", {"prompt": "a", "width": 10**39, "height": 10**39}),
        ("/api/jobs", {"prompt": "a", "priority": 10**39}),
        ("/generate", {"prompt": "a", "seed": 10**39}),
        ("/generate", {"prompt": "a", "height": 10**39}),
        ("/v1/images/generations", {"prompt": "a", "n": 10**39}),
        ("/v1/images/generations", {"prompt": "a", "size": "9" * 39 + "x16"}),
        ("/v1/flux-pro-1.1", {"prompt": "a", "steps": 10**39}),
        ("/sdapi/v1/txt2img", {"prompt": "a", "batch_size": 64, "n_iter": 64}),
        ("/sdapi/v1/txt2img", {"prompt": "a", "seed": 10**39}),
    ],
)
def test_a_number_too_large_is_a_bad_request(fake_server: Running, path: str, body: dict[str, Any]) -> None:
    answer = httpx2.post(fake_server.url + path, json=body)
    assert answer.status_code in {400, 422}, answer.text[:200]


def test_the_smallest_side_and_no_side_are_answered(fake_server: Running) -> None:
    for sides in ({"width": 0}, {"height": 0}, {"width": 0, "height": 0}, {"width": 128}, {"height": False}):
        answer = httpx2.post(f"{fake_server.url}/generate", json={"prompt": "a", "num_inference_steps": 1, **sides})
        assert answer.status_code == 200, answer.text


# ------------------------------------------------------------------------------------------------------------- pictures


def _png_of_size(width_px: int, height_px: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def _png_with_a_long_text() -> bytes:
    """A small PNG whose compressed note is a gigabyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(b"\0" * 2**20) for _ in range(1024)) + packer.flush()
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    data = file.getvalue()
    return data[:33] + chunk(b"zTXt", b"parameters\0\0" + packed) + data[33:]


def _gif_of_size(width_px: int, height_px: int) -> bytes:
    file = io.BytesIO()
    Image.new("P", (1, 1)).save(file, "GIF")
    data = bytearray(file.getvalue())
    data[6:10] = struct.pack("<HH", width_px, height_px)
    return bytes(data)


def _webp_of_size(width_px: int, height_px: int) -> bytes:
    """An animation's canvas of 16384 pixels a side, with a frame of one pixel."""
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    data = bytearray(file.getvalue())
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width_px - 1).to_bytes(3, "little") + (height_px - 1).to_bytes(3, "little")
    return bytes(data)


def _bmp_of_size(width_px: int, height_px: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "BMP")
    data = bytearray(file.getvalue())
    data[18:26] = struct.pack("<ii", width_px, height_px)
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png": lambda: _png_of_size(60_000, 60_000),
    "png of 2**31": lambda: _png_of_size(2**31 - 1, 2**31 - 1),
    "png just above": lambda: _png_of_size(8193, 8193),
    "png with a long text": _png_with_a_long_text,
    "gif": lambda: _gif_of_size(65_535, 65_535),
    "webp": lambda: _webp_of_size(16_383, 16_383),
    "bmp": lambda: _bmp_of_size(2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_would_explode_is_refused_with_little_memory(fake_server: Running, name: str) -> None:
    data = BOMBS[name]()
    text = base64.b64encode(data).decode()
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/api/img2img", {"prompt": "a", "image": text}),
        ("/sdapi/v1/img2img", {"prompt": "a", "init_images": [text]}),
        ("/sdapi/v1/extra-single-image", {"image": text}),
        ("/v1/images/edits", {"prompt": "a", "image": text}),
        ("/v1/flux-pro-1.1", {"prompt": "a", "input_image": text}),
        ("/api/generate", {"model": "starter", "prompt": "a", "images": [text], "stream": False}),
    ]
    before = psutil.Process().memory_info().rss
    for path, body in asked:
        answer = httpx2.post(fake_server.url + path, json=body, timeout=PATIENCE_S)
        assert answer.status_code in {400, 422}, f"{path}: {answer.text[:200]}"
    form = httpx2.post(f"{fake_server.url}/v1/images/variations", files={"image": data}, timeout=PATIENCE_S)
    assert form.status_code == 400
    assert psutil.Process().memory_info().rss - before < 150 * 2**20


def test_more_files_than_any_client_sends_are_refused(fake_server: Running) -> None:
    files = [("image[]", (f"{i}.png", b"x")) for i in range(40)]
    answer = httpx2.post(f"{fake_server.url}/v1/images/edits", data={"prompt": "a"}, files=files)
    assert answer.status_code == 400
    assert "files" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"--a", b"--a\r\n", b"--a\r\nBad header\r\n\r\nx\r\n--a--", b"--b\r\n\r\n--b--",
        b"--a\r\nContent-Disposition: form-data\r\n\r\nx\r\n--a--",
        b'--a\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xed\xa0\x80\r\n--a--\r\n',
        b'--a\r\nContent-Disposition: form-data; name="' + b"x" * 100_000 + b'"\r\n\r\nx\r\n--a--\r\n',
        b'--a\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"x" * 2**21 + b"\r\n--a--\r\n",
        b"--a\r\n" + b"X: y\r\n" * 10_000 + b"\r\nx\r\n--a--\r\n",
    ],
    ids=range(11),
)  # fmt: skip
@pytest.mark.parametrize("kind", ["a", "", '"', "\xff", "a; charset=nothing"])
def test_a_broken_form_is_a_bad_request(fake_server: Running, body: bytes, kind: str) -> None:
    headers = {b"Content-Type": f"multipart/form-data; boundary={kind}".encode("latin-1")}
    for path in ("/v1/images/edits", "/v1/images/variations"):
        answer = httpx2.post(fake_server.url + path, content=body, headers=headers)
        assert answer.status_code in {400, 413}, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("n_bytes", [0, 1, 2, 3, 3 * 2**18 - 1, 3 * 2**18, 3 * 2**18 + 1, 2**21 + 7])
def test_base64_of_every_length_is_read_whole(n_bytes: int) -> None:
    data = bytes(i * 31 % 256 for i in range(n_bytes))
    plain = base64.b64encode(data).decode()
    assert from_base64(plain, field="image") == data
    assert from_base64(plain.rstrip("="), field="image") == data
    assert from_base64(base64.urlsafe_b64encode(data).decode(), field="image") == data
    assert from_base64(f"data:image/png;base64,{base64.encodebytes(data).decode()}", field="image") == data


@pytest.mark.parametrize("text", ["a", "????", "a" * 2**21 + "!", "\u00e4" * 8, "aaaa====aaaa", "=", "\ud800"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    if text == "=":
        assert from_base64(text, field="image") == b""
        return
    with pytest.raises(InvalidValue):
        from_base64(text, field="image")


def test_the_limit_of_pixels_is_the_only_one_a_camera_meets() -> None:
    file = io.BytesIO()
    Image.new("RGB", (6000, 4000)).save(file, "JPEG")
    assert pictures.decode(file.getvalue()).width_px == 6000


def test_who_leaves_in_the_middle_of_a_body_is_no_fault_of_the_server(fake_server: Running) -> None:
    events = iter([
        {"type": "http.request", "body": b'{"prompt": "a f', "more_body": True}, {"type": "http.disconnect"},
    ])  # fmt: skip
    told = []

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        told.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/api/tokens", "raw_path": b"/api/tokens",
        "query_string": b"", "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
        "headers": [(b"host", b"127.0.0.1")],
    }  # fmt: skip
    fake_server.call(fake_server.app(scope, receive, send))
    assert told[0]["status"] == 499
