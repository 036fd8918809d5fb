"""A thin stand-in for an Ollama's protocol, as far as its image models go. Its pictures are two colours of a digest."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tests.backends.stand_in import ENDLESS, StandIn, two_colours

TEXT_MODEL = "llama3.2:latest"


@dataclass(eq=False)
class OllamaServer(StandIn):
    """models: name -> capabilities. tells_in_tags: newer ones say there what a model can. draws: older ones do.

    faults: what the next requests for pictures meet: a status, "lost" or "error" (in the stream), or "words" (text).
    """

    models: dict[str, list[str]] = field(
        default_factory=lambda: {"x/z-image-turbo:latest": ["image"], TEXT_MODEL: ["completion", "tools"]}
    )
    version: str = "0.32.5"
    tells_in_tags: bool = True
    draws: bool = True
    faults: deque[int | str] = field(default_factory=deque)
    root: str = "Ollama is running"
    drawn: list[dict[str, Any]] = field(default_factory=list)
    n_hung_up: int = 0

    def app(self) -> FastAPI:
        """The server."""
        app = FastAPI(openapi_url=None)
        app.get("/")(lambda: PlainTextResponse(self.root))
        app.get("/api/version")(lambda: {"version": self.version})
        app.get("/api/tags")(self._tags)
        app.post("/api/show")(self._show)
        app.post("/api/generate")(self._generate)
        return app

    def _tags(self) -> dict[str, Any]:
        self.count("tags")
        return {"models": [self._tag(name, told) for name, told in self.models.items()]}

    def _tag(self, name: str, told: list[str]) -> dict[str, Any]:
        entry = {"name": name, "model": name, "size": 1, "digest": hashlib.sha256(name.encode()).hexdigest()}
        return {**entry, "capabilities": told} if self.tells_in_tags else entry

    async def _show(self, request: Request) -> Response:
        self.count("show")
        asked = await request.json()
        return JSONResponse({"capabilities": self.models[asked["model"]], "details": {}})

    async def _generate(self, request: Request) -> Response:
        asked = await request.json()
        with self.changing():
            self.drawn.append(asked)
        if asked["model"] not in self.models:
            return JSONResponse({"error": f"model '{asked['model']}' not found"}, status_code=404)
        if not self.draws:
            return JSONResponse({"error": "image generation is not supported"}, status_code=400)
        fault = self.faults.popleft() if self.faults else None
        if isinstance(fault, int):
            return JSONResponse({"error": f"scripted {fault}"}, status_code=fault)
        return StreamingResponse(self._lines(asked, fault), media_type="application/x-ndjson")

    async def _lines(self, asked: dict[str, Any], fault: str | None) -> AsyncIterator[bytes]:
        base = {"model": asked["model"], "created_at": "2026-11-21T00:00:00Z", "response": "", "done": False}
        is_whole = False
        try:
            total = asked["steps"]
            for step in itertools.count(1) if asked["prompt"] == ENDLESS else range(1, total + 1):
                yield _line({**base, "completed": min(step, total), "total": total})
                await asyncio.sleep(0.001)
                if fault == "lost" and step == 2:
                    raise ConnectionResetError
                if fault == "error" and step == 2:
                    yield _line({"error": "the runner was killed"})
                    is_whole = True
                    return
            is_whole = True
            last = {**base, "done": True, "done_reason": "stop", "total_duration": 5, "load_duration": 2_000_000}
            yield _line(last if fault == "words" else {**last, "image": _picture(asked)})
        finally:
            if not is_whole:
                with self.changing():
                    self.n_hung_up += 1


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _picture(asked: dict[str, Any]) -> str:
    told = [asked[name] for name in ("model", "prompt", "steps")] + [asked["options"], asked.get("images")]
    digest = hashlib.sha256(repr(told).encode()).digest()
    return base64.b64encode(two_colours(digest, (asked["width"], asked["height"]))).decode()
