"""Server-sent events of an OpenAI-shaped server: the data of each, and what stands there when something went wrong."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from sdfleet.errors import SdfleetError, UpstreamFailed
from sdfleet.language.asking import Sound
from sdfleet.language.server import Server, fault_of


async def events(
    server: Server, path: str, body: Mapping[str, object], *, sound: Sound | None = None
) -> AsyncGenerator[bytes]:
    """The data of the events of a stream, to its `[DONE]`. Raises as `Server.lines`."""
    is_whole = False
    async with aclosing(server.lines(path, body, sound=sound)) as lines:
        async for line in lines:
            if is_whole:
                continue  # read to the end, so that the connection can be used again
            if not line.startswith(b"data:"):
                if line.startswith((b"error:", b"{")):  # some versions tell a fault so, in place of a stream
                    raise _broken(line.removeprefix(b"error:").strip())
                continue  # comments, names of events
            data = line[5:].strip()
            if data == b"[DONE]":
                is_whole = True
                continue
            if data.startswith(b'{"error"'):
                raise _broken(data)
            yield data
            is_whole = data.startswith(b'{"type":"transcript.text.done"')  # speech ends without the word
    if not is_whole:
        raise UpstreamFailed("the server of the model broke off in the middle of its answer")


def _broken(data: bytes) -> SdfleetError:
    told = fault_of(500, data)
    try:
        status = json.loads(data)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return told
    return fault_of(status, data) if isinstance(status, int) and 400 <= status < 600 else told
