"""What stand-ins for other people's servers share: they are scripted, count what they are asked, and tell who waits.

Their pictures are two colours of a digest.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TypeVar

import uvicorn
from fastapi import FastAPI
from PIL import Image

from sdfleet.api.http import listen

# A prompt whose picture is never done.
ENDLESS = "endless"


@dataclass(eq=False)
class StandIn:
    """n_asked: questions by kind. moved: told of each. url: where it answers while it is `serving`."""

    n_asked: Counter[str] = field(default_factory=Counter)
    moved: threading.Condition = field(default_factory=threading.Condition)
    url: str = ""

    def app(self) -> FastAPI:
        """The server."""
        raise NotImplementedError

    def renew(self) -> None:
        """Forget all that was asked, drawn and scripted."""
        fresh = type(self)(url=self.url)
        for one in fields(self):
            setattr(self, one.name, getattr(fresh, one.name))

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Return when this is so, looked at after every question. Blocks."""
        with self.moved:
            assert self.moved.wait_for(is_so, 30), "it did not become so"

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Whoever waits looks again after this block."""
        with self.moved:
            yield
            self.moved.notify_all()

    def count(self, what: str) -> None:
        """One more question of this kind."""
        with self.changing():
            self.n_asked[what] += 1


AnyStandIn = TypeVar("AnyStandIn", bound=StandIn)


@contextlib.contextmanager
def serving(server: AnyStandIn) -> Iterator[AnyStandIn]:
    """The server, answering at `server.url`, a free port, in a thread of its own."""
    config = uvicorn.Config(server.app(), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    uvicorn_server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as listening:
        server.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listening]}, name="another's service")
        thread.start()
        try:
            yield server
        finally:
            uvicorn_server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def two_colours(digest: bytes, size: tuple[int, int]) -> bytes:
    """A PNG: its left half of one colour, its right half of another."""
    image = Image.new("RGB", size, (digest[0], digest[1], digest[2]))
    image.paste((digest[3], digest[4], digest[5]), (0, 0, size[0] // 2, size[1]))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
