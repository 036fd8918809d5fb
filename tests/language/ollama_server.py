"""Ollama's protocol, thin, around a real llama.cpp server: the words are llama.cpp's, the envelope is Ollama's.

`/v1/...` is handed on, as Ollama answers it too. Which models are in memory, what they can do, pulling and deleting are
made up: no weights move.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sdfleet.api.http import listen
from tests.api.serving import PATIENCE_S

CAPABILITIES = {"writer:latest": ["completion", "tools"], "painter:latest": ["image"]}


class FakeOllama:
    """The routes, over one llama.cpp server. models: name -> what it can do."""

    def __init__(self, llama_url: str) -> None:
        self.models = dict(CAPABILITIES)
        self._client = httpx2.AsyncClient(base_url=llama_url, timeout=None, trust_env=False)
        self.app = Starlette(
            routes=[
                Route("/api/tags", self.tags),
                Route("/api/ps", self.ps),
                Route("/api/show", self.show, methods=["POST"]),
                Route("/api/chat", self.chat, methods=["POST"]),
                Route("/api/pull", self.pull, methods=["POST"]),
                Route("/api/delete", self.delete, methods=["DELETE"]),
                Route("/v1/{rest:path}", self.passed, methods=["POST"]),
            ],
            lifespan=self._life,
        )

    @contextlib.asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        async with self._client:
            yield

    async def tags(self, _: Request) -> Response:
        return JSONResponse({"models": [self._entry(name) for name in self.models]})

    async def ps(self, _: Request) -> Response:
        loaded = {**self._entry("writer:latest"), "expires_at": "2030-01-01T00:00:00Z", "size_vram": 0}
        return JSONResponse({"models": [loaded]})

    async def show(self, request: Request) -> Response:
        asked = await request.json()
        return JSONResponse({"capabilities": self.models[asked["model"]], "details": {}, "model_info": {}})

    async def chat(self, request: Request) -> Response:
        asked = await request.json()
        if asked["model"] not in self.models:
            return JSONResponse({"error": f"model '{asked['model']}' not found"}, status_code=404)
        return StreamingResponse(self._lines(asked), media_type="application/x-ndjson")

    async def pull(self, request: Request) -> Response:
        name = (await request.json())["model"]
        self.models[name] = ["completion"]
        lines = [{"status": "pulling manifest"}, {"status": "success"}]
        return Response(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    async def delete(self, request: Request) -> Response:
        name = (await request.json())["model"]
        if self.models.pop(name, None) is None:
            return JSONResponse({"error": f"model '{name}' not found"}, status_code=404)
        return Response()

    async def passed(self, request: Request) -> Response:
        body = await request.body()
        answer = await self._client.post(f"/v1/{request.path_params['rest']}", content=body)
        return Response(answer.content, status_code=answer.status_code, media_type=answer.headers["content-type"])

    async def _lines(self, asked: dict[str, Any]) -> AsyncIterator[bytes]:
        options = asked.get("options") or {}
        body = {"messages": asked["messages"], "stream": True, "max_tokens": options.get("num_predict", 8)}
        body |= {"grammar": options["grammar"]} if "grammar" in options else {}
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line[6:])["choices"]:
                    content = choice["delta"].get("content") or ""
                    said = {"model": asked["model"], "message": {"role": "assistant", "content": content}}
                    yield json.dumps({**said, "done": choice["finish_reason"] is not None}).encode() + b"\n"

    def _entry(self, name: str) -> dict[str, Any]:
        details = {"format": "gguf", "family": "llama", "families": None, "parameter_size": "0.1M"}
        return {"name": name, "model": name, "size": 1000, "digest": name, "details": details, "modified_at": "2026"}


@contextlib.contextmanager
def ollama_server(llama_url: str) -> Iterator[str]:
    """Its address."""
    config = uvicorn.Config(FakeOllama(llama_url).app, log_level="critical", lifespan="on", ws="none")
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(PATIENCE_S)
