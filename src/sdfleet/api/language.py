"""Text, embeddings and speech: OpenAI's and Ollama's routes over whatever answers here, one machine or a fleet.

Bodies are read as JSON objects within the limits of all bodies, and handed on as they came: which fields a model's
server knows is that server's to say.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdfleet.api import ollama, openai
from sdfleet.api.access import needs
from sdfleet.api.bodies import described, form_of, json_body
from sdfleet.api.dialect import Dialect
from sdfleet.api.talk import EVENTS, NDJSON, answered
from sdfleet.errors import InvalidValue
from sdfleet.language.asking import Ask, Door, Sound

_LINES: dict[int | str, dict[str, Any]] = {200: {"content": {NDJSON: {}, "application/json": {}}}}
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {}, "application/json": {}}}}

router = APIRouter(dependencies=[needs("generate")], default_response_class=JSONResponse)


class TalkAsked(BaseModel):
    """A request of a language model. Every other field goes to the model's server as it is."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = ""
    stream: Annotated[bool | None, Field(description="as it comes; Ollama's routes do so unless told not to")] = None


class TranscribeAsked(BaseModel):
    """A recording to be written down; `audio` is another name for `file`."""

    model_config = ConfigDict(protected_namespaces=())

    file: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    model: str
    language: str | None = None
    prompt: str | None = None
    response_format: str | None = None
    temperature: float | None = None
    stream: bool | None = None


class TranslateAsked(BaseModel):
    """A recording in any language, whose words are wanted in English; `audio` is another name for `file`."""

    model_config = ConfigDict(protected_namespaces=())

    file: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    model: str
    prompt: str | None = None
    response_format: str | None = None
    temperature: float | None = None


_BODY = described(TalkAsked)
_FORM = described(TranscribeAsked, form=True)
_ENGLISH_FORM = described(TranslateAsked, form=True)
Asked = Annotated[TalkAsked, Depends(json_body(TalkAsked))]


@router.post("/api/chat", tags=["ollama"], responses=ollama.FAULTS | _LINES, openapi_extra=_BODY)
async def chat(request: Request, asked: Asked) -> Response:
    """The next message of a conversation, one JSON object a line; or at once with `stream: false`."""
    return _answered(request, "/api/chat", asked)


@router.post("/api/embed", tags=["ollama"], responses=ollama.FAULTS, openapi_extra=_BODY)
async def embed(request: Request, asked: Asked) -> Response:
    """A vector for each text of `input`."""
    return _answered(request, "/api/embed", asked)


@router.post("/api/embeddings", tags=["ollama"], responses=ollama.FAULTS, openapi_extra=_BODY)
async def embeddings(request: Request, asked: Asked) -> Response:
    """The vector of `prompt`, as older clients ask for it."""
    return _answered(request, "/api/embeddings", asked)


@router.post("/v1/chat/completions", tags=["openai"], responses=openai.FAULTS | _EVENTS, openapi_extra=_BODY)
async def chat_completions(request: Request, asked: Asked) -> Response:
    """The next message of a conversation; events with `stream`."""
    return _answered(request, "/v1/chat/completions", asked)


@router.post("/v1/completions", tags=["openai"], responses=openai.FAULTS | _EVENTS, openapi_extra=_BODY)
async def completions(request: Request, asked: Asked) -> Response:
    """What follows a text; events with `stream`."""
    return _answered(request, "/v1/completions", asked)


@router.post("/v1/embeddings", tags=["openai"], responses=openai.FAULTS, openapi_extra=_BODY)
async def openai_embeddings(request: Request, asked: Asked) -> Response:
    """A vector for each text of `input`."""
    return _answered(request, "/v1/embeddings", asked)


@router.post("/api/transcribe", tags=["herd"], responses=ollama.FAULTS, openapi_extra=_FORM)
async def transcribe(request: Request) -> Response:
    """What is said in a recording, and in which language."""
    return await _written_down(request, "/api/transcribe")


@router.post("/v1/audio/transcriptions", tags=["openai"], responses=openai.FAULTS, openapi_extra=_FORM)
async def transcriptions(request: Request) -> Response:
    """What is said in a recording, as JSON, text or subtitles; events with `stream`."""
    return await _written_down(request, "/v1/audio/transcriptions")


@router.post("/v1/audio/translations", tags=["openai"], responses=openai.FAULTS, openapi_extra=_ENGLISH_FORM)
async def translations(request: Request) -> Response:
    """What is said in a recording, in English, as JSON, text or subtitles."""
    return await _written_down(request, "/v1/audio/translations")


def _answered(request: Request, door: Door, asked: TalkAsked) -> Response:
    return _ask(request, Ask(door=door, model=asked.model, body=asked.model_dump(exclude_unset=True)))


def _ask(request: Request, ask: Ask) -> Response:
    if not ask.model:
        raise InvalidValue("model", "it is missing", hint="see /api/tags")
    dialect: Dialect = openai.DIALECT if ask.door.startswith("/v1/") else ollama.DIALECT
    return answered(request, ask, dialect=dialect)


async def _written_down(request: Request, door: Door) -> Response:
    form = await form_of(request)
    try:
        sound, body = await _read(form)
    finally:
        await form.close()
    if sound is None or not sound.data:
        raise InvalidValue("file", "it is missing or empty", hint="send a recording as the form's field `file`")
    return _ask(request, Ask(door=door, model=str(body.get("model", "")), body=body, sound=sound))


async def _read(form: FormData) -> tuple[Sound | None, dict[str, object]]:
    """The recording and the other fields; fields whose name ends in [] may come several times."""
    sound, body = None, dict[str, object]()
    for name in form:
        values = form.getlist(name)
        uploads = [value for value in values if isinstance(value, UploadFile)]
        if uploads and name in {"file", "audio"} and sound is None:
            one = uploads[0]
            kind = one.content_type or "application/octet-stream"
            sound = Sound(name=(one.filename or "sound")[:200], kind=kind, data=await one.read())
        elif not uploads:
            body[name] = values[0] if len(values) == 1 and not name.endswith("[]") else list(values)
    return sound, body
