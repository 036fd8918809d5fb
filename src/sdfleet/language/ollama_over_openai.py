"""Ollama's routes on a server that has OpenAI's: bodies one way, lines the other.

    /api/chat         -> /v1/chat/completions
    /api/generate     -> /v1/chat/completions, for `raw` and `suffix` /v1/completions
    /api/embed(dings) -> /v1/embeddings
    /api/transcribe   -> /v1/audio/transcriptions

What such a server cannot be told and what changes the answer is refused (`template`, `context`); what cannot be told
and is a matter of memory or speed is named in `warnings` of the last line.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sdfleet.errors import InvalidValue, UnsupportedByModel, UpstreamFailed
from sdfleet.language.asking import Ask, LanguageModel
from sdfleet.language.events import events
from sdfleet.language.server import Server

_NS = 1_000_000_000
# Ollama's name of an option, and what it is called there. The last four are not OpenAI's; servers that run models
# themselves know them by these names.
_OPTIONS = {
    "temperature": "temperature", "top_p": "top_p", "seed": "seed", "stop": "stop",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
    "top_k": "top_k", "min_p": "min_p", "typical_p": "typical_p", "repeat_penalty": "repeat_penalty",
}  # fmt: skip
# Parsing this much JSON takes some milliseconds: embeddings of a whole book.
_INLINE_BYTES = 2**18


async def answer(server: Server, model: LanguageModel, ask: Ask) -> AsyncGenerator[bytes]:
    """The pieces of an answer in Ollama's shape. Raises as the server, and InvalidValue, UnsupportedByModel."""
    match ask.door:
        case "/api/embed" | "/api/embeddings":
            yield await _embedded(server, model, ask)
        case "/api/transcribe":
            yield await _transcribed(server, model, ask)
        case _:
            async with aclosing(_told(server, model, ask)) as pieces:
                async for piece in pieces:
                    yield piece


# -------------------------------------------------------------------------------------------------------------- text


