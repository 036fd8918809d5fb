"""Two image servers as they are often written, to measure ours against. They draw with diffusers' own pipeline.

    python benchmarks/baselines.py --server C --port 8101         # the built-in model
    python benchmarks/baselines.py --server B --port 8102 --model FOLDER

Server C calls the pipeline inside an `async def` endpoint: while a picture is drawn, the event loop answers nobody.
Server B lets one request in at a time and draws in a thread; each request gets its own pipeline (`from_pipe`) and its
own sampler, and n pictures are drawn one after another. On a CPU both draw in float32, on a card in bfloat16. What such
servers do besides and what only costs them time (moving the model to the card for each request) is left out; server C's
sliced attention and emptied cache, on a card, are not.

    POST /generate {"prompt", "seed", "steps", "guidance", "width", "height", "n"} -> {"images": [base64 PNG]}
    GET  /health
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel

from sdfleet import starter


class Request(BaseModel):
    """One request to either server."""

    prompt: str
    seed: int
    steps: int = 20
    guidance: float = 3.0
    width: int = 128
    height: int = 128
    n: int = 1


class Server(Protocol):
    """What stands behind POST /generate."""

    async def draw(self, request: Request) -> list[Any]:
        """n PIL pictures."""
        ...


def draw_one(pipe: Any, request: Request, *, seed: int) -> Any:
    """One picture by the pipeline, as its documentation says."""
    return pipe(
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


class ServerC:
    """Draws in the event loop."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._is_on_card = torch.cuda.is_available()
        if self._is_on_card:
            pipe.enable_attention_slicing()

    async def draw(self, request: Request) -> list[Any]:
        """Nothing is awaited in here, and that is the point."""
        drawn = [draw_one(self._pipe, request, seed=request.seed + i) for i in range(request.n)]
        if self._is_on_card:
            torch.cuda.empty_cache()
        return drawn


class ServerB:
    """One request at a time, in a thread, with a pipeline and a sampler of its own."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._one_at_a_time = asyncio.Semaphore(1)

    async def draw(self, request: Request) -> list[Any]:
        """Waits for its turn without blocking the loop."""
        async with self._one_at_a_time:
            return await asyncio.get_running_loop().run_in_executor(None, self._draw, request)

    def _draw(self, request: Request) -> list[Any]:
        # Without its format named, from_pipe would widen the shared weights to float32.
        pipe = type(self._pipe).from_pipe(self._pipe, torch_dtype=self._pipe.dtype)
        pipe.scheduler = type(self._pipe.scheduler).from_config(self._pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return [draw_one(pipe, request, seed=request.seed + i) for i in range(request.n)]


SERVERS: dict[str, type[ServerB | ServerC]] = {"B": ServerB, "C": ServerC}


def load_pipeline(folder: Path) -> Any:
    """diffusers' pipeline of a checkpoint, on the card if there is one."""
    import diffusers

    on_card = torch.cuda.is_available()
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16 if on_card else torch.float32)
    return pipe.to("cuda" if on_card else "cpu")


def app_of(server: Server) -> Any:
    """The FastAPI app of one of the two."""
    from fastapi import FastAPI

    app = FastAPI()

    async def generate(request: Request) -> dict[str, list[str]]:
        drawn = await server.draw(request)
        return {"images": [_png(image) for image in drawn]}

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.post("/generate")(generate)
    app.get("/health")(health)
    return app


def _png(image: Any) -> str:
    written = io.BytesIO()
    image.save(written, format="PNG")
    return base64.b64encode(written.getvalue()).decode()


def main() -> None:
    """Serve until a signal comes."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=sorted(SERVERS), required=True)
    parser.add_argument("--port", type=int, default=8101)
    parser.add_argument("--model", type=Path, default=starter.weights_path())
    arguments = parser.parse_args()
    server = SERVERS[arguments.server](load_pipeline(arguments.model))
    uvicorn.run(app_of(server), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
