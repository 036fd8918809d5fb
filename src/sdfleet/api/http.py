"""uvicorn as this server runs it: heads of requests within limits, and jobs that survive its end.

On SIGTERM or Ctrl-C: no new connections and no new jobs -> what runs has SD_DRAIN_S to end -> whoever still waits is
told that the server stops -> everything closes. What is still in line goes on after the next start.
"""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sdfleet.api.app import drain

# A browser sends 1 KiB; the parser itself would keep whatever comes.
MAX_HEAD_BYTES = 32 * 2**10
# From one request's end, or the connection's beginning, to the next request's head; then it is closed.
HEAD_WITHIN_S = 75.0
# Answers are given within this once jobs have ended; a reader that never reads must not keep the server from ending.
ANSWER_WITHIN_S = 2
# A peer that takes no byte for so long is gone, also where it still says that it lives.
DEAF_AFTER_MS = 120_000
# More connections than these wait in the kernel.
BACKLOG = 4096


class BoundedHttp(HttpToolsProtocol):
    """HTTP/1.1 that refuses a head which is too long, and hangs up on one which does not come."""

    _n_head_bytes = 0
    _is_in_head = True
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_WITHIN_S, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_head:
            self._n_head_bytes += len(data)
            if self._n_head_bytes > MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        if self._patience is None:
            self._patience = self.loop.call_later(HEAD_WITHIN_S, self._hang_up)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._n_head_bytes = False, 0
        self._stop_waiting()
        super().on_headers_complete()

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _hang_up(self) -> None:
        self._patience = None
        self.transport.close()

    def _refuse(self, status: HTTPStatus) -> None:
        if not self.transport.is_closing():
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()


class Server(uvicorn.Server):
    """Ends with its app, and gives the app's jobs their time before connections lose theirs.

    app: of `create_app`. Afterwards `fault` is what it died of, if it did.
    """

    def __init__(self, app: FastAPI, **options: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHttp,
                ws="none",
                lifespan="on",
                log_config=None,
                # Ours say the same, and a fault of the start in one line instead of a traceback.
                log_level="critical",
                access_log=False,
                server_header=False,
                timeout_keep_alive=round(HEAD_WITHIN_S),
                timeout_graceful_shutdown=ANSWER_WITHIN_S,
                backlog=BACKLOG,
                **options,
            )
        )
        self._app = app

    @property
    def fault(self) -> BaseException | None:
        """What the app could not start with, or died of."""
        fault: BaseException | None = self._app.state.fault
        return fault

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.fault is not None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, `should_exit`, or the app's end. Raises `fault`."""
        with self.capture_signals():
            try:
                await self._serve(sockets)
            except SystemExit:  # its word for an app that could not start
                if self.fault is None:
                    raise
            # The end that a signal asked for has been done; it is not sent to ourselves once more.
            self._captured_signals.clear()
        if self.fault is not None:
            raise self.fault

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.fault is None:
            await drain(self._app)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections for a server. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit these.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAF_AFTER_MS)
        listener.bind((host, port))
        # From here on clients wait instead of being refused, while the app is still being opened.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
