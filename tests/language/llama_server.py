"""A real llama.cpp server in a process of its own: `python -m tests.language.llama_server FILE NAME [embedding]`.

It says on which port it listens, and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

# Only letters and spaces, so that every token shows at once; passed through to llama.cpp like any field of its own.
LETTERS = "root ::= [a-z ]+"
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaServer:
    """A server that answers for the model `name`."""

    url: str
    name: str
    process: subprocess.Popen[bytes]

    def n_busy(self) -> int:
        """Answers that it is working on."""
        slots = httpx2.get(f"{self.url}/slots", timeout=PATIENCE_S).json()
        return sum(bool(slot["is_processing"]) for slot in slots)

    def wait_until_idle(self) -> bool:
        """Whether it stopped working within seconds."""
        end_s = time.monotonic() + 10.0
        while self.n_busy():
            if time.monotonic() > end_s:
                return False
        return True

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def llama_server(file: Path, *, name: str = "tiny", is_embedding: bool = False) -> Iterator[LlamaServer]:
    """A server for a GGUF file, that answers already."""
    words = [sys.executable, "-m", "tests.language.llama_server", str(file), name, *["embedding"][:is_embedding]]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            url = next(line for line in process.stdout if line.startswith(b"listening "))
            yield LlamaServer(url=url.split()[1].decode(), name=name, process=process)
        finally:
            process.kill()


def main() -> None:
    """Serve until nobody holds the other end of standard input."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.model_alias = {sys.argv[2]}
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 4096, 8, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_slots = True
    # Random weights end their text at random; these go on for as long as they are asked to.
    params.ctx_shift = params.sampling.ignore_eos = True
    if sys.argv[3:]:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)
    sys.stdout.write(f"\nlistening {server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
