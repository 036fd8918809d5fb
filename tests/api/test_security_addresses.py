"""Names and addresses of strangers: what they ask us to call, to open, to echo; and the pages that ask."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpcore2
import httpx2
import pytest
from PIL import Image

from sdfleet.addresses import GuardedNetwork, check_url, is_public
from sdfleet.api import fetching
from sdfleet.errors import InvalidValue
from tests.api.serving import PATIENCE_S, Running
from tests.api.test_security_bodies import connect, read_all

PRIVATE_HOSTS = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "0",
    "0.0.0.0", "10.0.0.1", "192.168.0.1",  # noqa: S104 - asked for, not listened on
    "172.31.255.255", "169.254.169.254", "100.64.0.1", "localhost", "LOCALHOST", "localhost.", "127.0.0.1.",
    "x.localhost",
    "[::]", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:0:127.0.0.1]",
    "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b:1::127.0.0.1]", "[2002:7f00:1::]", "[2001:0:7f00:1::]",
    "[fe80::1]", "[fe80::1%25lo]", "[fec0::1]", "[fc00::1]", "[fd00::1]", "[ff02::1]", "[100::1]", "[2001:db8::1]",
    "[3fff::1]", "[5f00::1]", "192.88.99.1", "198.18.0.1", "240.0.0.1", "255.255.255.255",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_no_spelling_of_a_private_address_is_taken_for_a_webhook_or_a_picture(fake_server: Running, host: str) -> None:
    url = f"http://{host}/x.png"
    with pytest.raises(InvalidValue):
        check_url("image", url, allow_private=False)
    with httpx2.Client(base_url=fake_server.url) as client:
        asked = {"prompt": "a", "steps": 1}
        for path, body in (
            ("/api/jobs", {**asked, "webhook": url}),
            ("/api/jobs", {**asked, "webhook": {"url": url}}),
            ("/api/txt2img", {**asked, "webhook": url}),
            ("/v1/flux-pro-1.1", {**asked, "webhook_url": url}),
        ):
            assert client.post(path, json=body).status_code in {400, 422}, path
        assert client.get("/api/jobs").json()["jobs"] == []


class Inside:
    """A server on loopback that no stranger may have us call."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.n_calls = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                data = connection.recv(65536)
                if data == b"stop":
                    return
                self.n_calls += 1
                connection.sendall(self._answer)

    def close(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"stop")
            self._thread.join(PATIENCE_S)
        self._listener.close()


def _file(width_px: int = 64, height_px: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width_px, height_px), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def inside() -> Iterator[Inside]:
    data = _file()
    here = Inside(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data)
    yield here
    here.close()


PICTURE_BY_URL = [
    ("/api/img2img", "image", False),
    ("/v1/images/edits", "image", False),
    ("/sdapi/v1/img2img", "init_images", True),
    ("/v1/flux-pro-1.1", "input_image", False),
    ("/api/generate", "images", True),
]


def _ask(here: Running, path: str, field: str, url: str, *, is_list: bool) -> httpx2.Response:
    body: dict[str, object] = {"prompt": "a", "steps": 1, field: [url] if is_list else url}
    if path == "/api/generate":
        body |= {"model": "starter", "stream": False}
    return httpx2.post(here.url + path, json=body, timeout=PATIENCE_S)


@pytest.mark.parametrize(("path", "field", "is_list"), PICTURE_BY_URL)
def test_pictures_are_fetched_only_where_that_is_allowed_and_never_from_within(
    server: Callable[..., Running],
    inside: Inside,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    field: str,
    *,
    is_list: bool,
) -> None:
    async def rebound(_host: str, _port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    network = lambda **given: GuardedNetwork(**given, resolve=rebound)  # noqa: E731 - a class with one argument filled in
    monkeypatch.setattr(fetching, "GuardedNetwork", network)
    by_name = f"http://pictures.example:{inside.port}/x.png"
    closed, public, private = (
        server(),
        server(allow_image_urls=True),
        server(allow_image_urls=True, allow_private_urls=True),
    )
    for here, url in ((closed, by_name), (public, by_name), (public, f"http://127.0.0.1:{inside.port}/x.png")):
        answer = _ask(here, path, field, url, is_list=is_list)
        assert answer.status_code in {400, 422}, answer.text
    assert inside.n_calls == 0
    answer = _ask(private, path, field, by_name, is_list=is_list)
    assert answer.status_code == 200, answer.text
    assert inside.n_calls == 1


def test_a_redirect_is_not_followed_inside(server: Callable[..., Running], inside: Inside) -> None:
    outside = Inside(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\nContent-Length: 0\r\n\r\n" % inside.port)
    try:
        here = server(allow_image_urls=True, allow_private_urls=True)
        answer = _ask(here, "/api/img2img", "image", f"http://127.0.0.1:{outside.port}/", is_list=False)
        assert answer.status_code == 400
        assert "302" in answer.json()["error"]
        assert (outside.n_calls, inside.n_calls) == (1, 0)
    finally:
        outside.close()


@pytest.mark.parametrize(
    "addresses", [["8.8.8.8", "127.0.0.1"], ["::1"], ["fec0::1"], ["::ffff:0:7f00:1"], ["not an address"], []]
)
def test_a_name_with_one_private_address_is_not_connected_to(addresses: list[str]) -> None:
    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return addresses

    with pytest.raises(httpcore2.ConnectError, match="not a public address"):
        asyncio.run(GuardedNetwork(resolve=resolve).connect_tcp("stranger.example", 80))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "2002:808:808::1"])
