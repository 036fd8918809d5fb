"""Sign-in for browsers: `/session` takes a key once and answers with a cookie that stands for it, see sessions.py."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdfleet.api.access import Doorkeeper, caller_of
from sdfleet.api.bodies import described, json_body
from sdfleet.api.native import FAULTS
from sdfleet.api.sessions import SESSION_S, cookie_name
from sdfleet.domain import Caller, Scope

router = APIRouter(prefix="/session", tags=["page"], responses=FAULTS)


class SignInAsked(BaseModel):
    """The key."""

    model_config = ConfigDict(extra="forbid")

    key: Annotated[str, Field(max_length=512)]


class SessionAnswer(BaseModel):
    """Who asks. needs_key: this server lets nobody in without one. signed_in: a key came along, or stands behind."""

    needs_key: bool
    signed_in: bool
    name: str
    scopes: list[Scope]


@router.get("")
async def show(request: Request) -> SessionAnswer:
    """Whether a key is wanted, and who is signed in. Needs no key."""
    return await _answer(request, caller_of(request))


@router.post("", openapi_extra=described(SignInAsked), response_model=SessionAnswer)
async def sign_in(request: Request, asked: Annotated[SignInAsked, Depends(json_body(SignInAsked))]) -> Response:
    """A session for the holder of a key, in a cookie. 401 for a key that is not known here."""
    doorkeeper = _doorkeeper(request)
    caller, token = await doorkeeper.sign_in(asked.key.strip())
    answer = JSONResponse((await _answer(request, caller)).model_dump(mode="json"))
    if token is not None:
        answer.set_cookie(
            cookie_name(request.headers),
            token,
            max_age=SESSION_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
    return answer


@router.delete("", status_code=204, response_class=Response)
async def sign_out(request: Request) -> Response:
    """Forget the session in this browser."""
    answer = Response(status_code=204)
    answer.delete_cookie(cookie_name(request.headers), httponly=True, samesite="strict")
    return answer


async def _answer(request: Request, caller: Caller) -> SessionAnswer:
    needs_key = await _doorkeeper(request).needs_key()
    return SessionAnswer(
        needs_key=needs_key,
        signed_in=needs_key and bool(caller.scopes),
        name=caller.name,
        scopes=sorted(caller.scopes),
    )


def _doorkeeper(request: Request) -> Doorkeeper:
    doorkeeper: Doorkeeper = request.app.state.doorkeeper
    return doorkeeper
