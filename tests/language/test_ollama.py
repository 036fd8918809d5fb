"""An Ollama (its protocol, around a real llama.cpp) answers alone and at a node, with nothing of it changed."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import ollama
import openai
import pytest

from sdfleet.language.ollama import OllamaEngine
from sdfleet.language.server import Server
from tests.api.serving import Running, running
from tests.fleet.houses import RouterInMemory
from tests.language.conftest import Llamas
from tests.language.llama_server import LETTERS


@pytest.fixture(scope="module", params=["machine", "router"])
def house(
    request: pytest.FixtureRequest, llamas: Llamas, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("ollama")
    if request.param == "machine":
        opened = running(home, ollama_url=llamas.ollama_url)
    else:
        language = {"n2": lambda: [OllamaEngine(Server(llamas.ollama_url))]}
        opened = running(home, opens=RouterInMemory("n1", "n2", language=language))
    with opened as here:
        while "writer:latest" not in _names(here):
            pass
        yield here


def _names(here: Running) -> set[str]:
    return {one["name"] for one in httpx2.get(f"{here.url}/api/tags").json()["models"]}


def test_its_lines_are_passed_through_and_its_options_reach_it(ollama_client: ollama.Client) -> None:
    options = {"num_predict": 5, "grammar": LETTERS}
    lines = list(ollama_client.chat("writer", [{"role": "user", "content": "hello"}], stream=True, options=options))
    text = "".join(line.message.content or "" for line in lines)
    assert text.replace(" ", "").isalpha()
    assert lines[-1].done


def test_openais_routes_are_its_own_too(openai_client: openai.OpenAI) -> None:
    message = openai_client.chat.completions.create(
        model="writer", messages=[{"role": "user", "content": "hello"}], max_tokens=3
    )
    assert message.choices[0].finish_reason == "length"


def test_it_is_listed_with_what_it_can_and_what_draws_is_left_to_pictures(
    house: Running, ollama_client: ollama.Client
) -> None:
    assert ollama_client.show("writer").capabilities == ["completion", "tools"]
    assert "painter:latest" not in _names(house)
    assert "writer:latest" in {model.model for model in ollama_client.ps().models}


def test_a_model_is_pulled_after_a_yes_and_deleted(house: Running, llamas: Llamas) -> None:
    asked = {"model": "newcomer", "stream": False}
    refused = httpx2.post(f"{house.url}/api/pull", json=asked)
    assert refused.status_code == 409
    assert refused.json()["plan"]["source"] == "ollama"
    assert "newcomer" not in httpx2.get(f"{llamas.ollama_url}/api/tags").text
    other = httpx2.post(f"{house.url}/api/pull", json={"model": "another", "confirm": refused.json()["confirm"]})
    assert other.status_code == 409
    done = httpx2.post(f"{house.url}/api/pull", json={**asked, "stream": True, "confirm": refused.json()["confirm"]})
    assert done.text.splitlines()[-1] == '{"status": "success"}'
    while "newcomer" not in _names(house):
        pass
    assert httpx2.request("DELETE", f"{house.url}/api/delete", json={"model": "newcomer"}).status_code == 200
    assert "newcomer" not in httpx2.get(f"{llamas.ollama_url}/api/tags").text


def test_what_no_ollama_has_cannot_be_deleted(house: Running) -> None:
    answer = httpx2.request("DELETE", f"{house.url}/api/delete", json={"model": "nope"})
    # A router cannot know whether a model of pictures at one of its nodes is meant.
    assert answer.status_code == (404 if house.house.fleet is None else 400)
