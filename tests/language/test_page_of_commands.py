"""The commands of Ollama Herd's page, word for word, against a router with two nodes: pictures, speech, embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from sdfleet.language.asking import Engine
from sdfleet.language.openai import OpenAIEngine
from sdfleet.language.server import Server
from sdfleet.language.whisper import WhisperEngine, WhisperOptions
from sdfleet.settings import engine_environment
from tests.api.serving import Running, running
from tests.api.test_herd import image_commands, import_as, run_command
from tests.fleet.houses import RouterInMemory
from tests.language import tiny_whisper
from tests.language.llama_server import llama_server


@pytest.fixture
def router(gguf: Path, tmp_path: Path) -> Iterator[Running]:
    """Models of the page's names: the first node draws, the second one draws, listens and embeds."""
    home, speech = tmp_path / "router", tmp_path / "speech"
    for node in ("n1", "n2"):
        for name in ("sd3-medium", "sd3.5-large"):
            import_as(home / f"home-of-{node}/models", name)
    tiny_whisper.write(speech / "qwen3-asr")
    listening = WhisperOptions(folder=speech, device="cpu", n_threads=1, env=engine_environment())
    with llama_server(gguf, name="nomic-embed-text", is_embedding=True) as embedding:

        def engines() -> list[Engine]:
            return [OpenAIEngine(Server(embedding.url)), WhisperEngine(listening)]

        with running(home, opens=RouterInMemory("n1", "n2", language={"n2": engines})) as here:
            while not {"nomic-embed-text", "qwen3-asr", "sd3-medium"} <= _models(here):
                pass
            yield here


def _models(here: Running) -> set[str]:
    return {one["id"] for one in httpx2.get(f"{here.url}/v1/models").json()["data"]}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_of_the_page_work_word_for_word_on_a_router(router: Running, tmp_path: Path) -> None:
    image_commands(router, tmp_path)
    (tmp_path / "recording.wav").write_bytes(tiny_whisper.recording())
    heard = run_command(
        'curl http://localhost:11435/api/transcribe -F "file=@recording.wav" -F "model=qwen3-asr"', tmp_path, router
    )
    assert set(json.loads(heard)) == {"text", "language"}
    embedded = run_command(
        """curl http://localhost:11435/api/embed -d '{"model":"nomic-embed-text","input":"some text"}'""",
        tmp_path, router,
    )  # fmt: skip
    (vector,) = json.loads(embedded)["embeddings"]
    assert len(vector) > 1
