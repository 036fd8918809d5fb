"""Text, embeddings and speech: the servers that were set up for them, and what speech needs on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder

from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, ok, warning
from sdfleet.doctor.machine import Machine
from sdfleet.doctor.upstreams import Upstream

_NOT_SET_UP = "no server of language models is set up: SD_OLLAMA_URL, SD_LANGUAGE_URLS"
# Connecting and answering, and the start of the thread's own event loop.
_LIMIT_S = 8.0


def servers(machine: Machine) -> Finding:
    """Whether every server that is set up answers."""
    found = machine.upstreams.found(machine.settings)
    if not found:
        return not_applicable(_NOT_SET_UP)
    if gone := [one for one in found if one.standing in {"unreachable", "broken"}]:
        return fault(_told(gone, lambda one: f"does not answer as it should: {one.said}"), _start(gone[0]))
    if late := [one for one in found if one.standing == "late"]:
        what = _told(late, lambda one: f"is connected to and silent: {one.said}")
        return warning(what, f"it may be computing on every core; look at it: curl {_list_of(late[0])}")
    return ok(f"{'; '.join(one.url for one in found)} answer{'s' if len(found) == 1 else ''}")


def key(machine: Machine) -> Finding:
    """Whether the servers let us in."""
    found = machine.upstreams.found(machine.settings)
    answering = [one for one in found if one.standing not in {"unreachable", "broken", "late"}]
    if not answering:
        return not_applicable("see language-server" if found else _NOT_SET_UP)
    locked = [one for one in answering if one.standing == "locked"]
    if not locked:
        return ok(f"{'; '.join(one.url for one in answering)}: we are let in")
    one = locked[0]
    sent = "without a key" if machine.settings.language_key is None else "with the key of SD_LANGUAGE_KEY"
    if one.setting == "SD_OLLAMA_URL":
        cure = f"Ollama itself knows no keys; what is before it does: SD_LANGUAGE_URLS={one.url} SD_LANGUAGE_KEY=KEY"
        return fault(_told(locked, lambda one: f"answers {one.said}, without a key"), cure)
    return fault(_told(locked, lambda one: f"answers {one.said}, {sent}"), f"SD_LANGUAGE_KEY=KEY; {_try(one)}")


def protocol(machine: Machine) -> Finding:
    """Whether what answers lists models as it should."""
    found = machine.upstreams.found(machine.settings)
    answering = [one for one in found if one.standing in {"well", "empty", "strange"}]
    if not answering:
        return not_applicable("see language-server and language-key" if found else _NOT_SET_UP)
    strange = [one for one in answering if one.standing == "strange"]
    if not strange:
        return ok(f"{'; '.join(one.url for one in answering)}: models are listed as they should be")
    one = strange[0]
    if one.setting == "SD_OLLAMA_URL":
        cure = f"if it has OpenAI's routes, unset SD_OLLAMA_URL and set SD_LANGUAGE_URLS={one.url}"
    else:
        cure = f"name the part before /v1; what it says: curl {_list_of(one)}"
    return fault(_told(strange, lambda one: f"answers {one.path} with {one.said}"), cure)


def models(machine: Machine) -> Finding:
    """Whether the servers have models."""
    found = machine.upstreams.found(machine.settings)
    listing = [one for one in found if one.standing in {"well", "empty"}]
    if not listing:
        return not_applicable("see language-server, language-key and language-protocol" if found else _NOT_SET_UP)
    if empty := [one for one in listing if one.standing == "empty"]:
        is_ollama = empty[0].setting == "SD_OLLAMA_URL"
        cure = "ollama pull llama3.2" if is_ollama else f"load one in that server; then: curl {_list_of(empty[0])}"
        return warning(_told(empty, lambda _: "has no models: nothing can be asked of it"), cure)
    return ok("; ".join(f"{one.url}: {one.n_models} models" for one in listing))


def speech(machine: Machine) -> Finding:
    """Whether recordings can be written down on this machine, where that is wanted."""
    folder = machine.settings.speech_models
    if folder is None:
        return not_applicable("speech is not set up on this machine: SD_SPEECH_MODELS")
    if PathFinder.find_spec("faster_whisper", list(machine.search_path)) is None:
        return fault(f"SD_SPEECH_MODELS is {folder}, and faster-whisper is not installed")
    if not folder.is_dir():
        return fault(f"SD_SPEECH_MODELS is {folder}, and there is no such folder", f"mkdir -p {folder}")
    places = [place for place in (folder, *sorted(folder.iterdir())) if (place / "model.bin").is_file()]
    if not places:
        return fault(
            f"no folder in {folder} has a model.bin: there is no speech model",
            f"put a model of faster-whisper there, as {folder}/NAME/model.bin with its other files",
        )
    if lacking := [place for place in places if not (place / "tokenizer.json").is_file()]:
        return warning(
            f"{lacking[0]} has no tokenizer.json, which faster-whisper would look for on the internet",
            f"put tokenizer.json of the same model into {lacking[0]}",
        )
    return ok(f"speech models: {', '.join(place.name for place in places)}")


def _told(found: Sequence[Upstream], what: Callable[[Upstream], str]) -> str:
    return "; ".join(f"{one.url} ({one.setting}) {what(one)}" for one in found)


def _start(one: Upstream) -> str:
    """How a server that does not answer is had to."""
    if one.setting == "SD_OLLAMA_URL" and one.is_here:
        return "ollama serve; in a container this machine is http://host.docker.internal:11434"
    beside = "; in a container this machine is http://host.docker.internal:PORT" if one.is_here else ""
    return f"start that server, or correct {one.setting}{beside}; try: curl {_list_of(one)}"


def _try(one: Upstream) -> str:
    return f"try it: curl -H 'Authorization: Bearer KEY' {_list_of(one)}"


def _list_of(one: Upstream) -> str:
    return one.url + one.path


ENTRIES = (
    Entry(
        id="language-server",
        title="A server of language models does not answer",
        symptoms=(
            "the server of the model failed: ConnectError", "the server of the model failed: ConnectTimeout",
            "the server of the model broke off in the middle of its answer", "upstream_failed",
        ),
        cause="The server of SD_OLLAMA_URL or SD_LANGUAGE_URLS does not run, listens elsewhere, or met a fault.",
        looks="each of them is asked which models it has",
        cure="start it, or correct SD_OLLAMA_URL, SD_LANGUAGE_URLS; curl its address with /v1/models",
        check=servers,
        limit_s=_LIMIT_S,
        signs=(
            r"the server of the models? (failed|broke off|met a fault|answered)",
            r"an engine of language models cannot be asked",
        ),
        codes=("upstream_failed",),
    ),
    Entry(
        id="language-key",
        title="A server of language models wants a key",
        symptoms=("the server of the model does not let us in", "401 from vLLM or LM Studio"),
        cause="It was started with a key, and SD_LANGUAGE_KEY is not set, or is another one.",
        looks="whether it answers 401 or 403 when it is asked which models it has",
        cure="SD_LANGUAGE_KEY=KEY, the one that the server was started with",
        check=key,
        limit_s=_LIMIT_S,
        signs=(r"the server of the models? does not let us in", r"SD_LANGUAGE_KEY", r"\b401 from (vllm|lm studio)"),
    ),
    Entry(
        id="language-protocol",
        title="What answers is no server of language models",
        symptoms=(
            "the server of the models does not list them as OpenAI does",
            "the server of the models does not list them as Ollama does", "with what is no JSON",
        ),
        cause="The address is of another program, or of an OpenAI-compatible server where Ollama is expected.",
        looks="whether its list of models has the shape that it should have",
        cure="SD_OLLAMA_URL is for Ollama, SD_LANGUAGE_URLS for servers with /v1/models; each without a path",
        check=protocol,
        limit_s=_LIMIT_S,
        signs=(r"does not list them as (openai|ollama) does", r"answered \S+ with what is no json"),
    ),
    Entry(
        id="language-models",
        title="No language model is found",
        symptoms=("model(s) 'llama3.2' not found on any node", "model_not_found", "the list of models is empty"),
        cause="No server that is set up here, or at a node, has a model of that name. New ones show within 5 s.",
        looks="whether each server has models at all",
        cure="curl localhost:7860/api/tags lists those that answer; ollama pull NAME brings one",
        check=models,
        limit_s=_LIMIT_S,
        signs=(r"model\(s\) \S+ not found on any node", r"the list of models is empty"),
        codes=("model_not_found",),
    ),
    Entry(
        id="speech",
        title="Recordings cannot be written down here",
        symptoms=(
            "SD_SPEECH_MODELS needs faster-whisper", "No module named 'faster_whisper'",
            "the speech model was not loaded within",
        ),
        cause="The extra `speech` is not installed, or the folder of SD_SPEECH_MODELS has no model in it.",
        looks="whether faster-whisper is installed and the folder has models, where SD_SPEECH_MODELS is set",
        cure="python -m pip install 'sdfleet[speech]'",
        check=speech,
        signs=(
            r"needs faster-whisper", r"no module named '?(faster_whisper|ctranslate2)", r"the speech model was not",
            r"the process that listens has ended", r"does not write down what is said",
        ),
    ),
)  # fmt: skip
