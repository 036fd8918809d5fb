"""One HTTP server that answers for language models, whatever its routes: bodies out, lines in, faults as ours.

Nothing limits how long an answer takes. Who stops reading closes the connection, by which every server of this kind
stops its work. Prompts and answers are in no log; nor is the server's address in what a caller is told.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from sdfleet.errors import (
    Busy,
    ModelNotFound,
    NotReady,
    SdfleetError,
    UnsupportedByModel,
    UpstreamFailed,
    UpstreamRefused,
)
from sdfleet.language.asking import Sound

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

CONNECT_S = 3.0
# A question about the server itself; one that computes on all its cores may take a while to say which models it has.
LIST_S = 10.0
# Of an answer that tells a fault.
MAX_FAULT_BYTES = 2**16
MAX_LIST_BYTES = 2**23
# One line of a stream: a picture in base64 would fit. What never ends must not fill the memory.
MAX_LINE_BYTES = 2**25
_SPEECH_PATHS = "/v1/audio/"


class Server:
    """See the file's first lines. url: without a slash at its end, without `/v1`. key: sent as a bearer token."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._client: httpx2.AsyncClient | None = None

    async def get(self, path: str) -> Any:
        """The JSON that a path answers with. Raises UpstreamFailed, UpstreamRefused and its like."""
        return await self._small("GET", path, None)

    async def post(self, path: str, body: Mapping[str, object]) -> Any:
        """As `get`, for a short question."""
        return await self._small("POST", path, body)

    async def _small(self, method: str, path: str, body: Mapping[str, object] | None) -> Any:
        import httpx2

        timeout = httpx2.Timeout(LIST_S, connect=CONNECT_S)
        with self._faults():
            async with self._opened().stream(method, self.url + path, json=body, timeout=timeout) as answer:
                await _check(answer)
                data = await _at_most(answer, MAX_LIST_BYTES)
        try:
            return json.loads(data)
        except ValueError as exc:
            raise UpstreamFailed(f"the server of the models answered {path} with what is no JSON") from exc

    async def delete(self, path: str, body: Mapping[str, object]) -> None:
        """Delete something there. Raises as `get`."""
        with self._faults():
            async with self._opened().stream("DELETE", self.url + path, json=body) as answer:
                await _check(answer)

    async def whole(self, path: str, body: Mapping[str, object], *, sound: Sound | None = None) -> bytes:
        """The whole body of an answer, however long it takes. Raises UpstreamRefused, UpstreamFailed, Busy."""
        with self._faults():
            async with self._posted(path, body, sound) as answer:
                await _check_route(answer, path, body)
                data = await _at_most(answer, MAX_LINE_BYTES * 8)
        if path.startswith(_SPEECH_PATHS) and data.lstrip().startswith(b'{"error"'):
            raise _no_route(path, body, _said(data))  # LM Studio says so with status 200
        return data

    async def lines(
        self, path: str, body: Mapping[str, object], *, sound: Sound | None = None
    ) -> AsyncGenerator[bytes]:
        """The lines of an answer that are not empty, as they come. Raises as `whole`."""
        with self._faults():
            async with self._posted(path, body, sound) as answer:
                await _check_route(answer, path, body)
                left = b""
                async for data in answer.aiter_bytes():
                    *whole, left = (left + data).split(b"\n")
                    for line in whole:
                        if line := line.strip():
                            yield line
                    if len(left) > MAX_LINE_BYTES:
                        raise UpstreamFailed(f"the server of the model sent a line of more than {MAX_LINE_BYTES} bytes")
                if left.strip():
                    yield left.strip()

    async def close(self) -> None:
        """Close what is open."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _posted(self, path: str, body: Mapping[str, object], sound: Sound | None) -> Any:
        client = self._opened()
        if sound is None:
            data = json.dumps(body).encode()
            return client.stream("POST", self.url + path, content=data, headers={"Content-Type": "application/json"})
        fields = {name: _in_form(value) for name, value in body.items()}
        files = {"file": (sound.name, sound.data, sound.kind)}
        return client.stream("POST", self.url + path, data=fields, files=files)

    def _opened(self) -> httpx2.AsyncClient:
        # Imported with the first use: a command line that draws one picture does without.
        import httpx2

        if self._client is None:
            headers = {"Accept-Encoding": "identity"}
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            # An own network's server: neither a proxy nor a .netrc of the environment has to do with it.
            transport = httpx2.AsyncHTTPTransport(
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
                socket_options=_KEEP_ALIVE,
            )
            timeout = httpx2.Timeout(None, connect=CONNECT_S)
            self._client = httpx2.AsyncClient(transport=transport, timeout=timeout, headers=headers, trust_env=False)
        return self._client

    @contextlib.contextmanager
    def _faults(self) -> Any:
        """What the connection meets, as ours."""
        import httpx2

        try:
            yield
        except httpx2.HTTPError as exc:
            log.info("a server of language models failed", extra={"url": self.url, "why": type(exc).__name__})
            raise UpstreamFailed(
                f"the server of the model failed: {type(exc).__name__}", hint="try again, or look at that server"
            ) from exc


def _keep_alive() -> list[tuple[int, int, int]]:
    """A machine that was switched off is noticed after half a minute, however long an answer may take."""
    wanted = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    return options + [(socket.IPPROTO_TCP, getattr(socket, name), n) for name, n in wanted if hasattr(socket, name)]


_KEEP_ALIVE = _keep_alive()


def _in_form(value: object) -> Any:
    if isinstance(value, list):
        return [str(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else str(value)


async def _at_most(answer: Any, n_bytes: int) -> bytes:
    found = bytearray()
    async for data in answer.aiter_bytes():
        found += data
        if len(found) > n_bytes:
            raise UpstreamFailed(f"the server of the model answered with more than {n_bytes} bytes")
    return bytes(found)


async def _check(answer: Any) -> None:
    """Raise what a status means."""
    if answer.status_code < 400:
        return
    found = bytearray()
    async for data in answer.aiter_bytes():
        found += data
        if len(found) > MAX_FAULT_BYTES:
            break
    raise fault_of(answer.status_code, bytes(found[:MAX_FAULT_BYTES]))


async def _check_route(answer: Any, path: str, body: Mapping[str, object]) -> None:
    """As `_check`; a route of speech that is not there is told as that, as most servers do not have it."""
    try:
        await _check(answer)
    except ModelNotFound as exc:
        if not path.startswith(_SPEECH_PATHS):
            raise
        raise _no_route(path, body, exc.message) from exc


def _no_route(path: str, body: Mapping[str, object], said: str) -> ModelNotFound:
    return ModelNotFound(
        f"the server of {str(body.get('model', ''))[:80]} does not answer {path} for it: {said}",
        hint="faster-whisper models of SD_SPEECH_MODELS do",
    )


def fault_of(status: int, body: bytes) -> SdfleetError:
    """The error of ours for an upstream's status and body, in its own words.

    >>> fault_of(404, b'{"error": "no model x"}'), fault_of(400, b'{"error": {"message": "no"}}')
    (ModelNotFound('no model x'), UpstreamRefused('no'))
    """
    said = _said(body) or f"HTTP {status}"
    match status:
        case 404:
            return ModelNotFound(said)
        case 429:
            return Busy(said, retry_after_s=2.0)
        case 503:
            return NotReady(said, retry_after_s=2.0)
        case 501:
            return UnsupportedByModel(said)
        case 401 | 403:
            return UpstreamFailed("the server of the model does not let us in", hint="see SD_LANGUAGE_KEY")
        case _ if status < 500:
            return UpstreamRefused(said)
        case _:
            return UpstreamFailed(f"the server of the model met a fault: {said}")


def _said(body: bytes) -> str:
    """What an error's body says, in whatever shape."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip()[:300] if not body.lstrip().startswith(b"<") else ""
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return value[:1000] if isinstance(value, str) else ""
