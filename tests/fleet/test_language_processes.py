"""Text and speech with real processes: a router with its broker, two nodes, llama.cpp and faster-whisper."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import httpx2
import openai
import pytest

from tests.fleet.real_fleet import PATIENCE_S, RealFleet, real_fleet
from tests.language import tiny_llama, tiny_whisper
from tests.language.llama_server import LETTERS, LlamaServer, llama_server

pytestmark = pytest.mark.slow

ENDLESS = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 10**7}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LlamaServer]]:
    file = tiny_llama.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    with llama_server(file) as first, llama_server(file) as second:
        yield {"n1": first, "n2": second}


@pytest.fixture(scope="module")
def fleet(llamas: dict[str, LlamaServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    tiny_whisper.write(folder / "speech" / "tiny-whisper")
    with real_fleet(folder) as here:
        for name, llama in llamas.items():
            speech = folder / "speech" if name == "n2" else ""
            here.add_node(name, SD_BACKEND="fake", SD_LANGUAGE_URLS=llama.url, SD_SPEECH_MODELS=speech)
        here.wait_for_nodes()
        here.until(lambda: _n_holders(here) == 2, what="both nodes' models")
        yield here


def _n_holders(fleet: RealFleet) -> int:
    nodes = fleet.status()["nodes"]
    return sum("tiny" in node["ollama"]["models_available"] for node in nodes)


def test_tokens_stream_and_recordings_are_written_down(fleet: RealFleet) -> None:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=50, stream=True,
            extra_body={"grammar": LETTERS},
        )  # fmt: skip
        texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert sum(map(bool, texts)) == 50
        told = client.audio.transcriptions.create(model="tiny-whisper", file=("a.wav", tiny_whisper.recording()))
        assert isinstance(told.text, str)
    assert fleet.faults() == []


def test_who_leaves_stops_llama_cpp_behind_the_node(fleet: RealFleet, llamas: dict[str, LlamaServer]) -> None:
    with httpx2.stream("POST", f"{fleet.url}/v1/chat/completions", json=ENDLESS, timeout=PATIENCE_S) as answer:
        next(answer.iter_lines())
    assert all(llama.wait_until_idle() for llama in llamas.values())


def test_a_node_that_stands_still_is_passed_over_before_the_first_token(fleet: RealFleet) -> None:
    process = fleet.nodes["n1"].process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        nodes = set()
        for _ in range(4):
            asked = {**ENDLESS, "max_tokens": 3}
            answer = httpx2.post(f"{fleet.url}/v1/chat/completions", json=asked, timeout=PATIENCE_S)
            assert answer.text.endswith("data: [DONE]\n\n")
            nodes.add(answer.headers["x-fleet-node"])
        assert nodes == {"n2"}
    finally:
        os.kill(process.pid, signal.SIGCONT)


def test_a_node_that_is_killed_in_the_middle_ends_the_answer_with_an_error(fleet: RealFleet) -> None:
    with httpx2.stream("POST", f"{fleet.url}/v1/chat/completions", json=ENDLESS, timeout=PATIENCE_S) as answer:
        node = answer.headers["x-fleet-node"]
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        first = [next(lines) for _ in range(5)]
        fleet.nodes[node].kill()
        rest = list(lines)
    fleet.nodes[node].start()
    assert all("error" not in json.loads(line[6:]) for line in first)
    assert f"node {node} is silent" in json.loads(rest[-1][6:])["error"]["message"]
    assert rest[-1] != "data: [DONE]"