def test_the_internet_may_be_called(address: str) -> None:
    assert is_public(address)


# ----------------------------------------------------------------------------------------------------------- traversal

OUTSIDE = [
    "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "....//....//etc/passwd", "/etc/passwd", "%2fetc%2fpasswd",
    "..\\..\\windows\\win.ini", "..%5c..%5cwin.ini", "%2e%2e/%2e%2e/etc/passwd", "secret.toml", "../secret",
    "secret%00.png",
    "file:///etc/passwd", "~/.ssh/id_rsa", "signing.key", "../signing.key", "sdfleet.db", "con", "a" * 5000,
    "%ff%fe", ".",
]  # fmt: skip


@pytest.fixture(scope="module")
def with_secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    from tests.api.serving import running

    home = tmp_path_factory.mktemp("home with a secret")
    (home / "secret.toml").write_text("the-secret-of-this-test")
    (home / "models").mkdir()
    (home / "outputs").mkdir()
    (home / "outputs" / "secret.png").write_bytes(b"the-secret-of-this-test")
    with running(home) as here:
        yield here, home


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_in_a_path_opens_a_file(with_secret: tuple[Running, Path], name: str) -> None:
    here, _ = with_secret
    with httpx2.Client(base_url=here.url) as client:
        for prefix in (
            "/api/outputs/", "/api/jobs/", "/files/", "/v1/models/", "/v1/flux-", "/v1/get_result?id=",
            "/api/jobs?before=", "/api/outputs?before=", "/api/jobs?search=",
        ):  # fmt: skip
            for suffix in ("", "/thumbnail", "/events"):
                # As it stands: a client library would take the dots out.
                with connect(here) as connection:
                    target = f"{prefix}{name}{suffix}".encode().replace(b" ", b"%20")
                    connection.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    answer = read_all(connection)
                status = int(answer.split(b" ", 2)[1])
                assert status < 500, answer
                assert b"the-secret" not in answer
                assert b"root:" not in answer
                if prefix[-1] in "/-":
                    assert status >= 400, answer
        assert client.delete(f"/api/outputs/{name[:200].replace('%', '%25')}").status_code in {404, 405}


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_in_a_body_opens_a_file(with_secret: tuple[Running, Path], name: str) -> None:
    here, home = with_secret
    with httpx2.Client(base_url=here.url) as client:
        for given in (name, f"{home}/{name}"):
            asked = {"prompt": "a", "steps": 1}
            for path, body in (
                *(
                    ("/api/txt2img", {**asked, field: given})
                    for field in ("model", "sampler", "backend", "image", "t5")
                ),
                ("/api/img2img", {**asked, "image": given}),
                ("/api/img2img", {**asked, "image": base64.b64encode(_file()).decode(), "mask": given}),
                ("/v1/images/generations", {**asked, "model": given}),
                ("/v1/images/generations", {**asked, "sampler_name": given, "size": given}),
                ("/v1/images/edits", {**asked, "image": given}),
                ("/sdapi/v1/txt2img", {**asked, "override_settings": {"sd_model_checkpoint": given}}),
                ("/sdapi/v1/txt2img", {**asked, "sampler_name": given}),
                ("/sdapi/v1/txt2img", {**asked, "script_name": given}),
                ("/sdapi/v1/img2img", {**asked, "init_images": [given]}),
                ("/sdapi/v1/options", {"sd_model_checkpoint": given}),
                ("/sdapi/v1/png-info", {"image": given}),
                ("/sdapi/v1/extra-single-image", {"image": base64.b64encode(_file()).decode(), "upscaler_1": given}),
                ("/api/generate", {**asked, "model": given}),
                ("/api/generate", {**asked, "model": "starter", "images": [given]}),
                ("/api/show", {"model": given}),
                ("/api/generate-image", {**asked, "model": given}),
                ("/v1/flux-pro-1.1", {**asked, "input_image": given}),
            ):
                answer = client.post(path, json=body)
                assert 400 <= answer.status_code < 500, f"{path} {body}: {answer.text[:200]}"
                assert "the-secret" not in answer.text
                assert "root:" not in answer.text
    assert {path.name for path in home.iterdir()} <= {
        "secret.toml", "models", "outputs", "signing.key", "server.lock", "server.pid", "sdfleet.db", "sdfleet.db-wal",
        "sdfleet.db-shm", "server.json", "cache", "logs",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("line", ["\r\nX-Evil: 1", "\nX-Evil: 1", "\r\n\r\n<html>", "\0", "\x01", "\u2028", "\u00e4"])
def test_nothing_we_echo_in_a_header_ends_the_header(line: str, tmp_path: Path) -> None:
    from tests.api.serving import running

    with running(tmp_path / "here") as here, httpx2.Client(base_url=here.url) as client:
        asked = {"prompt": f"a{line.replace(chr(0), '')}", "steps": 1}
        for path, body in (
            ("/api/generate-image", {**asked, "model": "starter:latest"}),
            ("/api/generate-image", {**asked, "model": f"starter{line}"}),
            ("/api/generate-image", {**asked, "model": "starter", "user": line, "metadata": {"tags": [line]}}),
            ("/api/jobs", {**asked, "user": line}),
            ("/v1/images/generations", {**asked, "user": line}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code < 500, answer.text
            assert "x-evil" not in answer.headers
            assert all(value.isprintable() for value in answer.headers.values())
        raw = client.post("/api/txt2img", json=asked, headers={"Accept": "image/png"})
        assert raw.status_code == 200
        assert all(value.isprintable() for value in raw.headers.values())


def test_a_request_id_of_the_caller_is_kept_only_if_it_is_plain(fake_server: Running) -> None:
    def told(given: bytes) -> bytes:
        with connect(fake_server) as connection:
            head = (
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-Id: " + given + b"\r\n\r\n"
            )
            connection.sendall(head)
            answer = read_all(connection)
        lines = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
        return next(line.partition(b": ")[2] for line in lines if line.lower().startswith(b"x-request-id"))

    assert told(b"abc-1.2_3") == b"abc-1.2_3"
    for strange in (b"a b", b"a;b", b"\xe4", b"a" * 65, b"", b"a\tb", b"<b>"):
        assert told(strange) != strange.strip() or strange == b""


# ---------------------------------------------------------------------------------------------------------------- pages


def test_a_name_that_was_bound_to_loopback_is_not_answered(fake_server: Running) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "2130706433"):
        for path in ("/health", "/api/jobs", "/v1/models", "/"):
            answer = httpx2.get(fake_server.url + path, headers={"Host": host})
            assert answer.status_code == 403, f"{host} {path}"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "file://"},
        {"Origin": "http://localhost.evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    ],
)  # fmt: skip
def test_a_page_of_another_site_changes_nothing(fake_server: Running, headers: dict[str, str]) -> None:
    with httpx2.Client(base_url=fake_server.url, headers=headers) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json", "multipart/form-data"):
            for path in (
                "/api/jobs",
                "/v1/images/generations",
                "/sdapi/v1/options",
                "/sdapi/v1/interrupt",
                "/generate",
            ):
                answer = client.post(path, content=b'{"prompt": "a"}', headers={"Content-Type": kind})
                assert answer.status_code == 403, f"{path} {kind}"
        assert client.delete("/api/jobs/000000000000").status_code == 403


def test_a_page_that_is_allowed_asks_first_without_a_key_and_reads_faults_too(server: Callable[..., Running]) -> None:
    here = server(api_key="k", allowed_origins=("https://chat.example",), is_loaded=False)
    with httpx2.Client(base_url=here.url) as client:

        def preflight(origin: str) -> httpx2.Response:
            wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            return client.options("/v1/images/generations", headers={"Origin": origin, **wanted})

        asked = preflight("https://chat.example")
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-origin" not in preflight("https://evil.example").headers
        refused = client.post("/v1/images/generations", headers={"Origin": "https://chat.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-credentials" not in refused.headers


def test_without_allowed_origins_no_page_may_read_anything(fake_server: Running) -> None:
    for method in ("GET", "OPTIONS"):
        answer = httpx2.request(method, f"{fake_server.url}/v1/models", headers={"Origin": "https://chat.example"})
        assert not any(name.startswith("access-control") for name in answer.headers)
