"""Questions to a service, or to a program beside us, over HTTP. Redirects are never followed.

What matters to whoever asks for money is told apart: a question that cannot have arrived, and one that may have.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field

import httpcore2

from sdfleet import __version__
from sdfleet.addresses import GuardedNetwork

CONNECT_WITHIN_S = 10.0
# Between two bytes of an answer.
ANSWER_WITHIN_S = 60.0
MAX_JSON_BYTES = 4 * 2**20


class Unreachable(Exception):
    """No connection was made: nothing has been asked. Caught by the backend that asked."""


class Lost(Exception):
    """The connection broke, or no answer came in time: it may have been asked. Caught by the backend that asked."""


class BadAnswer(Exception):
    """An answer that is too long, or is not what it should be. Caught by the backend that asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """headers: names in small letters."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(repr=False)

    @property
    def is_good(self) -> bool:
        """2xx."""
        return 200 <= self.status < 300

    def json(self) -> dict[str, object]:
        """The body as a JSON object. Raises BadAnswer."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError) as exc:
            raise BadAnswer(f"the answer ({self.status}) is not JSON") from exc
        if not isinstance(found, dict):
            raise BadAnswer(f"the answer ({self.status}) is not a JSON object")
        return found


class Web:
    """Connections to one place, or to whatever it names. Belongs to one event loop; opened by the first question.

    allow_private: whether an address of our own networks may be called. keeps: connections are used again; without it
    a question can never be lost because the connection had been closed before it.
    """

    def __init__(self, *, allow_private: bool, keeps: bool = True, answer_within_s: float = ANSWER_WITHIN_S) -> None:
        self._network = GuardedNetwork(allow_private=allow_private)
        self._n_kept = 8 if keeps else 0
        self._limits = {"connect": CONNECT_WITHIN_S, "read": answer_within_s, "write": answer_within_s}
        self._pool: httpcore2.AsyncConnectionPool | None = None

    async def ask(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: object = None,
        max_bytes: int = MAX_JSON_BYTES,
    ) -> Answer:
        """The whole answer. body: sent as JSON. Raises Unreachable, Lost, BadAnswer."""
        async with self.stream(method, url, headers=headers, body=body) as (status, told, parts):
            content = bytearray()
            with _translated():
                async for part in parts:
                    content += part
                    if len(content) > max_bytes:
                        raise BadAnswer(f"the answer is longer than {max_bytes} bytes")
        return Answer(status=status, headers=told, body=bytes(content))

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: object = None
    ) -> AsyncIterator[tuple[int, dict[str, str], AsyncIterator[bytes]]]:
        """Status, headers and the parts of the body as they come; leaving it closes the connection."""
        sent = {"User-Agent": f"sdfleet/{__version__}", "Accept": "*/*", **(headers or {})}
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        if self._pool is None:
            self._pool = httpcore2.AsyncConnectionPool(
                network_backend=self._network, max_connections=64, max_keepalive_connections=self._n_kept
            )
        asking = self._pool.stream(
            method, url, headers=list(sent.items()), content=content, extensions={"timeout": self._limits}
        )
        async with contextlib.AsyncExitStack() as stack:
            with _translated():
                answer = await stack.enter_async_context(asking)
            told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in answer.headers}
            yield answer.status, told, answer.aiter_stream()

    async def close(self) -> None:
        """May be called twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (httpcore2.ConnectError, httpcore2.ConnectTimeout, httpcore2.PoolTimeout) as exc:
        raise Unreachable(str(exc) or "no connection in time") from exc
    except (httpcore2.UnsupportedProtocol, httpcore2.LocalProtocolError) as exc:
        raise BadAnswer(f"this cannot be asked: {exc}") from exc
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as exc:
        raise Lost(str(exc) or "no answer in time") from exc


async def lines(parts: AsyncIterator[bytes], *, max_bytes: int) -> AsyncIterator[bytes]:
    """The lines of a body as they come, without empty ones. Raises Lost, BadAnswer (a line longer than max_bytes)."""
    rest: list[bytes] = []
    n_bytes = 0
    with _translated():
        async for part in parts:
            first, *others = part.split(b"\n")
            rest.append(first)
            n_bytes += len(first)
            if n_bytes > max_bytes:
                raise BadAnswer(f"a line is longer than {max_bytes} bytes")
            if not others:
                continue
            for line in (b"".join(rest), *others[:-1]):
                if line.strip():
                    yield line
            rest, n_bytes = [others[-1]], len(others[-1])
    if last := b"".join(rest).strip():
        yield last
