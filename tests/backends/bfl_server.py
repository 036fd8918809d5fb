"""A server that answers as Black Forest Labs' does, on a free port: every status, and every way to fail.

Its pictures are stripes whose colours are a digest of the request.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tests.backends.stand_in import ENDLESS, StandIn, two_colours

KEY = "bfl-test-key"
SIGNATURE = "good"


@dataclass(eq=False)
class BflServer(StandIn):
    """What it does next. Each list is used up from the left; an empty one means that all goes well.

    submits, polls, samples: a status code, or "lost" (the connection breaks under the answer).
    statuses: what `get_result` says before a picture is ready. tasks: what was ordered, by id. credits: None: plenty.
    polling_host: where callers are told to ask; its own where empty. signature: of the pictures' addresses.
    """

    submits: deque[int | str | JSONResponse] = field(default_factory=deque)
    polls: deque[int | str] = field(default_factory=deque)
    samples: deque[int | str] = field(default_factory=deque)
    statuses: deque[str] = field(default_factory=deque)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys_seen: list[tuple[str, str | None]] = field(default_factory=list)
    polling_url: str = ""
    sample_url: str = ""
    signatures: deque[str] = field(default_factory=deque)
    cost: float | None = 4.0
    says_progress: bool = True
    size: tuple[int, int] | None = None

    def _asked(self, what: str, request: Request) -> None:
        self.keys_seen.append((what, request.headers.get("x-key")))
        self.count(what)

    def app(self) -> FastAPI:
        """The service."""
        app = FastAPI(openapi_url=None)
        app.post("/v1/{name}")(self._submit)
        app.get("/v1/get_result")(self._result)
        app.get("/sample/{task}")(self._sample)
        return app

    async def _submit(self, name: str, request: Request) -> Response:
        self._asked("submit", request)
        body = await request.json()
        if request.headers.get("x-key") != KEY:
            return JSONResponse({"detail": "Not authenticated - Invalid Authentication"}, status_code=403)
        match self.submits.popleft() if self.submits else None:
            case JSONResponse() as answer:
                return answer
            case "lost":
                self._note(name, body)
                return _broken()
            case int() as status:
                return JSONResponse({"detail": f"scripted {status}"}, status_code=status)
        task = self._note(name, body)
        told: dict[str, Any] = {"id": task, "polling_url": self.polling_url or f"{self.url}/v1/get_result?id={task}"}
        return JSONResponse({**told, "cost": self.cost, "input_mp": 0.0, "output_mp": 1.0})

    def _note(self, name: str, body: dict[str, Any]) -> str:
        task = f"task-{len(self.tasks) + 1}"
        with self.changing():
            self.tasks[task] = {"model": name, **body}
        return task

    async def _result(self, id: str, request: Request) -> Response:  # noqa: A002 - their name
        self._asked("poll", request)
        match self.polls.popleft() if self.polls else None:
            case "lost":
                return _broken()
            case int() as status:
                return JSONResponse({"detail": f"scripted {status}"}, status_code=status)
        task = self.tasks.get(id)
        if task is None:
            return JSONResponse({"id": id, "status": "Task not found", "result": None}, status_code=404)
        progress = 0.01 if self.says_progress else None
        if task["prompt"] == ENDLESS:
            return JSONResponse({"id": id, "status": "Pending", "result": None, "progress": progress})
        if self.statuses:
            return JSONResponse({"id": id, "status": self.statuses.popleft(), "result": None, "progress": progress})
        signature = self.signatures.popleft() if self.signatures else SIGNATURE
        sample = self.sample_url or f"{self.url}/sample/{id}?sig={signature}"
        result = {"sample": sample, "prompt": task["prompt"], "seed": task["seed"], "start_time": time.time()}
        return JSONResponse({"id": id, "status": "Ready", "result": result, "progress": None})

    async def _sample(self, task: str, sig: str, request: Request) -> Response:
        self._asked("sample", request)
        match self.samples.popleft() if self.samples else None:
            case "lost":
                return _broken()
            case "words":
                return Response(b"this is no picture", media_type="image/png")
            case "redirect":
                return Response(status_code=302, headers={"Location": f"{self.url}/sample/{task}?sig={SIGNATURE}"})
            case int() as status:
                return Response(status_code=status)
        if sig != SIGNATURE:
            return Response(b"<Error><Code>AuthenticationFailed</Code></Error>", status_code=403)
        return Response(self._drawn(self.tasks[task]), media_type="image/png")

    def _drawn(self, task: dict[str, Any]) -> bytes:
        size = self.size or (task.get("width", 64), task.get("height", 48))
        told = {name: value for name, value in task.items() if name != "output_format"}
        digest = hashlib.sha256(repr(sorted(told.items())).encode()).digest()
        return two_colours(digest, size)


def _broken() -> Response:
    """An answer that ends before it should."""

    async def part() -> AsyncIterator[bytes]:
        yield b'{"id"'

    return StreamingResponse(part(), headers={"Content-Length": "1000"}, media_type="application/json")
