"""An Ollama: it has every door itself (its own, and OpenAI's under `/v1`), so that all is passed through untouched.

Its models that draw are left out here: those are pictures' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from sdfleet.errors import SdfleetError, UpstreamFailed, UpstreamRefused
from sdfleet.language.asking import Ask, LanguageModel
from sdfleet.language.events import events
from sdfleet.language.server import Server, fault_of

# Of a model whose Ollama does not say; versions before 0.6.4 do not.
_UNSAID = ("completion",)


class OllamaEngine:
    """See the file's first lines."""

    def __init__(self, server: Server) -> None:
        self.server = server
        # By name and digest: what a model can do never changes.
        self._capabilities: dict[tuple[str, str], tuple[str, ...]] = {}

    async def models(self) -> tuple[LanguageModel, ...]:
        told, running = await asyncio.gather(self.server.get("/api/tags"), self.server.get("/api/ps"))
        listed = _listed(told)
        warm = {one.get("name"): one for one in _listed(running)}
        found = []
        for one in listed:
            capabilities = await self._capabilities_of(one)
            if "image" not in capabilities:
                found.append(_model(one, capabilities, warm.get(one.get("name"))))
        return tuple(found)

    async def answer(self, model: LanguageModel, ask: Ask) -> AsyncGenerator[bytes]:
        if ask.door == "/api/transcribe":
            raise UpstreamRefused(
                f"{model.name} does not write down what is said", hint="see /api/tags for one that does"
            )
        if ask.door == "/api/delete":
            await self.server.delete(ask.door, {"model": model.name})
            yield b"{}"
            return
        body = {**ask.body, "model": model.name}
        if not ask.is_stream:
            yield await self.server.whole(ask.door, body, sound=ask.sound)
            return
        is_events = ask.door.startswith("/v1/")
        told = (
            events(self.server, ask.door, body, sound=ask.sound) if is_events else _lines(self.server, ask.door, body)
        )
        async with aclosing(told) as pieces:
            async for piece in pieces:
                yield piece

    async def close(self) -> None:
        await self.server.close()

    async def _capabilities_of(self, one: Mapping[str, Any]) -> tuple[str, ...]:
        key = (str(one.get("name")), str(one.get("digest")))
        if isinstance(one.get("capabilities"), list):
            return tuple(map(str, one["capabilities"]))
        if key not in self._capabilities:
            try:
                shown = await self.server.post("/api/show", {"model": key[0]})
            except SdfleetError:
                return _UNSAID  # asked again at the next look
            told = shown.get("capabilities") if isinstance(shown, dict) else None
            self._capabilities[key] = tuple(map(str, told)) if isinstance(told, list) and told else _UNSAID
        return self._capabilities[key]


async def _lines(server: Server, path: str, body: Mapping[str, object]) -> AsyncGenerator[bytes]:
    line, last = b"", b'"success"' if path == "/api/pull" else b'"done":true'
    async with aclosing(server.lines(path, body)) as lines:
        async for line in lines:
            if line.startswith(b'{"error"'):
                raise fault_of(500, line)
            yield line
    if last not in line.replace(b" ", b""):
        raise UpstreamFailed("the server of the model broke off in the middle of its answer")


def _listed(told: object) -> list[Mapping[str, Any]]:
    models = told.get("models") if isinstance(told, Mapping) else None
    if not isinstance(models, list):
        raise UpstreamFailed("the server of the models does not list them as Ollama does")
    return [one for one in models if isinstance(one, Mapping) and isinstance(one.get("name"), str)]


def _model(one: Mapping[str, Any], capabilities: tuple[str, ...], running: Mapping[str, Any] | None) -> LanguageModel:
    details = one.get("details")
    beside = running or {}
    return LanguageModel(
        name=str(one["name"]),
        engine="ollama",
        capabilities=capabilities,
        is_warm=running is not None,
        n_bytes=_whole(beside.get("size")) or _whole(one.get("size")),
        n_context=_whole(beside.get("context_length")),
        modified_at=str(one.get("modified_at") or ""),
        expires_at=str(beside.get("expires_at") or ""),
        digest=str(one.get("digest") or ""),
        details=details if isinstance(details, Mapping) else {},
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
