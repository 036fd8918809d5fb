"""Many readers of streamed answers at once, with as little in between as possible."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(slots=True)
class Read:
    """One answer. numbers: of its tokens, in order of arrival. late_ms: how long each was under way."""

    numbers: list[int] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    is_whole: bool = False
    status: int = 0


async def read_stream(url: str, *, n_tokens: int, every_s: float) -> Read:
    """An answer of `streaming_upstream`, asked of it or of a server in front of it."""
    found = Read()
    host = urlsplit(url)
    reader, writer = await asyncio.open_connection(host.hostname, host.port, limit=2**20)
    asked = {"model": "clock", "messages": [], "stream": True, "max_tokens": n_tokens, "every_s": every_s}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        found.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            now_ns = time.monotonic_ns()
            if line.startswith(b"data: [DONE]"):
                found.is_whole = True
                break
            if line.startswith(b"data: {"):
                text = json.loads(line[6:])["choices"][0]["delta"]["content"]
                sent_ns, number = map(int, text.split())
                found.numbers.append(number)
                found.late_ms.append((now_ns - sent_ns) / 1e6)
    finally:
        writer.close()
    return found


async def read_many(url: str, n_streams: int, *, n_tokens: int, every_s: float) -> list[Read]:
    """So many at the same time."""
    return await asyncio.gather(*(read_stream(url, n_tokens=n_tokens, every_s=every_s) for _ in range(n_streams)))
