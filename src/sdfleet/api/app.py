"""The server: every dialect over one desk, one handler for every fault.

    Tracing (request id, log line) -> CORS -> Access (who asks) -> Limits (how much) -> the routes of the dialects

`create_app(settings)` builds it; nothing is opened before the app starts, and HTTP answers while the model is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from sdfleet import __version__, compose
from sdfleet.api import (
    a1111,
    a1111_lists,
    bfl,
    dashboard,
    fleet,
    herd,
    jobs,
    language,
    links,
    models,
    native,
    ollama,
    openai,
    pages,
    pulling,
    signing_in,
    studio,
    system,
)
from sdfleet.api.access import Access, Doorkeeper, RateLimit, is_loopback
from sdfleet.api.answering import ClientLeft, Waiting
from sdfleet.api.dialect import BadBody, Dialect
from sdfleet.api.limits import Limits, Tracing
from sdfleet.api.sessions import Sessions
from sdfleet.api.snapshots import Snapshots
from sdfleet.domain import Job
from sdfleet.errors import MethodNotAllowed, NotAcceptable, NotFound, SdfleetError
from sdfleet.settings import Settings
from sdfleet.storage import doorplate
from sdfleet.storage.doorplate import Doorplate
from sdfleet.storage.switches import SwitchBoard

log = logging.getLogger(__name__)

# The longest prefix wins; what no line names is answered as our own API.
DIALECTS: dict[str, Dialect] = {
    "/v1/": openai.DIALECT,
    "/v1/flux-": bfl.DIALECT,
    "/v1/get_result": bfl.DIALECT,
    "/v1/credits": bfl.DIALECT,
    "/sdapi/": a1111.DIALECT,
    "/api/": ollama.DIALECT,
    "/api/jobs": jobs.DIALECT,
    "/api/outputs": jobs.DIALECT,
    "/api/txt2img": native.DIALECT,
    "/api/img2img": native.DIALECT,
    "/api/backends": native.DIALECT,
    "/api/models": models.DIALECT,
    "/api/samplers": native.DIALECT,
    "/api/tokens": native.DIALECT,
    "/api/metadata": native.DIALECT,
    "/fleet/": fleet.DIALECT,
    "/dashboard/": ollama.DIALECT,
    "/generate": native.SIMPLE_DIALECT,
}


class Opens(Protocol):
    """Builds the house that an app answers for. job_body: what a webhook is sent about a job."""

    def __call__(
        self, settings: Settings, *, job_body: Callable[[Job], bytes]
    ) -> contextlib.AbstractAsyncContextManager[compose.House]: ...


def dialect_of(path: str) -> Dialect:
    """The dialect that answers on a path, also when no route is there.

    >>> dialect_of("/v1/images/generations").name, dialect_of("/v1/flux-dev").name, dialect_of("/nowhere").name
    ('openai', 'bfl', 'native')
    """
    found = max((prefix for prefix in DIALECTS if path.startswith(prefix)), key=len, default="")
    return DIALECTS.get(found, native.DIALECT)


def create_app(settings: Settings, *, opens: Opens = compose.server) -> FastAPI:
    """The whole server as an ASGI app; its lifespan opens and closes everything it stands on.

    opens: what that is: `compose.server`, or a router's.
    """
    app = FastAPI(
        title="sdfleet",
        version=__version__,
        summary="Stable Diffusion and FLUX on your own machines, in the dialects that clients already speak.",
        lifespan=_lifespan,
        middleware=[
            Middleware(Tracing, dialect_of=dialect_of),
            # Before the keys: a browser asks first whether it may, without one, and reads the answers to faults too.
            *_cors(settings),
            Middleware(Access, dialect_of=dialect_of),
            Middleware(Limits, dialect_of=dialect_of, max_body=settings.max_body),
        ],
        # Ours says what happened in the dialect of the path; the framework's own page of a validation fault would not.
        exception_handlers={
            SdfleetError: _answer_fault,
            RequestValidationError: _answer_fault,
            HTTPException: _answer_fault,
            ClientLeft: _answer_nobody,
        },
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.opens = opens
    app.state.fault = None
    app.state.checkup = dashboard.Checkup()
    app.state.snapshots = Snapshots()
    app.state.series = dashboard.SeriesShelf()
    # Whoever listens on a port that was free says here which it is.
    app.state.port = settings.port
    for router in (
        openai.router, a1111.router,
        a1111_lists.router, ollama.router, pulling.router, herd.router, fleet.router, bfl.router, native.router,
        jobs.router, language.router,
        models.router,
        links.router, system.router, dashboard.router, pages.router, signing_in.router, studio.router,
    ):  # fmt: skip
        app.include_router(router)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    admin_key = None if settings.api_key is None else settings.api_key.get_secret_value()
    async with (
        _noting_fault(app),
        app.state.opens(settings, job_body=jobs.body_of) as house,
        _doorplate(settings, port=app.state.port) as plate,
        asyncio.TaskGroup() as tasks,
    ):
        app.state.house = house
        app.state.waiting = Waiting()
        app.state.switches = await asyncio.to_thread(SwitchBoard, settings.home)
        app.state.rate_limit = RateLimit(per_minute=settings.rate_per_minute)
        app.state.doorkeeper = Doorkeeper(
            keys=house.keys,
            admin_key=admin_key,
            home_key=plate.key,
            is_public=not is_loopback(settings.host),
            hosts=frozenset({settings.host.lower(), *(name.lower() for name in settings.allowed_hosts)}),
            origins=frozenset(settings.allowed_origins),
            sessions=Sessions(house.signing_key),
        )
        running: set[asyncio.Task[None]] = set()

        def background(work: Coroutine[Any, Any, None]) -> None:
            """Do something that no answer waits for. It ends with the server; its faults are its own."""
            task = asyncio.create_task(work)
            running.add(task)
            task.add_done_callback(ended)

        def ended(task: asyncio.Task[None]) -> None:
            running.discard(task)
            if not task.cancelled() and (fault := task.exception()) is not None:
                log.error("a fault of sdfleet itself, beside any request", exc_info=fault)

        app.state.background = background
        background(house.readiness.load())
        # A server whose desk has died would take jobs that nobody draws: it ends with the desk instead.
        tasks.create_task(house.stand())
        try:
            yield
        finally:
            await drain(app)
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)


@contextlib.asynccontextmanager
async def _doorplate(settings: Settings, *, port: int) -> AsyncIterator[Doorplate]:
    with doorplate.hung(settings.home, host=settings.host, port=port) as plate:
        yield plate


async def drain(app: FastAPI) -> None:
    """Take no more jobs and give those that run SD_DRAIN_S; whoever still waits then is told that the server stops.

    Callers that are torn away from now on do not take their jobs along: those go on after the next start.
    """
    app.state.background = _drop
    house: compose.House = app.state.house
    await house.drain()
    app.state.snapshots.close()


@contextlib.asynccontextmanager
async def _noting_fault(app: FastAPI) -> AsyncIterator[None]:
    """Keep what the app cannot start with, or dies of: whoever serves it must know, and ASGI carries only a text."""
    try:
        yield
    except BaseException as exc:
        app.state.fault = _one_of(exc)
        raise


def _one_of(fault: BaseException) -> BaseException:
    """The error of ours that a group of tasks ended with, if that is all; else the fault as it is."""
    found = fault
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    return found if isinstance(found, SdfleetError) else fault


def _drop(work: Coroutine[Any, Any, None]) -> None:
    work.close()


def _cors(settings: Settings) -> list[Middleware]:
    if not settings.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    ]


async def _answer_fault(request: Request, exc: Exception) -> Response:
    return dialect_of(request.url.path).error(_as_ours(exc, request))


async def _answer_nobody(_request: Request, _exc: Exception) -> Response:
    return Response(status_code=499)


def _as_ours(exc: Exception, request: Request) -> SdfleetError:
    match exc:
        case SdfleetError():
            return exc
        case RequestValidationError():
            issues = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in exc.errors()]
            name = ".".join(str(part) for part in issues[0]["loc"][1:]) or "request"
            return BadBody(f"{name}: {issues[0]['msg']}", issues=issues)
        case HTTPException(status_code=404):
            return NotFound(f"there is no route {request.url.path[:200]}", hint="see /openapi.json")
        case HTTPException(status_code=405):
            return MethodNotAllowed(f"{request.method} is not a method of {request.url.path[:200]}")
        case HTTPException():
            error = NotAcceptable(str(exc.detail))
            error.http_status = exc.status_code
            return error
        case _:
            raise exc
