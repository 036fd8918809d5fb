"""A server with OpenAI's routes that streams numbers at a steady pace: `python -m tests.language.streaming_upstream`.

Each token is the time it was sent at (`time.monotonic()` in nanoseconds, one clock for a whole machine) and its number.
It says on which port it listens, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator

MODELS = {"object": "list", "data": [{"id": "clock", "object": "model", "created": 0}]}


@contextlib.contextmanager
def streaming_upstream() -> Iterator[str]:
    """Its address; a process of its own."""
    words = [sys.executable, "-m", "tests.language.streaming_upstream"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            n_bytes = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
            body = json.loads(await reader.readexactly(n_bytes) or b"{}")
            if head.startswith("post /v1/chat"):
                await _stream(writer, n_tokens=body["max_tokens"], every_s=body.get("every_s", 0.02))
                continue
            status, answer = ("200 OK", MODELS) if head.startswith("get /v1/models") else ("404 Not Found", {})
            text = json.dumps(answer).encode()
            writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)
            await writer.drain()


async def _stream(writer: asyncio.StreamWriter, *, n_tokens: int, every_s: float) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for i in range(n_tokens):
        text = f"{time.monotonic_ns()} {i} "
        event = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
        _chunk(writer, f"data: {json.dumps(event)}\n\n".encode())
        await writer.drain()
        await asyncio.sleep(every_s)
    _chunk(writer, b"data: [DONE]\n\n")
    _chunk(writer, b"")
    await writer.drain()


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def _main() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main())
