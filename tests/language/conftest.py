"""Real llama.cpp servers, and our server in front of them: alone on one machine, and as a router of two nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import ollama
import openai
import pytest

from sdfleet.language.asking import Engine
from sdfleet.language.openai import OpenAIEngine
from sdfleet.language.server import Server
from sdfleet.language.whisper import WhisperEngine, WhisperOptions
from sdfleet.settings import engine_environment
from tests.api.serving import Running, running
from tests.fleet.houses import RouterInMemory
from tests.language import tiny_llama, tiny_whisper
from tests.language.llama_server import LlamaServer, llama_server
from tests.language.ollama_server import ollama_server


@dataclass(frozen=True, slots=True, kw_only=True)
class Llamas:
    """Servers of llama.cpp: two that write, one that embeds; and one that writes behind Ollama's protocol."""

    first: LlamaServer
    second: LlamaServer
    embedding: LlamaServer
    ollama_url: str

    def engines(self, *urls: str) -> list[Engine]:
        """Engines for these of them."""
        return [OpenAIEngine(Server(url)) for url in urls]

    def wait_until_idle(self) -> bool:
        """Whether those that write stopped working within seconds."""
        return self.first.wait_until_idle() and self.second.wait_until_idle()


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def llamas(gguf: Path) -> Iterator[Llamas]:
    with (
        llama_server(gguf) as first,
        llama_server(gguf) as second,
        llama_server(gguf, name="tiny-embed", is_embedding=True) as embedding,
        ollama_server(first.url) as ollama_url,
    ):
        yield Llamas(first=first, second=second, embedding=embedding, ollama_url=ollama_url)


@pytest.fixture(scope="session")
def whispers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of speech models, with one."""
    folder = tmp_path_factory.mktemp("speech")
    tiny_whisper.write(folder / "tiny-whisper")
    return folder


@pytest.fixture(scope="session")
def machine(llamas: Llamas, whispers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One machine, with one server that writes, one that embeds, and speech."""
    urls = f"{llamas.first.url}/v1, {llamas.embedding.url}"
    home = tmp_path_factory.mktemp("machine")
    with running(home, language_urls=urls, speech_models=whispers, device="cpu", threads=1) as here:
        _wait_for_models(here)
        yield here


@pytest.fixture(scope="session")
def router(llamas: Llamas, whispers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A router: both nodes write, the second one embeds and listens too."""
    speech = WhisperOptions(folder=whispers, device="cpu", n_threads=1, env=engine_environment())
    language = {
        "n1": lambda: llamas.engines(llamas.first.url),
        "n2": lambda: [*llamas.engines(llamas.second.url, llamas.embedding.url), WhisperEngine(speech)],
    }
    opens = RouterInMemory("n1", "n2", language=language)
    with running(tmp_path_factory.mktemp("router"), opens=opens) as here:
        _wait_for_models(here)
        yield here


@pytest.fixture(params=["machine", "router"])
def house(request: pytest.FixtureRequest) -> Running:
    """What one machine answers a router answers."""
    here: Running = request.getfixturevalue(request.param)
    return here


@pytest.fixture
def openai_client(house: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ollama_client(house: Running) -> Iterator[ollama.Client]:
    client = ollama.Client(house.url)
    yield client
    client._client.close()


def _wait_for_models(here: Running) -> None:
    while not {"tiny", "tiny-embed", "tiny-whisper"} <= {
        one["id"] for one in httpx2.get(f"{here.url}/v1/models").json()["data"]
    }:
        pass
