"""The engines of this machine that write, embed and listen, as the settings name them."""

from __future__ import annotations

from sdfleet.language.asking import Engine
from sdfleet.language.ollama import OllamaEngine
from sdfleet.language.openai import OpenAIEngine
from sdfleet.language.server import Server
from sdfleet.language.shelf import Shelf
from sdfleet.language.whisper import WhisperEngine, WhisperOptions
from sdfleet.settings import Settings, engine_environment


def shelf_of(settings: Settings) -> Shelf:
    """Every engine that is set up; none is asked for anything before the shelf is opened."""
    engines: list[Engine] = []
    if settings.ollama_url is not None:
        engines.append(OllamaEngine(Server(settings.ollama_url)))
    key = None if settings.language_key is None else settings.language_key.get_secret_value()
    engines += [OpenAIEngine(Server(url, key=key)) for url in settings.language_urls]
    if settings.speech_models is not None:
        options = WhisperOptions(
            folder=settings.speech_models,
            device=settings.device if settings.device in {"auto", "cuda"} else "cpu",
            n_threads=settings.threads or 0,
            keep_alive_s=settings.keep_alive,
            env=engine_environment(),
        )
        engines.append(WhisperEngine(options))
    return Shelf(engines)
