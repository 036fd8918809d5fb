"""Asking the server that runs with the same data folder, in another process of this machine."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping
    from http.client import HTTPConnection

    from sdfleet.settings import Settings

# A large checkpoint from a slow disk; whoever waits can press Ctrl-C, and the server goes on with what it does.
ANSWER_WITHIN_S = 1800.0
# The server is on this machine: no answer to the first packet means that nobody listens.
CONNECT_WITHIN_S = 5.0


def ask(settings: Settings, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The server's answer; None where no server runs. Raises the SdfleetError that it answers with."""
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
    return _said(connection, method, path, key=plate.key, body=body)


def ask_at(
    url: str, method: str, path: str, *, key: str | None, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The answer of a server on another machine. Raises InvalidValue, EngineFailed, and what it answers with."""
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
    return _said(connection, method, parts.path.rstrip("/") + path, key=key, body=body)


def _said(
    connection: HTTPConnection, method: str, path: str, *, key: str | None, body: Mapping[str, Any] | None
) -> dict[str, Any]:
    import http.client

    from sdfleet.errors import EngineFailed, from_wire

    data = b"" if body is None else json.dumps(body).encode()
    headers = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
    headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        connection.sock.settimeout(ANSWER_WITHIN_S)
        connection.request(method, path, body=data, headers=headers)
        response = connection.getresponse()
        said = json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException) as exc:
        address = f"{connection.host}:{connection.port}"
        raise EngineFailed(f"the server at {address} did not answer: {exc}", hint="see its log") from exc
    finally:
        connection.close()
    if response.status >= http.client.BAD_REQUEST:
        hint = str(said.get("hint", ""))
        message = str(said.get("error", f"the server answered {response.status}")).removesuffix(f"; {hint}")
        raise from_wire({"code": str(said.get("code", "")), "message": message, "hint": hint})
    return cast("dict[str, Any]", said)


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
