"""What Black Forest Labs' service answers, read with care: its own words for what went wrong become errors of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from sdfleet.backends.bfl_models import ID
from sdfleet.backends.web import Answer, BadAnswer
from sdfleet.domain import MAX_SEED
from sdfleet.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    Busy,
    CreditsNeeded,
    InvalidValue,
    SdfleetError,
)

MAX_SAID_CHARS = 300


def refusal(answer: Answer, *, host: str, now_s: float) -> SdfleetError:
    """What an answer that is no 2xx means."""
    said = _said(answer)
    match answer.status:
        case 402:
            return CreditsNeeded(
                f"{host} has no credits left for this server's key",
                hint="buy some at https://dashboard.bfl.ai, or name another backend; nothing was charged",
            )
        case 401 | 403:
            return BackendUnavailable(ID, f"{host} refused this server's key", hint="set SD_BFL_API_KEY anew")
        case 422:
            field, text = _issue(answer)
            return InvalidValue(field, f"{host} refused it: {text}")
        case 400:
            return BadRequest(f"{host} refused the request: {said}")
        case 429:
            wait_s = retry_after_s(answer, now_s=now_s) or 30.0
            return Busy(f"{host} has as many pictures of this key under way as it takes", retry_after_s=wait_s)
        case _:
            return BackendFailed(f"{host} answered {answer.status}: {said}", hint="try again later")


def object_of(answer: Answer) -> Mapping[str, object]:
    """The JSON object in an answer; empty where there is none."""
    try:
        return answer.json()
    except BadAnswer:
        return {}


def text_of(told: Mapping[str, object], name: str) -> str:
    """A field that must be there. Raises BadAnswer."""
    found = told.get(name)
    if not isinstance(found, str) or not found:
        raise BadAnswer(f"there is no {name}")
    return found


def number_of(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    number = float(value) if abs(value) < 2**63 else math.inf
    return number if math.isfinite(number) else None


def seed_of(result: Mapping[str, object]) -> int | None:
    """The seed that the service says it used, if that can be one."""
    seed = result.get("seed")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= MAX_SEED else None


def _said(answer: Answer) -> str:
    """What the service said, in one short line."""
    detail = object_of(answer).get("detail", "")
    text = detail if isinstance(detail, str) else json.dumps(detail)
    return " ".join((text or answer.body.decode("utf-8", "replace")).split())[:MAX_SAID_CHARS] or "nothing"


def _issue(answer: Answer) -> tuple[str, str]:
    """The field of a 422 and what is wrong with it."""
    detail = object_of(answer).get("detail")
    first = detail[0] if isinstance(detail, list) and detail else {}
    if not isinstance(first, dict):
        return "request", _said(answer)
    loc = first.get("loc")
    field = str(loc[-1]) if isinstance(loc, list) and loc else "request"
    return field[:80], str(first.get("msg") or _said(answer))[:MAX_SAID_CHARS]


def details_of(told: Mapping[str, object]) -> str:
    """What the service says of a failure, in one short line."""
    details = told.get("details") or told.get("result") or "it does not say which"
    return (details if isinstance(details, str) else json.dumps(details))[:MAX_SAID_CHARS]


def retry_after_s(answer: Answer, *, now_s: float) -> float | None:
    """Seconds of a Retry-After header, which may be a date; None where there is none that makes sense."""
    value = answer.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now_s)
    except (TypeError, ValueError):
        return None
