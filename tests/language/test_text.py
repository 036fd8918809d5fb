"""A real llama.cpp server answers through one machine and through a router of two nodes, in both dialects."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import ollama
import openai
import pytest

from tests.api.serving import Running
from tests.language.conftest import Llamas
from tests.language.llama_server import LETTERS

ENDLESS = {"max_tokens": 10_000_000, "grammar": LETTERS}
HELLO: Any = [{"role": "user", "content": "hello"}]


def test_the_openai_client_streams_token_by_token_with_usage(openai_client: openai.OpenAI) -> None:
    client = openai_client
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=7, stream=True, stream_options={"include_usage": True},
        extra_body={"grammar": LETTERS, "top_k": 1},
    )  # fmt: skip
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) == 7
    assert "".join(texts).replace(" ", "").isalpha()  # the grammar reached llama.cpp, which is no field of OpenAI's
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


def test_the_openai_client_completes_embeds_and_lists(openai_client: openai.OpenAI) -> None:
    client = openai_client
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3).choices
    assert client.completions.create(model="tiny", prompt="a", max_tokens=3).choices[0].finish_reason == "length"
    vectors = client.embeddings.create(model="tiny-embed", input=["a fox", "the moon"]).data
    assert [len(one.embedding) for one in vectors] == [64, 64]
    assert {"tiny", "tiny-embed", "starter"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("tiny").id == "tiny"


def test_the_ollama_client_streams_an_openai_shaped_server(ollama_client: ollama.Client) -> None:
    client = ollama_client
    lines = list(client.chat("tiny", HELLO, stream=True, options={"num_predict": 5, "num_ctx": 1024}))
    assert [line.done for line in lines] == [*[False] * (len(lines) - 1), True]
    last = lines[-1]
    assert (last.eval_count, last.done_reason, last.message.content) == (5, "length", "")
    assert last.prompt_eval_count
    assert last.total_duration
    assert client.generate("tiny", "a fox", options={"num_predict": 4}).eval_count == 4
    assert client.generate("tiny", "a fox", raw=True, options={"num_predict": 4}).eval_count == 4


def test_the_ollama_client_embeds_and_lists_and_shows(ollama_client: ollama.Client) -> None:
    client = ollama_client
    assert [len(one) for one in client.embed("tiny-embed", ["a fox", "the moon"]).embeddings] == [64, 64]
    assert len(client.embeddings("tiny-embed", "a fox").embedding) == 64
    assert {"tiny", "tiny-embed", "starter"} <= {model.model for model in client.list().models}
    assert client.show("tiny").capabilities == ["completion"]
    assert client.show("tiny-embed").capabilities == ["embedding"]
    assert {"tiny", "tiny-embed"} <= {model.model for model in client.ps().models}


def test_a_json_schema_of_ollama_is_obeyed_by_llama_cpp(ollama_client: ollama.Client) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 100}
    answer = ollama_client.chat("tiny", HELLO, format=schema, options={"num_predict": 30})
    assert re.fullmatch(r"\[(true|false|[\s,])*[a-z]*", answer.message.content or "")


def test_pictures_still_go_to_the_model_that_draws(house: Running) -> None:
    asked = {"model": "starter", "prompt": "a fox", "steps": 2, "stream": False}
    assert "image" in httpx2.post(f"{house.url}/api/generate", json=asked).json()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "stream": True, **ENDLESS}),
        ("/api/chat", {"messages": HELLO, "stream": False, "options": {"num_predict": 10_000_000}}),
        ("/api/chat", {"messages": HELLO, "options": {"num_predict": 10_000_000}}),
    ],
    ids=["events", "whole", "lines"],
)
def test_llama_cpp_stops_when_the_caller_leaves(
    house: Running, llamas: Llamas, path: str, body: dict[str, Any]
) -> None:
    is_whole = body.get("stream") is False
    timeout = httpx2.Timeout(PATIENCE_S, read=0.5 if is_whole else PATIENCE_S)
    try:
        with httpx2.stream("POST", f"{house.url}{path}", json={"model": "tiny", **body}, timeout=timeout) as answer:
            lines = answer.iter_lines()
            for _ in range(4):
                next(lines)
    except httpx2.ReadTimeout:
        assert is_whole
    assert llamas.wait_until_idle()


PATIENCE_S = 60.0


def test_the_headers_say_who_answered(house: Running) -> None:
    asked = {"model": "tiny:latest", "messages": HELLO, "max_tokens": 2}
    headers = httpx2.post(f"{house.url}/v1/chat/completions", json=asked).headers
    node = ["n1", "n2"] if hasattr(house.app.state.opens, "names") else [headers["x-fleet-node"]]
    assert headers["x-fleet-node"] in node
    facts = {name: headers[f"x-fleet-{name}"] for name in ("model", "requested-model", "backend", "retries")}
    assert facts == {"model": "tiny", "requested-model": "tiny:latest", "backend": "openai", "retries": "0"}


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"])
def test_an_unknown_model_is_an_error_in_ollamas_shape(house: Running, path: str) -> None:
    answer = httpx2.post(f"{house.url}{path}", json={"model": "nope", "prompt": "x", "input": "x", "messages": HELLO})
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("model(s) 'nope' not found on any node")


def test_faults_are_the_openai_clients_own_classes(openai_client: openai.OpenAI) -> None:
    client = openai_client
    with pytest.raises(openai.NotFoundError, match=r"model\(s\) 'nope' not found on any node"):
        client.chat.completions.create(model="nope", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="must be"):
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"top_p": "x"})
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="tiny", input="x")


def test_what_an_openai_shaped_server_cannot_be_told_is_refused_or_named(
    house: Running, ollama_client: ollama.Client
) -> None:
    client = ollama_client
    with pytest.raises(ollama.ResponseError, match="template") as refused:
        client.generate("tiny", "a", template="{{ .Prompt }}")
    assert refused.value.status_code == 400
    asked = {"model": "tiny", "prompt": "a", "stream": False, "options": {"num_predict": 2, "num_ctx": 64}}
    told = httpx2.post(f"{house.url}/api/generate", json={**asked, "keep_alive": "5m"}).json()
    assert [text.split(":")[0] for text in told["warnings"]] == [
        "options that the server of this model cannot be told",
        "keep_alive was ignored",
    ]
