"""Models come and go over HTTP, in Ollama's words: `/api/pull` and `/api/delete`, for callers who may manage.

Nothing is downloaded without a yes: the first call is answered with 409, the plan and a token; the same call again with
that token in `confirm` is the yes to this plan. A client that only knows Ollama shows the message, which says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sdfleet import compose
from sdfleet.api import ollama
from sdfleet.api.access import caller_of, check_right
from sdfleet.api.answering import house_of
from sdfleet.api.bodies import described, json_body
from sdfleet.api.forecasts import Forecasts
from sdfleet.api.language_models import can_pull, deleted, pulled
from sdfleet.api.ollama import FAULTS
from sdfleet.api.talk import NDJSON
from sdfleet.catalog.cards import Card
from sdfleet.catalog.consent import Consent
from sdfleet.catalog.download import DownloadPlan, PullProgress, facts_of, fetch, plan_download
from sdfleet.catalog.hubs.hub import Hub
from sdfleet.catalog.pulled import PulledWeights
from sdfleet.compose import House
from sdfleet.domain import OwnerId
from sdfleet.errors import CheckpointError, ConfirmationRequired, InvalidValue, NotFound, SdfleetError, UnknownName

# Long enough to read a licence, short enough that a token found in a log is of no use.
CONFIRM_S = 15 * 60
# How often a transfer says where it stands.
TELL_EVERY_S = 0.2
# How long the answer 409 waits for memory and time, and how long this machine is timed for them: a person is waiting.
_FORECAST_S = 10.0
_MEASURING_S = 3.0

router = APIRouter(tags=["ollama"], responses=FAULTS)


class PullAsked(BaseModel):
    """Which model, from where, and the token that says yes to the plan."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str = ""
    name: str = ""
    stream: bool | None = True
    source: Annotated[
        Literal["hf", "modelscope"] | None, Field(description="Hugging Face or ModelScope; SD_HUB when left out")
    ] = None
    confirm: Annotated[str | None, Field(description="the token out of the answer 409")] = None
    node: Annotated[str, Field(description="of a fleet: whose Ollama downloads a language model")] = ""


class DeleteAsked(BaseModel):
    """Which model."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str = ""
    name: str = ""
    node: Annotated[str, Field(description="of a fleet: whose Ollama deletes a language model")] = ""


@router.post(
    "/api/pull",
    openapi_extra=described(PullAsked),
    responses={
        200: {"content": {NDJSON: {}, "application/json": {}}},
        409: {"description": "Nobody has said yes yet: the plan, and the token that says it."},
    },
    response_class=JSONResponse,
)
async def pull(request: Request, asked: Annotated[PullAsked, Depends(json_body(PullAsked))]) -> Response:
    """Download a model after a yes, with its progress, one JSON object a line; or at once with `stream: false`."""
    caller = caller_of(request)
    check_right(caller, "manage")
    house = house_of(request)
    name = asked.model or asked.name
    try:
        card = await _card(house, name)
    except NotFound:
        if asked.source is not None or not can_pull(house, asked.node):
            raise
        is_stream = asked.stream is not False
        return pulled(
            request, name, node=asked.node, confirm=asked.confirm, is_stream=is_stream, dialect=ollama.DIALECT
        )
    hub = compose.hub(house.settings, asked.source)
    plan = await asyncio.to_thread(plan_download, card, hub, house.catalog.weights)
    if plan.refusal is not None and not plan.is_here:
        raise plan.refusal
    consent = _consent(house, plan, asked.confirm, owner=caller.owner)
    if consent is None and not plan.is_here:
        return _ask(house, plan, owner=caller.owner, needed=await _needed(request, house, card))
    statuses = _Pull(plan, consent, hub, house.catalog.weights).statuses()
    if asked.stream is False:
        return JSONResponse([status async for status in statuses][-1])
    return StreamingResponse(_lines(statuses), media_type=NDJSON)


@router.delete("/api/delete", openapi_extra=described(DeleteAsked), response_class=Response)
async def delete(request: Request, asked: Annotated[DeleteAsked, Depends(json_body(DeleteAsked))]) -> Response:
    """Delete a downloaded model; of an imported one only the name is forgotten, its folder stays."""
    check_right(caller_of(request), "manage")
    house = house_of(request)
    name = asked.model or asked.name
    try:
        card = await _card(house, name)
    except NotFound:
        if house.language.find(name) is None:
            raise
        return deleted(request, name, node=asked.node, dialect=ollama.DIALECT)
    await compose.check_is_idle(house.store, card.name)
    with contextlib.suppress(CheckpointError):  # broken or half here: removing it is the cure
        await house.runtime.unload(card.name)
    await asyncio.to_thread(house.catalog.forget, card.name)
    return Response(status_code=200)


class _Pull:
    """One download, in a thread of its own; its caller listens to `statuses`, and leaving them stops it.

    Not one of the threads that the server shares: a few downloads of hours would leave none for anything else.
    """

    def __init__(self, plan: DownloadPlan, consent: Consent | None, hub: Hub, weights: PulledWeights) -> None:
        self._plan = plan
        self._consent = consent
        self._hub = hub
        self._weights = weights
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._stop = threading.Event()
        self._last = ("", 0.0)

    async def statuses(self) -> AsyncIterator[dict[str, Any]]:
        """What to tell the client, to the end. Raises what `fetch` raises."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="pull")
        ended = asyncio.wrap_future(thread.submit(self._fetch))
        ended.add_done_callback(self._end)
        thread.shutdown(wait=False)
        try:
            yield {"status": "pulling manifest"}
            while (told := await self._told.get()) is not None:
                yield told
            await ended
        finally:
            self._stop.set()

    def _end(self, ended: asyncio.Future[None]) -> None:
        if not ended.cancelled():
            # Looked at, so that nobody is told of an error whose caller has gone.
            ended.exception()
        self._told.put_nowait(None)

    def _fetch(self) -> None:
        if not self._plan.is_here:
            told = self._on_progress
            fetch(self._plan, self._consent, self._hub, self._weights, on_progress=told, cancel=self._stop)
        for status in ("verifying sha256 digest", "writing manifest", "success"):
            self._say({"status": status})

    def _on_progress(self, progress: PullProgress) -> None:
        file, now_s = progress.file, time.monotonic()
        is_news = file.path != self._last[0] or progress.n_file_bytes == file.n_bytes or progress.waits_s is not None
        if not is_news and now_s - self._last[1] < TELL_EVERY_S:
            return
        self._last = (file.path, now_s)
        status: dict[str, Any] = {
            "status": f"pulling {file.digest.hex[:12]}",
            "digest": f"sha256:{file.digest.hex}" if file.digest.kind == "sha256" else f"git:{file.digest.hex}",
            "total": file.n_bytes,
            "completed": progress.n_file_bytes,
            "file": file.path,
        }
        if progress.waits_s is not None:
            status["waits_s"] = progress.waits_s
        self._say(status)

    def _say(self, status: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._told.put_nowait, status)


