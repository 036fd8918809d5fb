"""`sdfleet keys`: who may call the server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.storage.keys import KeyRecord

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke the keys of the server's callers.")

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]
KeyName = Annotated[str, typer.Argument(show_default=False)]


@app.command("create")
def create(
    *,
    name: KeyName,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="generate, read, manage or unfiltered; may be given more than once.", show_default="generate, read"
        ),
    ] = None,
    rate_per_minute: Annotated[int | None, typer.Option(help="Most requests for pictures in a minute.")] = None,
    max_queued: Annotated[int | None, typer.Option(help="Most jobs that may wait at once.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is stored as a hash: nobody can show it again."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        settings = console.start()

        async def work() -> tuple[KeyRecord, str]:
            async with compose.stores(settings) as stores:
                return await stores.keys.create(
                    name,
                    scopes=scope or ("generate", "read"),  # type: ignore[arg-type]  # `create` says which there are
                    rate_per_minute=rate_per_minute,
                    max_queued=max_queued,
                )

        made, secret = console.run(work())
        if as_json:
            console.say_json({**_facts(made), "key": secret})
            return
        console.say(secret)
        console.note(f"made key {name!r} ({', '.join(sorted(made.scopes))}); it is not shown again")


@app.command("list")
def list_keys(*, as_json: AsJson = False) -> None:
    """List the keys in force."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        settings = console.start()

        async def work() -> tuple[KeyRecord, ...]:
            async with compose.stores(settings) as stores:
                return await stores.keys.list()

        found = console.run(work())
        if as_json:
            console.say_json({"keys": [_facts(key) for key in found]})
            return
        for key in found:
            used = "never used" if key.last_used_s is None else f"used {_when(key.last_used_s)}"
            console.say(f"{key.name:<24} {','.join(sorted(key.scopes)):<22} {used:<22} {key.owner}")


@app.command("revoke")
def revoke(*, name: KeyName, as_json: AsJson = False) -> None:
    """End a key, by its name or its id; a server that runs refuses it from now on."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        settings = console.start()

        async def work() -> KeyRecord:
            async with compose.stores(settings) as stores:
                return await stores.keys.revoke(name)

        ended = console.run(work())
        if as_json:
            console.say_json(_facts(ended))
            return
        console.say(f"revoked {ended.name}")


def _facts(key: KeyRecord) -> dict[str, Any]:
    return {
        "id": key.owner,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "rate_per_minute": key.rate_per_minute,
        "max_queued": key.max_queued,
        "created": key.created_s,
        "last_used": key.last_used_s,
    }


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}Z"
