"""ASGI: bodies within limits, a request id for everything, one log line per request."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdfleet.api.access import DialectOf
from sdfleet.errors import EngineFailed, NotAcceptable, TooLarge

log = logging.getLogger(__name__)

# The longest pause between two pieces of a body, and what it brings on average; a phone on a bad line is quicker.
BODY_PAUSE_S = 30.0
MIN_BYTES_PER_S = 8 * 2**10
# What the log shows where the caller left before there was an answer.
_NO_ANSWER = 499


class BodyTooSlow(NotAcceptable):
    """The rest of the body did not come."""

    code = "body_too_slow"
    http_status = 408


class Limits:
    """No body longer than `max_body` reaches a route, whatever Content-Length says."""

    def __init__(self, app: ASGIApp, *, dialect_of: DialectOf, max_body: int) -> None:
        self._app = app
        self._dialect_of = dialect_of
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        told = headers.get("content-length", "0")
        begun_s = time.monotonic()
        n_bytes = 0
        is_whole = told == "0" and "transfer-encoding" not in headers

        async def limited() -> Message:
            nonlocal n_bytes, is_whole
            if is_whole:  # only the end of the connection is still to come, at any time
                return await receive()
            late_s = begun_s + BODY_PAUSE_S + n_bytes / MIN_BYTES_PER_S - time.monotonic()
            try:
                async with asyncio.timeout(min(BODY_PAUSE_S, late_s)):
                    message = await receive()
            except TimeoutError as exc:
                raise BodyTooSlow("the body comes too slowly", hint="send it faster") from exc
            if message["type"] == "http.request":
                n_bytes += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if n_bytes > self._max_body:
                    raise self._too_large()
            return message

        async def closing(message: Message) -> None:
            # Who is refused before the end of the body is not read any further.
            if message["type"] == "http.response.start" and not is_whole and message["status"] >= 400:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if told.isascii() and told.isdigit() and int(told[:20]) > self._max_body:
            await self._dialect_of(scope["path"]).error(self._too_large())(scope, receive, closing)
            return
        await self._app(scope, limited, closing)

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"the body is larger than {self._max_body} bytes", hint="send smaller pictures; SD_MAX_BODY sets it"
        )


class Tracing:
    """Every answer carries `X-Request-Id`; every request is one log line, without its query, body or key.

    A fault nobody foresaw is kept in the log with that id, and answered in the dialect of the path.
    """

    def __init__(self, app: ASGIApp, *, dialect_of: DialectOf) -> None:
        self._app = app
        self._dialect_of = dialect_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        begun_s = time.monotonic()
        status = _NO_ANSWER

        async def traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, traced)
        except Exception as exc:  # the one broad handler of the server
            log.exception("a fault of sdfleet itself", extra={"request_id": request_id})
            if status != _NO_ANSWER:
                raise  # the answer has begun: only breaking the connection tells that it is not whole
            fault = EngineFailed(
                f"a fault of sdfleet itself: {type(exc).__name__}", hint=f"the server's log has it as {request_id}"
            )
            await self._dialect_of(scope["path"]).error(fault)(scope, receive, traced)
        finally:
            caller = state.get("caller")
            facts = {
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "spent_ms": round((time.monotonic() - begun_s) * 1000, 1),
                "request_id": request_id,
            }
            if caller is not None:
                facts["caller"] = caller.name
            log.log(logging.DEBUG if scope["path"] in {"/health", "/metrics"} else logging.INFO, "request", extra=facts)