@dataclass(slots=True)
class _Telling:
    """An answer in the making. key: where its text stands, `message` for a chat, `response` for a completion."""

    model: str
    is_chat: bool
    warnings: tuple[str, ...]
    began_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    reason: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    calls: dict[int, dict[str, str]] = field(default_factory=dict)

    def lines(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines for one event of the other shape."""
        self.usage = event.get("usage") or self.usage
        self.timings = event.get("timings") or self.timings
        for choice in (event.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            text = delta.get("content") or choice.get("text") or ""
            thinking = delta.get("reasoning_content") or delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or ():
                self._take_call(call)
            if text or thinking:
                if self.first_s is None:
                    self.first_s = time.monotonic()
                yield self.line(text, thinking=thinking)
            self.reason = choice.get("finish_reason") or self.reason
            if choice.get("finish_reason") and self.calls:
                calls, self.calls = self.calls, {}
                yield self.line("", calls=[_call(each) for each in calls.values()])

    def line(self, text: str, *, thinking: str = "", calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """One line that is not the last."""
        return {"model": self.model, "created_at": _now(), **self._said(text, thinking, calls), "done": False}

    def last(self) -> dict[str, Any]:
        """The last line: why it ended, and what it took."""
        now_s = time.monotonic()
        first_s = now_s if self.first_s is None else self.first_s
        prompt_ms, text_ms = self.timings.get("prompt_ms"), self.timings.get("predicted_ms")
        facts: dict[str, Any] = {
            "model": self.model,
            "created_at": _now(),
            **self._said("", "", None),
            "done": True,
            "done_reason": "length" if self.reason == "length" else "stop",
            "total_duration": round((now_s - self.began_s) * _NS),
            "load_duration": 0,
            "prompt_eval_count": int(self.usage.get("prompt_tokens") or 0),
            "prompt_eval_duration": round((first_s - self.began_s) * _NS if prompt_ms is None else prompt_ms * 1e6),
            "eval_count": int(self.usage.get("completion_tokens") or 0),
            "eval_duration": round((now_s - first_s) * _NS if text_ms is None else text_ms * 1e6),
        }
        return facts | {"warnings": list(self.warnings)} if self.warnings else facts

    def _said(self, text: str, thinking: str, calls: list[dict[str, Any]] | None) -> dict[str, Any]:
        more: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if self.is_chat:
            more |= {"tool_calls": calls} if calls else {}
            return {"message": {"role": "assistant", "content": text, **more}}
        return {"response": text, **more}

    def _take_call(self, call: Mapping[str, Any]) -> None:
        known = self.calls.setdefault(int(call.get("index") or 0), {"name": "", "arguments": ""})
        for name, value in (call.get("function") or {}).items():
            if name in known:
                known[name] += value if isinstance(value, str) else json.dumps(value)


async def _told(server: Server, model: LanguageModel, ask: Ask) -> AsyncGenerator[bytes]:
    is_chat = ask.door == "/api/chat"
    if _is_load_only(ask):
        facts = _Telling(model=ask.model, is_chat=is_chat, warnings=()).line("")
        yield json.dumps({**facts, "done": True, "done_reason": "load"}).encode()
        return
    path, body, warnings = _body(model, ask)
    telling = _Telling(model=ask.model, is_chat=is_chat, warnings=warnings)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    # Also where the whole is wanted: some llama.cpp servers notice that a caller has left only while they stream.
    lines = []
    async with aclosing(events(server, path, body)) as told:
        async for data in told:
            for line in telling.lines(_read(data)):
                if ask.is_stream:
                    yield json.dumps(line).encode()
                else:
                    lines.append(line)
    last = telling.last()
    yield json.dumps(last if ask.is_stream else _joined(lines, last)).encode()


def _joined(lines: list[dict[str, Any]], last: dict[str, Any]) -> dict[str, Any]:
    """All lines of an answer as the one that `stream: false` asks for."""
    for line in lines:
        into, said = (last["message"], line["message"]) if "message" in last else (last, line)
        for name in ("content", "response", "thinking"):
            if said.get(name):
                into[name] = into.get(name, "") + said[name]
        if said.get("tool_calls"):
            into["tool_calls"] = said["tool_calls"]
    return last


def _is_load_only(ask: Ask) -> bool:
    """An empty request wants the model in memory; these servers load it when it is needed."""
    if ask.door == "/api/chat":
        return not ask.body.get("messages")
    return not ask.body.get("prompt") and not ask.body.get("images")


def _body(model: LanguageModel, ask: Ask) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The path, the body and the warnings of a request for text. Raises InvalidValue, UnsupportedByModel."""
    asked = ask.body
    for name in ("template", "context"):
        if asked.get(name):
            raise UnsupportedByModel(f"{name} cannot be used with {model.name}", hint="its server has its own template")
    body, warnings = _options(asked)
    body["model"] = model.name
    if "logprobs" in asked:
        body["logprobs"] = asked["logprobs"]
    if "top_logprobs" in asked:
        body["top_logprobs"] = asked["top_logprobs"]
    if (kept := asked.get("format")) not in (None, ""):
        body["response_format"] = _format(kept)
    match asked.get("think"):
        case bool() as is_thinking:
            body["chat_template_kwargs"] = {"enable_thinking": is_thinking}
        case str() as effort if effort:
            body["reasoning_effort"] = effort
    if asked.get("keep_alive") is not None:
        warnings = (*warnings, "keep_alive was ignored: the server of this model decides how long it stays")
    if ask.door == "/api/chat":
        body["messages"] = _messages(asked.get("messages"))
        if asked.get("tools"):
            body["tools"] = asked["tools"]
        return "/v1/chat/completions", body, warnings
    if asked.get("raw") or asked.get("suffix"):
        body |= {"prompt": _text(asked, "prompt")} | ({"suffix": asked["suffix"]} if asked.get("suffix") else {})
        return "/v1/completions", body, warnings
    system = _text(asked, "system")
    said = {"role": "user", "content": _text(asked, "prompt"), "images": asked.get("images") or []}
    body["messages"] = _messages([*([{"role": "system", "content": system}] if system else []), said])
    return "/v1/chat/completions", body, warnings


def _options(asked: Mapping[str, object]) -> tuple[dict[str, Any], tuple[str, ...]]:
    options = asked.get("options") or {}
    if not isinstance(options, Mapping):
        raise InvalidValue("options", "it is no object")
    body, left = {}, []
    for name, value in options.items():
        if name in _OPTIONS:
            body[_OPTIONS[name]] = value
        elif name == "num_predict":
            if isinstance(value, int) and value >= 0:  # -1 and -2 stand for no limit
                body["max_tokens"] = value
        else:
            left.append(name)
    if not left:
        return body, ()
    return body, (f"options that the server of this model cannot be told: {', '.join(sorted(left))[:200]}",)


def _format(kept: object) -> dict[str, Any]:
    if kept == "json":
        return {"type": "json_object"}
    if isinstance(kept, Mapping):
        return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": dict(kept)}}
    raise InvalidValue("format", "it is neither 'json' nor a JSON schema")


def _messages(given: object) -> list[dict[str, Any]]:
    """Ollama's messages as OpenAI's: pictures become parts of the content, calls of tools get ids."""
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise InvalidValue("messages", "it is no list of objects", hint='send [{"role": "user", "content": "..."}]')
    found: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []
    for one in given:
        said: dict[str, Any] = {"role": one.get("role", "user"), "content": one.get("content") or ""}
        if one.get("images"):
            pictures = [{"type": "image_url", "image_url": {"url": _data_url(each)}} for each in one["images"]]
            said["content"] = [{"type": "text", "text": said["content"]}, *pictures]
        if one.get("thinking"):
            said["reasoning_content"] = one["thinking"]
        if one.get("tool_calls"):
            calls = [(f"call_{len(found)}_{i}", each.get("function") or {}) for i, each in enumerate(one["tool_calls"])]
            open_calls = [(name, str(call.get("name"))) for name, call in calls]
            said["tool_calls"] = [
                {
                    "id": name,
                    "type": "function",
                    "function": {"name": call.get("name"), "arguments": json.dumps(call.get("arguments") or {})},
                }
                for name, call in calls
            ]
        if said["role"] == "tool":
            tool = one.get("tool_name") or one.get("name")
            at = next((i for i, (_, name) in enumerate(open_calls) if tool in (None, name)), 0)
            said["tool_call_id"] = open_calls.pop(at)[0] if open_calls else "call_0_0"
        found.append(said)
    return found


def _data_url(picture: object) -> str:
    text = str(picture)
    if text.startswith("data:"):
        return text
    try:
        head = base64.b64decode(text[:16], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidValue("images", "it is not base64") from exc
    kind = "png" if head.startswith(b"\x89PNG") else "webp" if head.startswith(b"RIFF") else "jpeg"
    return f"data:image/{kind};base64,{text}"


def _call(call: Mapping[str, str]) -> dict[str, Any]:
    try:
        arguments = json.loads(call["arguments"] or "{}")
    except ValueError:
        arguments = {"": call["arguments"]}  # the model wrote no JSON: it is shown as it stands
    return {"function": {"name": call["name"], "arguments": arguments}}


# ---------------------------------------------------------------------------------------------- embeddings and speech


async def _embedded(server: Server, model: LanguageModel, ask: Ask) -> bytes:
    asked, began_s = ask.body, time.monotonic()
    given = asked.get("prompt" if ask.door == "/api/embeddings" else "input")
    if not isinstance(given, str) and not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        raise InvalidValue("input", "it is neither a text nor a list of texts")
    body: dict[str, Any] = {"model": model.name, "input": given, "encoding_format": "float"}
    if asked.get("dimensions"):
        body["dimensions"] = asked["dimensions"]
    if given in ("", []):
        return json.dumps({"embedding": []} if ask.door == "/api/embeddings" else _no_embeddings(ask)).encode()
    data = await server.whole("/v1/embeddings", body)

    def told() -> bytes:
        value = _read(data)
        found = sorted(value.get("data") or (), key=lambda one: int(one.get("index") or 0))
        vectors = [one.get("embedding") for one in found]
        if len(vectors) != (len(given) if isinstance(given, list) else 1):
            raise UpstreamFailed(f"the server of the model gave {len(vectors)} embeddings")
        if ask.door == "/api/embeddings":
            return json.dumps({"embedding": vectors[0]}).encode()
        facts = {
            "model": ask.model,
            "embeddings": vectors,
            "total_duration": round((time.monotonic() - began_s) * _NS),
            "load_duration": 0,
            "prompt_eval_count": int((value.get("usage") or {}).get("prompt_tokens") or 0),
        }
        return json.dumps(facts).encode()

    return told() if len(data) < _INLINE_BYTES else await asyncio.to_thread(told)


def _no_embeddings(ask: Ask) -> dict[str, Any]:
    return {"model": ask.model, "embeddings": [], "total_duration": 0, "load_duration": 0, "prompt_eval_count": 0}


async def _transcribed(server: Server, model: LanguageModel, ask: Ask) -> bytes:
    body = {**ask.body, "model": model.name, "response_format": "verbose_json"}
    value = _read(await server.whole("/v1/audio/transcriptions", body, sound=ask.sound))
    return json.dumps({"text": value.get("text") or "", "language": value.get("language") or ""}).encode()


def _read(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as exc:
        raise UpstreamFailed("the server of the model answered with what is no JSON") from exc
    if not isinstance(value, dict):
        raise UpstreamFailed("the server of the model answered with no JSON object")
    return value


def _text(asked: Mapping[str, object], name: str) -> str:
    value = asked.get(name) or ""
    if not isinstance(value, str):
        raise InvalidValue(name, "it is no text")
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
