"""Language models that come and go: an Ollama's, here or at a node, after the same yes as any download.

Ollama does not say beforehand how large a model is, so the plan that is said yes to names only what and where.
"""

from __future__ import annotations

import hashlib
import hmac
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdfleet.api.access import caller_of
from sdfleet.api.answering import house_of
from sdfleet.api.dialect import Dialect
from sdfleet.api.nodes import node_id
from sdfleet.api.talk import Told
from sdfleet.compose import House
from sdfleet.domain import OwnerId
from sdfleet.errors import ConfirmationRequired, InvalidValue
from sdfleet.language.asking import Ask

# Long enough to think about it, short enough that a token found in a log is of no use.
CONFIRM_S = 15 * 60


def can_pull(house: House, node: str) -> bool:
    """Whether an Ollama could be asked for a model that nobody here knows."""
    return bool(node and house.fleet is not None) or bool(house.language.pullers())


def pulled(
    request: Request, name: str, *, node: str, confirm: str | None, is_stream: bool, dialect: Dialect
) -> Response:
    """Ollama's own lines while it downloads; 409 with the plan and the token that says yes to it.

    node: where; where it is left out, one that is known to have an Ollama. The caller may manage.
    """
    house, owner = house_of(request), caller_of(request).owner
    if not house.settings.pull_without_asking and not _is_token(house, name, node, owner, confirm or ""):
        return _ask(house, name, node, owner)
    body: dict[str, object] = {"model": name, "stream": is_stream}
    ask = Ask(door="/api/pull", model=name, body=body, node=node)
    return Told(house.language, ask, dialect=dialect)


def deleted(request: Request, name: str, *, node: str, dialect: Dialect) -> Response:
    """Nothing, once an Ollama has deleted the model. Of several nodes that have it one must be named."""
    house = house_of(request)
    nodes = house.language.nodes_with(name)
    if len(nodes) > 1 and not node:
        raise InvalidValue("node", f"{name[:80]} is on {', '.join(nodes)[:200]}", hint="name the one to delete it from")
    return Told(house.language, Ask(door="/api/delete", model=name, body={"model": name}, node=node), dialect=dialect)


def _ask(house: House, name: str, node: str, owner: OwnerId) -> Response:
    where = node or next(iter(house.language.pullers()), "") or node_id()
    error = ConfirmationRequired(
        f"having Ollama on {where} download {name[:80]!r} needs a yes",
        hint="send the same request with `confirm` from this answer, or run `ollama pull` there",
    )
    until_s = int(time.time()) + CONFIRM_S
    body = {
        "error": str(error),
        "code": error.code,
        "plan": {"model": name, "source": "ollama", "node": where, "bytes": None},
        "confirm": _token(house, name, node, owner, until_s),
    }
    return JSONResponse(body, status_code=error.http_status, headers={"x-should-retry": "false"})


def _token(house: House, name: str, node: str, owner: OwnerId, until_s: int) -> str:
    text = f"pull from ollama\0{name}\0{node}\0{owner}\0{until_s}"
    return f"{until_s}.{hmac.new(house.signing_key, text.encode(), hashlib.sha256).hexdigest()}"


def _is_token(house: House, name: str, node: str, owner: OwnerId, confirm: str) -> bool:
    """Whether this is the token that the same caller got for the same model, not long ago."""
    until, _, _ = confirm.partition(".")
    if not until.isascii() or not until.isdigit() or len(until) > 12 or int(until) < time.time():
        return False
    return hmac.compare_digest(confirm.encode(), _token(house, name, node, owner, int(until)).encode())
