"""`sdfleet serve`: the image server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.api.app import Opens
    from sdfleet.settings import Settings

# More connections than this wait in the kernel; one process of a desktop may otherwise hold 256 or 1024 files only.
WANTED_FILES = 65_536


def serve(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on; more than loopback needs a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    model: Annotated[str | None, typer.Option(help="The default model; see `sdfleet models list`.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve pictures over HTTP: OpenAI, AUTOMATIC1111, Ollama and native routes at once.

    SIGTERM and Ctrl-C let running jobs end within SD_DRAIN_S; the others go on after the next start. The exit code is
    0 then, 1 or 2 where the server cannot start or go on.
    """
    with console.answering():
        settings = console.start(
            host=host, port=port, model=model, log_level=log_level, default_log_level="info", for_server=True
        )
        listen_and_serve(settings)


def listen_and_serve(settings: Settings, *, opens: Opens | None = None, name: str = "sdfleet") -> None:
    """Serve until told to end. opens: what stands behind the API; None: this machine.

    Raises InvalidValue for an address that cannot be listened on, or that others could reach without a key.
    """
    from sdfleet import compose
    from sdfleet.api.app import create_app
    from sdfleet.api.http import Server, listen
    from sdfleet.errors import InvalidValue

    console.run(_refuse_open_door(settings))
    _allow_many_connections()
    try:
        listener = listen(settings.host, settings.port)
    except OSError as exc:
        raise InvalidValue(
            "port", f"{settings.host}:{settings.port} cannot be listened on: {exc.strerror or exc}",
            hint="name another with --port, or end the program that has it",
        ) from exc  # fmt: skip
    with listener:
        port = listener.getsockname()[1]
        shown = "localhost" if settings.host == "127.0.0.1" else settings.host
        console.note(f"{name} listens on http://{f'[{shown}]' if ':' in shown else shown}:{port}  (Ctrl-C ends it)")
        app = create_app(settings, opens=opens or compose.server)
        app.state.port = port
        Server(app).run(sockets=[listener])


async def _refuse_open_door(settings: Settings) -> None:
    """Raise InvalidValue if others could reach the server without a key."""
    from sdfleet.api.access import is_loopback
    from sdfleet.errors import InvalidValue
    from sdfleet.storage.database import open_database
    from sdfleet.storage.keys import KeyStore

    if is_loopback(settings.host) or settings.api_key is not None:
        return
    url = None if settings.database_url is None else settings.database_url.get_secret_value()
    database = await open_database(url, home=settings.home)
    try:
        if await KeyStore(database).list():
            return
    finally:
        await database.close()
    raise InvalidValue(
        "host", f"on {settings.host} everybody in the network could use this server without a key",
        hint="make a key first: sdfleet keys create NAME; or set SD_API_KEY; or listen on 127.0.0.1",
    )  # fmt: skip


def _allow_many_connections() -> None:
    """Raise the number of open files as far as the system lets us."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
