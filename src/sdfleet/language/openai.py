"""A server with OpenAI's routes: llama.cpp, vLLM, LM Studio, mlx-lm. What it speaks itself is passed through untouched.

Which model is for what such servers hardly tell: llama.cpp and LM Studio say it in fields of their own, else the name
decides (`nomic-embed-text`, `whisper-large-v3`). It is a hint for lists: any request is passed to the model it names.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from sdfleet.errors import SdfleetError, UpstreamFailed
from sdfleet.language import ollama_over_openai
from sdfleet.language.asking import Ask, LanguageModel
from sdfleet.language.events import events
from sdfleet.language.server import Server

_EMBEDDING_NAMES = ("embed", "bge-", "e5-", "gte-", "minilm")
_SPEECH_NAMES = ("whisper", "-asr", "parakeet", "voxtral", "transcribe")
_LM_STUDIO_KINDS = {"embeddings": ("embedding",), "vlm": ("completion", "vision")}


class OpenAIEngine:
    """See the file's first lines."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._slots: int | None = None

    async def models(self) -> tuple[LanguageModel, ...]:
        told = await self._server.get("/v1/models")
        if not isinstance(told, dict) or not isinstance(told.get("data"), list):
            raise UpstreamFailed("the server of the models does not list them as OpenAI does")
        if self._slots is None:
            self._slots = await self._find_slots()
        beside = {one.get("name"): one for one in told.get("models") or () if isinstance(one, dict)}
        listed = [one for one in told["data"] if isinstance(one, dict) and isinstance(one.get("id"), str)]
        return tuple(_model(one, beside.get(one["id"]) or {}, slots=self._slots) for one in listed)

    async def answer(self, model: LanguageModel, ask: Ask) -> AsyncGenerator[bytes]:
        if not ask.door.startswith("/v1/"):
            async with aclosing(ollama_over_openai.answer(self._server, model, ask)) as translated:
                async for piece in translated:
                    yield piece
            return
        body = {**ask.body, "model": model.name}
        if not ask.is_stream:
            yield await self._server.whole(ask.door, body, sound=ask.sound)
            return
        # vLLM says who speaks before it has read the prompt. That is held back until there is a token: while nothing
        # has been said, another server can still take over.
        held: list[bytes] = []
        has_spoken = False
        async with aclosing(events(self._server, ask.door, body, sound=ask.sound)) as told:
            async for payload in told:
                has_spoken = has_spoken or not _says_nothing(payload)
                held.append(payload)
                while has_spoken and held:
                    yield held.pop(0)
        for payload in held:
            yield payload

    async def close(self) -> None:
        await self._server.close()

    async def _find_slots(self) -> int:
        """Answers at once, where it is a llama.cpp; others answer as many as they like."""
        try:
            told = await self._server.get("/props")
        except SdfleetError:
            return 0
        slots = told.get("total_slots") if isinstance(told, dict) else None
        return slots if isinstance(slots, int) and slots > 0 else 0


def _says_nothing(payload: bytes) -> bool:
    """Whether an event of a chat only names the speaker."""
    try:
        (choice,) = json.loads(payload)["choices"]
        delta = choice["delta"]
    except (ValueError, KeyError, TypeError):
        return False
    return choice.get("finish_reason") is None and not any(value for name, value in delta.items() if name != "role")


def _model(one: Mapping[str, Any], beside: Mapping[str, Any], *, slots: int) -> LanguageModel:
    name = one["id"]
    facts = one.get("meta") if isinstance(one.get("meta"), dict) else {}
    assert isinstance(facts, dict)
    status = one.get("status")
    value = status.get("value") if isinstance(status, dict) else one.get("state")
    created = one.get("created")
    details: dict[str, object] = {
        "parent_model": "",
        "format": "gguf" if facts else "",
        "family": "",
        "families": [],
        "parameter_size": _in_billions(facts.get("n_params")),
        "quantization_level": str(facts.get("ftype") or one.get("quantization") or ""),
    }
    return LanguageModel(
        name=name,
        engine="openai",
        capabilities=_capabilities(name, one, beside),
        # Servers of one model have it in memory as long as they run; those of several say which.
        is_warm=value in {None, "loaded"},
        n_bytes=_whole(facts.get("size")),
        slots=slots,
        n_context=_whole(facts.get("n_ctx") or one.get("max_model_len") or one.get("max_context_length")),
        modified_at=_when(created) if isinstance(created, int | float) else "",
        details=details,
    )


def _capabilities(name: str, one: Mapping[str, Any], beside: Mapping[str, Any]) -> tuple[str, ...]:
    small = name.lower()
    if any(part in small for part in _SPEECH_NAMES):
        return ("transcription",)
    if one.get("type") in _LM_STUDIO_KINDS:
        return _LM_STUDIO_KINDS[one["type"]]
    if any(part in small for part in _EMBEDDING_NAMES):
        return ("embedding",)
    told = beside.get("capabilities")
    is_seeing = isinstance(told, list) and "multimodal" in told
    return ("completion", "vision") if is_seeing else ("completion",)


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _in_billions(value: object) -> str:
    n = _whole(value)
    return "" if not n else f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


def _when(created: float) -> str:
    return datetime.fromtimestamp(max(0.0, created), UTC).isoformat().replace("+00:00", "Z")
