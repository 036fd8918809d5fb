"""Ollama's requests as OpenAI's and the answers back, against answers as other programs write them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import pytest

from sdfleet.errors import InvalidValue, NotReady, SdfleetError, UpstreamFailed
from sdfleet.language.asking import Ask, Door, LanguageModel, Sound
from sdfleet.language.events import events
from sdfleet.language.openai import OpenAIEngine
from sdfleet.language.server import Server

MODEL = LanguageModel(name="m", engine="openai", capabilities=("completion",))
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n0123456789").decode()


class Recorded(Server):
    """A server whose answer was written down. asked: the path and the body that it was sent."""

    def __init__(self, *lines: bytes) -> None:
        super().__init__("http://recorded")
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self._lines = lines

    async def whole(self, path: str, body: Mapping[str, object], *, sound: Sound | None = None) -> bytes:
        self.asked.append((path, body))
        return self._lines[0]

    async def lines(
        self, path: str, body: Mapping[str, object], *, sound: Sound | None = None
    ) -> AsyncGenerator[bytes]:
        self.asked.append((path, body))
        for line in self._lines:
            yield line


def event(delta: Mapping[str, object], finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode()


DONE = b"data: [DONE]"


def told(server: Server, door: Door, body: Mapping[str, object]) -> list[dict[str, Any]]:
    async def main() -> list[bytes]:
        ask = Ask(door=door, model="m:latest", body={"model": "m:latest", **body})
        return [piece async for piece in OpenAIEngine(server).answer(MODEL, ask)]

    return [json.loads(piece) for piece in asyncio.run(main())]


def test_a_call_of_a_tool_comes_in_pieces_and_is_told_whole() -> None:
    def call(**function: str) -> dict[str, object]:
        return {"tool_calls": [{"index": 0, "id": "x", "function": function}]}

    server = Recorded(
        event(call(name="weather", arguments="")), event(call(arguments='{"city": ')), event(call(arguments='"Oslo"}')),
        event({}, "tool_calls"), DONE,
    )  # fmt: skip
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    lines = told(server, "/api/chat", {"messages": [{"role": "user", "content": "x"}], "tools": tools})
    assert lines[0]["message"]["tool_calls"] == [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
    assert [line["done"] for line in lines] == [False, True]
    assert server.asked[0][1]["tools"] == tools


def test_the_answer_of_a_tool_finds_its_call() -> None:
    calls = [{"function": {"name": name, "arguments": {"at": 1}}} for name in ("time", "weather")]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_name": "weather", "content": "rain"},
        {"role": "tool", "tool_name": "time", "content": "noon"},
    ]
    server = Recorded(event({"content": "a"}, "stop"), DONE)
    told(server, "/api/chat", {"messages": messages})
    sent = server.asked[0][1]["messages"]
    ids = {call["function"]["name"]: call["id"] for call in sent[1]["tool_calls"]}
    assert [message["tool_call_id"] for message in sent[2:]] == [ids["weather"], ids["time"]]
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"at": 1}


def test_pictures_of_a_message_become_parts_of_it() -> None:
    server = Recorded(event({"content": "a"}, "stop"), DONE)
    told(server, "/api/generate", {"prompt": "what is it?", "images": [PNG], "system": "be short"})
    system, user = server.asked[0][1]["messages"]
    assert (system["role"], system["content"]) == ("system", "be short")
    assert user["content"] == [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_told_apart_from_words(name: str) -> None:
    server = Recorded(event({name: "hm"}), event({"content": "yes"}, "stop"), DONE)
    lines = told(server, "/api/chat", {"messages": [{"role": "user", "content": "x"}], "think": True})
    assert [(one["message"].get("thinking"), one["message"]["content"]) for one in lines] == [
        ("hm", ""), (None, "yes"), (None, ""),
    ]  # fmt: skip
    assert server.asked[0][1]["chat_template_kwargs"] == {"enable_thinking": True}


def test_without_stream_the_lines_are_one() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    server = Recorded(event({"content": "a "}), event({"content": "fox"}, "length"), event({}, usage=usage), DONE)
    (line,) = told(server, "/api/generate", {"prompt": "x", "stream": False})
    assert (line["response"], line["done"], line["done_reason"]) == ("a fox", True, "length")
    assert (line["prompt_eval_count"], line["eval_count"]) == (3, 2)
    assert line["model"] == "m:latest"


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"format": "json"}, {"response_format": {"type": "json_object"}}),
        ({"options": {"num_predict": 5, "top_k": 1, "stop": ["."]}}, {"max_tokens": 5, "top_k": 1, "stop": ["."]}),
        ({"options": {"num_predict": -1}}, {}),
        ({"think": "low"}, {"reasoning_effort": "low"}),
    ],
    ids=["json", "options", "no limit", "effort"],
)
def test_what_is_asked_for_is_sent_on(asked: Mapping[str, object], sent: Mapping[str, object]) -> None:
    server = Recorded(event({"content": "a"}, "stop"), DONE)
    told(server, "/api/generate", {"prompt": "x", **asked})
    path, body = server.asked[0]
    beside = {"model", "messages", "stream", "stream_options"}
    assert path == "/v1/chat/completions"
    assert {name: value for name, value in body.items() if name not in beside} == sent


def test_an_openai_request_is_sent_on_untouched_but_for_the_models_name() -> None:
    body = {"messages": [{"role": "user", "content": "é"}], "grammar": "x", "n": 2, "unheard_of": {"a": [1]}}
    server = Recorded(b'{"choices": []}')
    told(server, "/v1/chat/completions", body)
    assert server.asked == [("/v1/chat/completions", {**body, "model": "m"})]


@pytest.mark.parametrize("given", [3, None, ["a", 1]])
def test_an_input_that_is_no_text_is_refused(given: object) -> None:
    with pytest.raises(InvalidValue, match="input"):
        told(Recorded(b"{}"), "/api/embed", {"input": given})


def test_a_speaker_without_a_word_is_held_back_until_there_is_one() -> None:
    """Otherwise nobody could take over while the first server reads the prompt."""

    async def main() -> int:
        server = Recorded(event({"role": "assistant", "content": ""}), b": reading", event({"content": "a"}), DONE)
        ask = Ask(door="/v1/chat/completions", model="m", body={"stream": True})
        pieces = OpenAIEngine(server).answer(MODEL, ask)
        first = await anext(pieces)
        await pieces.aclose()
        assert b'"role"' in first
        broken = Recorded(event({"role": "assistant", "content": ""}), b'data: {"error": {"message": "no memory"}}')
        with pytest.raises(UpstreamFailed, match="no memory"):
            await anext(OpenAIEngine(broken).answer(MODEL, ask))
        return 1

    assert asyncio.run(main())


@pytest.mark.parametrize(
    ("lines", "kind", "said"),
    [
        ([event({"content": "a"})], UpstreamFailed, "broke off"),
        ([b'data: {"error": {"code": 503, "message": "loading"}}'], NotReady, "loading"),
        ([b'error: {"code": 500, "message": "a fault"}'], UpstreamFailed, "a fault"),
    ],
    ids=["no end", "in an event", "in a line of its own"],
)
def test_a_stream_that_is_not_whole_is_a_fault(lines: Sequence[bytes], kind: type[SdfleetError], said: str) -> None:
    async def main() -> None:
        async for _ in events(Recorded(*lines), "/v1/chat/completions", {}):
            pass

    with pytest.raises(kind, match=said):
        asyncio.run(main())
