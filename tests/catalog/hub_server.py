"""A hub on loopback that speaks the wire protocols of Hugging Face and of ModelScope to their own client libraries.

Small files come from the hub itself, large ones by a redirect to a second address, as from the real one. What goes
wrong is set by the test: who is let in, which transfers break off, what is announced wrongly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "a1" * 20
PATIENCE_S = 30.0
PIECE_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer in place of the one asked for."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the hub was asked. is_cdn: by the second address."""

    path: str
    token: str | None
    cookie: str | None
    byte_range: str | None
    is_cdn: bool


def gated(status: int) -> Refusal:
    """Hugging Face's answer for a gated model."""
    message = "Access to model is restricted."
    return Refusal(status, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})


@dataclass
class HubServer:
    """One repository of one hub. `decide` looks at each request and may refuse it."""

    repo_id: str
    files: dict[str, bytes]
    is_gated: bool = False
    ignores_range: bool = False
    decide: Callable[[Asked], Refusal | None] = lambda _asked: None
    announced_sha256: dict[str, str] = field(default_factory=dict)
    # For a path: how many bytes each of the next transfers sends before it breaks off.
    breaks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    # Transfers of this path stand still after so many bytes, until `go_on` is set.
    holds: dict[str, int] = field(default_factory=dict)
    go_on: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    cdn_url: str = ""

    def asked_for(self, part: str) -> list[Asked]:
        """The requests whose path holds this text."""
        return [asked for asked in self.asked if part in asked.path]

    def sha256(self, path: str) -> str:
        """As the hub announces it."""
        return self.announced_sha256.get(path) or hashlib.sha256(self.files[path]).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under the folder, by its path in there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def serving(hub: HubServer) -> Iterator[HubServer]:
    """The hub at `hub.url` while this lasts."""
    with _listening(hub, is_cdn=False) as hub.url, _listening(hub, is_cdn=True) as hub.cdn_url:
        try:
            yield hub
        finally:
            hub.go_on.set()


@contextlib.contextmanager
def _listening(hub: HubServer, *, is_cdn: bool) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), type("_Bound", (_Handler,), {"hub": hub, "is_cdn": is_cdn}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="hub under test")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join(PATIENCE_S)
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients that are killed in the middle of a transfer are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    is_cdn: bool
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        path = unquote(url.path)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        asked = Asked(self.path, bearer, self.headers.get("Cookie"), self.headers.get("Range"), self.is_cdn)
        hub.asked.append(asked)
        refusal = hub.decide(asked)
        if refusal is not None:
            self._answer(refusal.status, refusal.body, refusal.headers)
        elif self.is_cdn:
            self._send_file(path.removeprefix("/"))
        elif re.fullmatch(rf"/api/models/{hub.repo_id}(/revision/\w+)?", path):
            self._answer_json(self._model_info())
        elif path == f"/api/models/{hub.repo_id}/auth-check":
            self._answer(200, b"{}")
        elif path == f"/api/v1/models/{hub.repo_id}/repo/files":
            self._answer_json({"Code": 200, "Data": {"Files": self._entries()}, "Success": True})
        elif path == f"/api/v1/models/{hub.repo_id}/repo":
            self._send_file(parse_qs(url.query)["FilePath"][0])
        elif path.startswith(f"/{hub.repo_id}/resolve/{REVISION}/"):
            self._resolve(path.removeprefix(f"/{hub.repo_id}/resolve/{REVISION}/"))
        elif path.startswith("/api/v1/"):
            self._answer(404, b'{"Code": 10010205001, "Message": "not found", "Success": false}')
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _model_info(self) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for path, data in self.hub.files.items():
            facts: dict[str, object] = {"rfilename": path, "size": len(data)}
            if path.endswith(".safetensors"):
                facts["lfs"] = {"sha256": self.hub.sha256(path), "size": len(data), "pointerSize": 134}
            facts["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            siblings.append(facts)
        return {"id": self.hub.repo_id, "sha": REVISION, "gated": "auto" if self.hub.is_gated else False,
                "private": False, "downloads": 1, "likes": 1, "tags": [], "siblings": siblings}  # fmt: skip

    def _entries(self) -> list[dict[str, object]]:
        folders = {path.rpartition("/")[0] for path in self.hub.files} - {""}
        trees: list[dict[str, object]] = [{"Path": folder, "Type": "tree", "Size": 0} for folder in sorted(folders)]
        return trees + [
            {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(data), "Revision": REVISION,
             "Sha256": self.hub.sha256(path), "IsLFS": path.endswith(".safetensors")}
            for path, data in self.hub.files.items()
        ]  # fmt: skip

    def _resolve(self, path: str) -> None:
        if path not in self.hub.files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif path.endswith(".safetensors"):
            self._answer(302, b"", {"Location": f"{self.hub.cdn_url}/{path}", "X-Linked-Etag": self.hub.sha256(path)})
        else:
            self._send_file(path)

    def _send_file(self, path: str) -> None:
        hub = self.hub
        data = hub.files[path]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and not hub.ignores_range else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        stop = start + hub.breaks[path].pop(0) if hub.breaks[path] else len(data)
        for at in range(start, min(stop, len(data)), PIECE_BYTES):
            if path in hub.holds and at >= hub.holds[path]:
                self.wfile.flush()
                assert hub.go_on.wait(PATIENCE_S), "nobody let the transfer go on"
            self.wfile.write(data[at : min(at + PIECE_BYTES, stop)])
        if stop < len(data):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _answer_json(self, value: Mapping[str, object]) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests read `asked`."""