async def _lines(statuses: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for status in statuses:
            yield _line(status)
    except SdfleetError as exc:
        yield _line({"error": str(exc), "code": exc.code})


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _consent(house: House, plan: DownloadPlan, confirm: str | None, *, owner: OwnerId) -> Consent | None:
    if confirm is not None and _is_token(house, plan, confirm, owner=owner):
        return Consent(plan_id=plan.id, given_by="api")
    if house.settings.pull_without_asking:
        return Consent(plan_id=plan.id, given_by="setting")
    return None


async def _needed(request: Request, house: House, card: Card) -> dict[str, Any]:
    """Memory and time of a picture here, for the plan; empty where that is not known soon enough."""
    # Timing beside a picture that is drawn would slow it and be wrong: then what is known already has to do.
    is_drawing = (await house.store.counts()).get("running", 0) > 0
    budget_s = 0.0 if is_drawing else _MEASURING_S
    question = compose.forecast_question(card, house.settings, budget_s=budget_s, all_formats=False)
    if question is None:
        return {}
    state = request.app.state
    if not hasattr(state, "forecasts"):
        state.forecasts = Forecasts()
    found = await state.forecasts.find(question, wait_s=_FORECAST_S)
    return {} if found is None else found


def _ask(house: House, plan: DownloadPlan, *, owner: OwnerId, needed: dict[str, Any]) -> Response:
    error = ConfirmationRequired(
        f"downloading {plan.name} ({plan.n_left_bytes / 1e9:.1f} GB, licence {plan.licence or 'unknown'}) needs a yes",
        hint="send the same request with `confirm` from this answer, or run `sdfleet models pull "
        f"{plan.name}` on the server",
    )
    until_s = int(time.time()) + CONFIRM_S
    body = {
        "error": str(error),
        "code": error.code,
        "plan": facts_of(plan) | needed,
        "confirm": _token(house, plan, owner, until_s),
    }
    return JSONResponse(body, status_code=error.http_status, headers={"x-should-retry": "false"})


def _token(house: House, plan: DownloadPlan, owner: OwnerId, until_s: int) -> str:
    signed = hmac.new(house.signing_key, f"pull {plan.id} {owner} {until_s}".encode(), hashlib.sha256)
    return f"{until_s}.{signed.hexdigest()}"


def _is_token(house: House, plan: DownloadPlan, confirm: str, *, owner: OwnerId) -> bool:
    """Whether this is the token that the same caller got for the same plan, not long ago."""
    until, _, _ = confirm.partition(".")
    if not until.isascii() or not until.isdigit() or len(until) > 12 or int(until) < time.time():
        return False
    return hmac.compare_digest(confirm.encode(), _token(house, plan, owner, int(until)).encode())


async def _card(house: House, name: str) -> Card:
    if not name:
        raise InvalidValue("model", "it is missing", hint="see /api/tags")
    try:
        return await asyncio.to_thread(house.catalog.card, name)
    except UnknownName as exc:
        raise NotFound(f"model {name[:80]!r} not found", hint=exc.hint) from exc
