"""What a wire API of ours looks like to the rest of the server, and which of them a path belongs to.

One handler answers every fault of every route; it asks the dialect of the path for the body, so that a client always
gets the error shape it parses, also for routes that do not exist and bodies that are no JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response

from sdfleet.errors import BadRequest, Busy, SdfleetError


class BadBody(BadRequest):
    """A body that does not have the shape of its route. issues: `{"loc", "msg", "type"}` of each fault."""

    code = "bad_body"

    def __init__(self, message: str, *, issues: Sequence[Mapping[str, Any]] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.issues = tuple(issues)

    @property
    def field(self) -> str | None:
        """The field at fault, where there is one."""
        return ".".join(str(part) for part in self.issues[0]["loc"]) if self.issues else None


class Dialect(Protocol):
    """How one wire API answers a fault."""

    @property
    def name(self) -> str:
        """Kept with every job that came through it."""

    def error(self, error: SdfleetError) -> Response:
        """The answer to a fault: status, body and headers as this API's clients expect them."""


def field_of(error: SdfleetError) -> str | None:
    """The field of the request that an error is about."""
    field = getattr(error, "field", None)
    return field if isinstance(field, str) else None


def error_response(
    error: SdfleetError, body: Mapping[str, Any], *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A JSON answer with what every client may rely on: `Retry-After`, or that waiting does not help."""
    told = dict(headers or {})
    if isinstance(error, Busy):
        told.setdefault("Retry-After", str(max(1, round(error.retry_after_s))))
    elif (status or error.http_status) >= 500 or (status or error.http_status) in {408, 409}:
        # An OpenAI SDK repeats these by itself, though the same request will meet the same fault.
        told.setdefault("x-should-retry", "false")
    return JSONResponse(printable(body), status_code=status or error.http_status, headers=told)


def printable(value: Any) -> Any:
    """The same JSON value without lone surrogates, which a client may send and no encoder takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list | tuple) else value
