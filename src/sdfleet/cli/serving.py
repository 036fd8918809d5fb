"""Asking the server that runs with the same data folder, in another process of this machine."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from http.client import HTTPConnection, HTTPResponse

    from sdfleet.errors import SdfleetError
    from sdfleet.settings import Settings

# A large checkpoint from a slow disk; whoever waits can press Ctrl-C, and the server goes on with what it does.
ANSWER_WITHIN_S = 1800.0
# The server is on this machine: no answer to the first packet means that nobody listens.
CONNECT_WITHIN_S = 5.0
_FIRST_ERROR = 400


def ask(settings: Settings, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The server's answer; None where no server runs. Raises the SdfleetError that it answers with."""
    here = reach(settings)
    return None if here is None else here.ask(method, path, body)


def reach(settings: Settings) -> Server | None:
    """The server that runs with the same data folder; None where none does."""
    import http.client

    from sdfleet.storage import doorplate

    plate = doorplate.read(settings.home)
    if plate is None:
        return None
    connection = http.client.HTTPConnection(plate.host, plate.port, timeout=CONNECT_WITHIN_S)
    try:
        connection.connect()
    except OSError:
        return None  # it was killed, or stops just now
    return Server(connection, key=plate.key)


def reach_at(url: str, *, key: str | None) -> Server:
    """A server on another machine. Raises InvalidValue, EngineFailed."""
    import http.client
    from urllib.parse import urlsplit

    from sdfleet.errors import EngineFailed, InvalidValue

    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in {"http", "https"} or parts.hostname is None:
        raise InvalidValue("router", f"{url!r} is no address of a server", hint="for example http://10.0.0.2:11435")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=CONNECT_WITHIN_S)
    try:
        connection.connect()
    except OSError as exc:
        raise EngineFailed(f"{url} cannot be reached: {exc.strerror or exc}", hint="is the router running?") from exc
    return Server(connection, key=key, folder=parts.path.rstrip("/"))


class Server:
    """An open connection, for one question. folder: what goes before every path."""

    def __init__(self, connection: HTTPConnection, *, key: str | None, folder: str = "") -> None:
        self._connection = connection
        self._key = key
        self._folder = folder

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer. Raises EngineFailed (none came), and the SdfleetError that the server answers with."""
        with self._asked(method, path, body) as response, self._told():
            said = json.loads(response.read())
        if response.status >= _FIRST_ERROR:
            raise _error_of(said, response.status)
        return cast("dict[str, Any]", said)

    def ask_for_plan(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """As `ask` by POST; an answer that asks for a yes, with a plan, is given back like any other."""
        with self._asked("POST", path, body) as response, self._told():
            said = json.loads(response.read())
        if response.status >= _FIRST_ERROR and "plan" not in said:
            raise _error_of(said, response.status)
        return cast("dict[str, Any]", said)

    def lines(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer to a POST, one JSON object a line. Raises as `ask`, for an error in a line too."""
        with self._asked("POST", path, body) as response, self._told():
            for line in response:
                said = json.loads(line)
                if response.status >= _FIRST_ERROR or "error" in said:
                    raise _error_of(said, response.status)
                yield said

    @contextlib.contextmanager
    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None) -> Iterator[HTTPResponse]:
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        headers |= {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            with self._told():
                self._connection.sock.settimeout(ANSWER_WITHIN_S)
                self._connection.request(method, self._folder + path, body=data, headers=headers)
                response = self._connection.getresponse()
            yield response
        finally:
            self._connection.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        import http.client

        from sdfleet.errors import EngineFailed

        try:
            yield
        except (OSError, ValueError, http.client.HTTPException) as exc:
            address = f"{self._connection.host}:{self._connection.port}"
            raise EngineFailed(f"the server at {address} did not answer: {exc}", hint="see its log") from exc


def _error_of(said: Mapping[str, Any], status: int) -> SdfleetError:
    from sdfleet.errors import from_wire

    hint = str(said.get("hint", ""))
    message = str(said.get("error", f"the server answered {status}")).removesuffix(f"; {hint}")
    return from_wire({"code": str(said.get("code", "")), "message": message, "hint": hint})


def unload(settings: Settings, model: str) -> None:
    """Let a model leave the memory of a server, if one runs and has it. Raises InUse while a job draws with it."""
    from urllib.parse import quote

    from sdfleet.errors import CheckpointError

    with contextlib.suppress(CheckpointError):  # broken, or not here as a whole: nothing of it is in memory
        ask(settings, "POST", f"/api/models/{quote(model)}/unload")


def must_ask(settings: Settings, method: str, path: str) -> dict[str, Any]:
    """The server's answer. Raises NotFound where no server runs, and the SdfleetError that it answers with."""
    from sdfleet.errors import NotFound

    answer = ask(settings, method, path)
    if answer is None:
        raise NotFound(f"no server runs with {settings.home}", hint="start one: sdfleet serve")
    return answer
