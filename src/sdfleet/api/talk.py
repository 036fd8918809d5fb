"""Answers of language and speech models over HTTP: framed for the caller's door, stopped when the caller leaves.

The status line waits for the first piece, so that what goes wrong before has a status of its own; events get a sign of
life after a while, for proxies. After the first piece a fault is the last thing said: an error event, or Ollama's line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sdfleet.api import access
from sdfleet.api.answering import house_of
from sdfleet.api.dialect import Dialect
from sdfleet.api.nodes import node_id
from sdfleet.errors import SdfleetError
from sdfleet.language.asking import SPEECH, Answer, Ask, Language, LanguageModel

log = logging.getLogger(__name__)

# Proxies cut a silent connection after 30 to 60 s; reading a long prompt may take longer.
QUIET_S = 10.0
_SIGN_OF_LIFE = b": still reading\n\n"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"


def answered(request: Request, ask: Ask, *, dialect: Dialect) -> Response:
    """The answer to a request, which begins when it is sent. Raises NotAllowed, RateLimited."""
    caller = access.caller_of(request)
    access.check_right(caller, "generate")
    limit: access.RateLimit = request.app.state.rate_limit
    limit.take(caller.owner, now_s=access.now_s(), per_minute=caller.rate_per_minute)
    return Told(house_of(request).language, ask, dialect=dialect)


class Told(Response):
    """See the file's first lines."""

    def __init__(self, language: Language, ask: Ask, *, dialect: Dialect) -> None:
        super().__init__()
        self._language = language
        self._ask = ask
        self._dialect = dialect
        self._is_events = ask.is_stream and ask.door.startswith("/v1/")
        self._has_begun = False
        self._has_piece = asyncio.Event()
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        talking = asyncio.ensure_future(self._talk(scope, receive, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({talking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if talking.done():
                talking.result()
        finally:
            for task in (talking, leaving):
                task.cancel()
            # The engine is told to stop before anybody hears that this request has ended.
            await asyncio.wait({talking, leaving})

    async def _talk(self, scope: Scope, receive: Receive, send: Send) -> None:
        comforting = asyncio.ensure_future(self._comfort(send)) if self._is_events else None
        try:
            async with self._language.ask(self._ask) as answer:
                self._has_piece.set()
                await self._begin(send, answer)
                if self._ask.is_stream:
                    await self._stream(send, answer.pieces)
                else:
                    async for piece in answer.pieces:
                        await self._say(send, piece)
                await send({"type": "http.response.body", "body": b""})
        except SdfleetError as exc:
            self._has_piece.set()
            response = self._dialect.error(exc)
            if not self._has_begun:
                await response(scope, receive, send)
                return
            log.info("an answer broke off", extra={"model": self._ask.model[:80], "why": exc.code})
            if not self._ask.is_stream:
                return  # the server closes a connection whose answer has no end, which tells that it is not whole
            await self._say(send, self._framed(_one_line(response)))
            await send({"type": "http.response.body", "body": b""})
        finally:
            if comforting is not None:
                comforting.cancel()
                await asyncio.wait({comforting})

    async def _stream(self, send: Send, pieces: AsyncGenerator[bytes]) -> None:
        async for piece in pieces:
            await self._say(send, self._framed(piece))
        if self._is_events and self._ask.door not in SPEECH:
            await self._say(send, b"data: [DONE]\n\n")

    async def _begin(self, send: Send, answer: Answer | None) -> None:
        async with self._sending:
            if self._has_begun:
                return
            self._has_begun = True
            kind = self._ask.kind if not self._ask.is_stream else EVENTS if self._is_events else NDJSON
            headers = {"Content-Type": kind}
            if self._ask.is_stream:
                # No proxy may keep the pieces back until there are enough of them.
                headers |= {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            if answer is not None:
                headers |= _headers(self._ask, answer)
            raw = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _say(self, send: Send, data: bytes) -> None:
        async with self._sending:
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _comfort(self, send: Send) -> None:
        """Signs of life until the first piece."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(QUIET_S):
                    await self._has_piece.wait()
            if self._has_piece.is_set():
                return
            await self._begin(send, None)
            await self._say(send, _SIGN_OF_LIFE)

    def _framed(self, piece: bytes) -> bytes:
        return b"data: " + piece + b"\n\n" if self._is_events else piece + b"\n"


def _headers(ask: Ask, answer: Answer) -> dict[str, str]:
    """Who answered, as Herd's clients read it."""
    return {
        "X-Fleet-Node": answer.node or node_id(),
        "X-Fleet-Model": _printable(answer.model.name),
        "X-Fleet-Served-Model": _printable(answer.model.name),
        "X-Fleet-Requested-Model": _printable(ask.model),
        "X-Fleet-Fallback": "false",
        "X-Fleet-Backend": answer.model.engine,
        "X-Fleet-Retries": str(answer.n_retries),
    }


def _printable(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text[:200])


def _one_line(response: Response) -> bytes:
    return json.dumps(json.loads(bytes(response.body))).encode()


async def _left(receive: Receive) -> None:
    """Return when the caller has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


# ------------------------------------------------------------------------------------------------------------ in lists


def as_tags(models: Iterable[LanguageModel]) -> list[dict[str, Any]]:
    """Models as `/api/tags` lists them; what Ollama's types require is never null."""
    return [_as_tag(model) for model in models]


def _as_tag(model: LanguageModel) -> dict[str, Any]:
    details = {"parent_model": "", "format": "", "family": "", "families": [], "parameter_size": ""}
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": model.modified_at or "1970-01-01T00:00:00Z",
        "size": model.n_bytes,
        "digest": model.digest,
        "details": details | {"quantization_level": ""} | {k: v for k, v in model.details.items() if v is not None},
        "capabilities": list(model.capabilities),
    }


def as_loaded(models: Iterable[LanguageModel]) -> list[dict[str, Any]]:
    """Those in memory, as `/api/ps` lists them."""
    return [
        {
            **_as_tag(model),
            "size_vram": 0,
            "expires_at": model.expires_at or "9999-12-31T23:59:59Z",
            "context_length": model.n_context,
        }
        for model in models
        if model.is_warm
    ]


def as_shown(model: LanguageModel) -> dict[str, Any]:
    """One, as `/api/show` tells it."""
    tag = _as_tag(model)
    family = str(tag["details"]["family"] or "unknown")
    facts: dict[str, Any] = {"general.architecture": family}
    if model.n_context:
        facts[f"{family}.context_length"] = model.n_context
    return {
        "license": "", "modelfile": f"# {model.name}", "parameters": "", "template": "", "details": tag["details"],
        "model_info": facts, "capabilities": tag["capabilities"], "modified_at": tag["modified_at"],
    }  # fmt: skip
