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
import time
from collections.abc import AsyncIterator, Mapping
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
from sdfleet.catalog.download import DownloadPlan, facts_of, plan_download
from sdfleet.catalog.pulling import Pulling
from sdfleet.compose import House
from sdfleet.domain import OwnerId
from sdfleet.errors import CheckpointError, ConfirmationRequired, InvalidValue, NotFound, SdfleetError, UnknownName

# Long enough to read a licence, short enough that a token found in a log is of no use.
CONFIRM_S = 15 * 60
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
            _check_is_one_machine(house, "pull", name)
            raise
        is_stream = asked.stream is not False
        return pulled(
            request, name, node=asked.node, confirm=asked.confirm, is_stream=is_stream, dialect=ollama.DIALECT
        )
    _check_is_one_machine(house, "pull", name)
    hub = compose.hub(house.settings, asked.source)
    plan = await asyncio.to_thread(plan_download, card, hub, house.catalog.weights)
    if plan.refusal is not None and not plan.is_here:
        raise plan.refusal
    consent = _consent(house, plan, asked.confirm, owner=caller.owner)
    if consent is None and not plan.is_here:
        return _ask(house, plan, owner=caller.owner, needed=await _needed(request, house, card))
    statuses = Pulling(plan, consent, hub, house.catalog.weights).statuses()
    if asked.stream is False:
        return JSONResponse([status async for status in statuses][-1])
    return StreamingResponse(lines_of(statuses), media_type=NDJSON)


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
            _check_is_one_machine(house, "forget", name)
            raise
        return deleted(request, name, node=asked.node, dialect=ollama.DIALECT)
    _check_is_one_machine(house, "forget", name)
    await compose.check_is_idle(house.store, card.name)
    with contextlib.suppress(CheckpointError):  # broken or half here: removing it is the cure
        await house.runtime.unload(card.name)
    await asyncio.to_thread(house.catalog.forget, card.name)
    return Response(status_code=200)


async def lines_of(statuses: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    """One JSON object a line; of an error too, as the answer has begun."""
    try:
        async for status in statuses:
            yield _line(status)
    except SdfleetError as exc:
        yield _line({"error": str(exc), "code": exc.code})


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _consent(house: House, plan: DownloadPlan, confirm: str | None, *, owner: OwnerId) -> Consent | None:
    if confirm is not None and is_yes(house, plan.id, confirm, owner=owner):
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
    return ask_for_yes(
        house, facts_of(plan) | needed, what=plan.id, owner=owner,
        hint=f"send the same request with `confirm` from this answer, or run `sdfleet models pull {plan.name}` "
        "on the server",
    )  # fmt: skip


def ask_for_yes(
    house: House, facts: Mapping[str, Any], *, what: str, owner: OwnerId, hint: str, where: str = ""
) -> Response:
    """The answer 409 with a plan and the token that says yes to it. what: the plan's id. where: " at node n1", say."""
    n_bytes, licence = facts["n_left_bytes"], facts["licence"] or "unknown"
    error = ConfirmationRequired(
        f"downloading {facts['name']}{where} ({n_bytes / 1e9:.1f} GB, licence {licence}) needs a yes", hint=hint
    )
    body = {
        "error": str(error),
        "code": error.code,
        "plan": dict(facts),
        "confirm": _token(house, what, owner, int(time.time()) + CONFIRM_S),
    }
    return JSONResponse(body, status_code=error.http_status, headers={"x-should-retry": "false"})


def _token(house: House, what: str, owner: OwnerId, until_s: int) -> str:
    signed = hmac.new(house.signing_key, f"pull {what} {owner} {until_s}".encode(), hashlib.sha256)
    return f"{until_s}.{signed.hexdigest()}"


def is_yes(house: House, what: str, confirm: str, *, owner: OwnerId) -> bool:
    """Whether this is the token that the same caller got for the same plan, not long ago."""
    until, _, _ = confirm.partition(".")
    if not until.isascii() or not until.isdigit() or len(until) > 12 or int(until) < time.time():
        return False
    return hmac.compare_digest(confirm.encode(), _token(house, what, owner, int(until)).encode())


def _check_is_one_machine(house: House, verb: Literal["pull", "forget"], name: str) -> None:
    """A router has no weights of its own: which node is meant must be said. Raises InvalidValue."""
    if house.fleet is not None:
        nodes = ", ".join(member.node for member in house.fleet.members()) or "none"
        raise InvalidValue(
            "node",
            "models are at the nodes of this fleet, and this request names none",
            hint=f"POST /fleet/nodes/NODE/{verb}, or sdfleet fleet {verb} NODE {name[:80] or 'MODEL'}; nodes: {nodes}",
        )


async def _card(house: House, name: str) -> Card:
    if not name:
        raise InvalidValue("model", "it is missing", hint="see /api/tags")
    try:
        return await asyncio.to_thread(house.catalog.card, name)
    except UnknownName as exc:
        raise NotFound(f"model {name[:80]!r} not found", hint=exc.hint) from exc
