"""A real faster-whisper writes down what it hears, alone and at a node; its words are noise, its weights are random."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from sdfleet.errors import UpstreamFailed
from sdfleet.language.asking import Ask, LanguageModel, Sound
from sdfleet.language.openai import OpenAIEngine
from sdfleet.language.server import Server
from sdfleet.language.shelf import Shelf
from sdfleet.language.whisper import WhisperEngine, WhisperOptions
from sdfleet.settings import engine_environment
from tests.api.serving import Running
from tests.language.tiny_whisper import recording

SOUND = Sound(name="a.wav", kind="audio/wav", data=recording())


def test_herds_command_works_as_it_stands(house: Running) -> None:
    """curl .../api/transcribe -F "file=@recording.wav" -F "model=..."."""
    files, data = {"file": ("recording.wav", SOUND.data, "audio/wav")}, {"model": "tiny-whisper"}
    answer = httpx2.post(f"{house.url}/api/transcribe", files=files, data=data, timeout=60)
    assert answer.status_code == 200
    assert set(answer.json()) == {"text", "language"}
    assert answer.json()["language"] in {"en", "de", "zh"}
    assert answer.headers["x-fleet-model"] == "tiny-whisper"


def test_the_openai_client_is_given_every_format(openai_client: openai.OpenAI) -> None:
    create = openai_client.audio.transcriptions.create
    file = ("a.wav", SOUND.data)
    told = create(model="tiny-whisper", file=file, response_format="verbose_json", language="en")
    assert (told.language, told.duration) == ("en", 2.0)
    assert "-->" in create(model="tiny-whisper", file=file, response_format="srt", language="en")
    assert str(create(model="tiny-whisper", file=file, response_format="vtt", language="en")).startswith("WEBVTT")
    assert isinstance(create(model="tiny-whisper", file=file, language="en").text, str)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        create(model="tiny-whisper", file=file, response_format="odt")  # type: ignore[call-overload]


def test_the_openai_client_hears_segments_as_they_come(openai_client: openai.OpenAI) -> None:
    file = ("a.wav", recording(35))
    events = list(
        openai_client.audio.transcriptions.create(model="tiny-whisper", file=file, language="en", stream=True)
    )
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert events[-1].type == "transcript.text.done"


@pytest.mark.parametrize(
    ("files", "model", "status", "said"),
    [
        ({"file": b"no sound at all"}, "tiny-whisper", 400, "cannot be read"),
        ({"other": b"x"}, "tiny-whisper", 400, "file"),
        ({"file": b""}, "tiny-whisper", 400, "file"),
        ({"audio": SOUND.data}, "nope", 404, "model(s) 'nope' not found on any node"),
        ({"audio": SOUND.data}, "", 400, "model"),
    ],
    ids=["broken", "missing", "empty", "unknown model", "no model"],
)
def test_what_cannot_be_heard_is_refused_in_words(
    house: Running, files: dict[str, bytes], model: str, status: int, said: str
) -> None:
    sent = {name: (f"{name}.wav", data) for name, data in files.items()}
    answer = httpx2.post(f"{house.url}/api/transcribe", files=sent, data={"model": model}, timeout=60)
    assert answer.status_code == status
    assert said in answer.json()["error"]


def test_a_recording_beyond_the_limit_of_bodies_is_refused(house: Running) -> None:
    connection = http.client.HTTPConnection(house.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/audio/transcriptions")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(house.house.settings.max_body + 1))
    connection.endheaders()
    with contextlib.closing(connection):
        assert connection.getresponse().status == 413


def test_a_killed_process_fails_its_recording_and_the_next_has_a_new_one(whispers: Path) -> None:
    async def main() -> None:
        engine = WhisperEngine(WhisperOptions(folder=whispers, device="cpu", n_threads=1, env=engine_environment()))
        try:
            (model,) = await engine.models()
            assert not model.is_warm
            assert set(await _heard(engine, model)) == {"text", "language"}
            assert (await engine.models())[0].is_warm
            assert engine._process is not None
            os.kill(engine._process.pid, signal.SIGKILL)
            with pytest.raises(UpstreamFailed, match="has ended"):
                await _heard(engine, model)
            assert set(await _heard(engine, model)) == {"text", "language"}
        finally:
            await engine.close()

    asyncio.run(main())


def test_who_leaves_a_long_recording_frees_the_process_for_the_next(whispers: Path) -> None:
    async def main() -> None:
        engine = WhisperEngine(WhisperOptions(folder=whispers, device="cpu", n_threads=1, env=engine_environment()))
        try:
            (model,) = await engine.models()
            sound = Sound(name="a.wav", kind="audio/wav", data=recording(300))
            body = {"stream": "true", "language": "en"}
            long = engine.answer(model, Ask(door="/v1/audio/transcriptions", model="x", body=body, sound=sound))
            assert await anext(long)
            assert engine._process is not None
            pid = engine._process.pid
            await long.aclose()
            assert set(await _heard(engine, model)) == {"text", "language"}
            assert engine._process.pid == pid
        finally:
            await engine.close()
            assert not psutil.pid_exists(pid)

    asyncio.run(main())


def test_an_idle_model_leaves_the_memory(whispers: Path) -> None:
    async def main() -> None:
        options = WhisperOptions(folder=whispers, device="cpu", n_threads=1, keep_alive_s=0.0, env=engine_environment())
        engine = WhisperEngine(options)
        try:
            (model,) = await engine.models()
            await _heard(engine, model)
            await asyncio.sleep(0)
            assert not (await engine.models())[0].is_warm
        finally:
            await engine.close()

    asyncio.run(main())


def test_another_servers_speech_is_passed_through_in_both_shapes(machine: Running) -> None:
    """An OpenAI-shaped server with speech: one of ours."""

    async def main() -> None:
        async with Shelf([OpenAIEngine(Server(machine.url))]) as shelf:
            await shelf.look()
            for door in ("/api/transcribe", "/v1/audio/transcriptions"):
                body = {"model": "tiny-whisper", "language": "en"}
                async with shelf.ask(Ask(door=door, model="tiny-whisper", body=body, sound=SOUND)) as answer:
                    told = json.loads(b"".join([piece async for piece in answer.pieces]))
                assert set(told) == ({"text", "language"} if door.startswith("/api") else {"text"})

    asyncio.run(main())


async def _heard(engine: WhisperEngine, model: LanguageModel) -> dict[str, str]:
    ask = Ask(door="/api/transcribe", model=model.name, body={}, sound=SOUND)
    pieces = [piece async for piece in engine.answer(model, ask)]
    told: dict[str, str] = json.loads(b"".join(pieces))
    return told
