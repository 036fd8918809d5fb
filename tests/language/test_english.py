"""Recordings in any language become English text: a real faster-whisper, alone and at a node, with OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.audio import TranslationVerbose

from sdfleet.errors import ModelNotFound, UnsupportedByModel
from sdfleet.language.asking import Ask, Door, Engine, LanguageModel, Sound
from sdfleet.language.ollama import OllamaEngine
from sdfleet.language.openai import OpenAIEngine
from sdfleet.language.server import Server
from sdfleet.language.shelf import Shelf
from sdfleet.language.whisper import WhisperEngine, WhisperOptions
from sdfleet.settings import engine_environment
from tests.api.serving import Running
from tests.language import tiny_whisper
from tests.language.conftest import Llamas
from tests.language.fixed_answers import answering
from tests.language.numbers import grown, told
from tests.language.tiny_whisper import recording

SOUND = Sound(name="a.wav", kind="audio/wav", data=recording())
FILE = ("a.wav", SOUND.data)
DOOR: Door = "/v1/audio/translations"


# The method is marked as to be retired at OpenAI.
@pytest.fixture
def create(openai_client: openai.OpenAI) -> Callable[..., Any]:
    def translate(**more: Any) -> Any:
        with pytest.warns(DeprecationWarning, match="deprecated"):
            return openai_client.audio.translations.create(model="tiny-whisper", file=FILE, **more)

    return translate


def test_the_openai_client_is_given_every_format(create: Callable[..., Any]) -> None:
    verbose = create(response_format="verbose_json", prompt="about foxes", temperature=0)
    assert isinstance(verbose, TranslationVerbose)
    assert (verbose.language, verbose.duration) == ("english", 2.0)
    assert verbose.model_extra == {"task": "translate"}
    assert verbose.segments
    assert "-->" in create(response_format="srt")
    assert create(response_format="vtt").startswith("WEBVTT")
    text = create(response_format="text")
    assert isinstance(text, str)
    assert isinstance(create().text, str)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        create(response_format="odt")


def test_the_model_is_asked_to_translate_and_not_to_write_down(house: Running) -> None:
    """Its weights are noise; without chance it is the same each time, and the task is a token before it."""

    def said(path: str) -> str:
        data = {"model": "tiny-whisper", "language": "de", "temperature": "0.0"}
        answer = httpx2.post(f"{house.url}{path}", files={"file": FILE}, data=data, timeout=60)
        return str(answer.json()["text"])

    english = said(DOOR)
    assert english == said(DOOR)
    assert english != said("/v1/audio/transcriptions")


def test_a_translation_is_counted_as_one(house: Running, create: Callable[..., Any]) -> None:
    before = told(house)
    create()
    about = {"kind": "translation", "model": "tiny-whisper", "outcome": "done"}
    assert grown(house, before, "sdfleet_answers_total", **about) == 1


def test_segments_come_as_events_where_they_are_asked_for(house: Running) -> None:
    data = {"model": "tiny-whisper", "stream": "true"}
    with httpx2.stream("POST", f"{house.url}{DOOR}", files={"file": FILE}, data=data, timeout=60) as answer:
        events = [json.loads(line[6:])["type"] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events == [*["transcript.text.delta"] * (len(events) - 1), "transcript.text.done"]


def test_an_unknown_model_is_the_openai_clients_own_class(openai_client: openai.OpenAI) -> None:
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(openai.NotFoundError, match=r"'nope' not found on any node"),
    ):
        openai_client.audio.translations.create(model="nope", file=FILE)


def test_a_recording_must_come_with_it(house: Running) -> None:
    answer = httpx2.post(f"{house.url}{DOOR}", data={"model": "tiny-whisper"}, files={"other": FILE}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


def test_a_model_of_english_alone_says_so_and_still_writes_down(tmp_path: Path) -> None:
    folder = tiny_whisper.write(tmp_path / "tiny.en", is_english_only=True)
    options = WhisperOptions(folder=folder, device="cpu", n_threads=1, env=engine_environment())

    async def main(engine: WhisperEngine) -> None:
        try:
            (model,) = await engine.models()
            with pytest.raises(UnsupportedByModel, match="knows English only") as refused:
                await _whole(engine, model, DOOR)
            assert r".en" in refused.value.hint
            assert set(await _whole(engine, model, "/v1/audio/transcriptions")) == {"text"}
        finally:
            await engine.close()

    asyncio.run(main(WhisperEngine(options)))


# ------------------------------------------------------------------------------------------ servers that have it or not


def test_another_servers_translation_is_passed_through(machine: Running) -> None:
    """An OpenAI-shaped server with speech: one of ours."""

    async def main() -> None:
        async with Shelf([OpenAIEngine(Server(machine.url))]) as shelf:
            await shelf.look()
            body = {"response_format": "verbose_json", "prompt": "foxes"}
            async with shelf.ask(Ask(door=DOOR, model="tiny-whisper", body=body, sound=SOUND)) as answer:
                said = json.loads(b"".join([piece async for piece in answer.pieces]))
            assert (said["task"], said["language"]) == ("translate", "english")

    asyncio.run(main())


def test_a_real_llama_cpp_has_no_such_route_and_the_caller_is_told_which(house: Running) -> None:
    answer = httpx2.post(f"{house.url}{DOOR}", data={"model": "tiny"}, files={"file": FILE}, timeout=60)
    assert answer.status_code == 404
    assert f"the server of tiny does not answer {DOOR}" in answer.json()["error"]["message"]


def test_an_ollama_without_the_route_is_told_as_that(llamas: Llamas) -> None:
    async def main() -> None:
        engine = OllamaEngine(Server(llamas.ollama_url))
        try:
            model = next(one for one in await engine.models() if one.name == "writer:latest")
            with pytest.raises(ModelNotFound, match=f"writer:latest does not answer {DOOR}"):
                await _whole(engine, model, DOOR)
        finally:
            await engine.close()

    asyncio.run(main())


def test_a_server_that_says_so_with_status_200_is_understood_too() -> None:
    """As LM Studio does."""
    model = LanguageModel(name="m", engine="openai", capabilities=())

    async def main(url: str) -> None:
        engine = OpenAIEngine(Server(url))
        try:
            with pytest.raises(ModelNotFound, match=f"m does not answer {DOOR} for it: Unexpected endpoint"):
                await _whole(engine, model, DOOR)
        finally:
            await engine.close()

    with answering(200, {"error": f"Unexpected endpoint or method. (POST {DOOR})"}) as url:
        asyncio.run(main(url))


def test_where_one_server_has_no_route_the_next_is_asked(llamas: Llamas, machine: Running) -> None:
    """Two servers say that they have the model; only the second one can translate."""

    class Claims(OpenAIEngine):
        async def models(self) -> tuple[LanguageModel, ...]:
            return (LanguageModel(name="tiny-whisper", engine="openai", capabilities=("transcription",), is_warm=True),)

    async def main() -> None:
        engines = [Claims(Server(llamas.first.url)), OpenAIEngine(Server(machine.url))]
        async with Shelf(engines) as shelf:
            await shelf.look()
            async with shelf.ask(Ask(door=DOOR, model="tiny-whisper", body={}, sound=SOUND)) as answer:
                assert answer.n_retries == 1
                assert set(json.loads(b"".join([piece async for piece in answer.pieces]))) == {"text"}

    asyncio.run(main())


async def _whole(engine: Engine, model: LanguageModel, door: Door) -> dict[str, Any]:
    ask = Ask(door=door, model=model.name, body={}, sound=SOUND)
    said: dict[str, Any] = json.loads(b"".join([piece async for piece in engine.answer(model, ask)]))
    return said
