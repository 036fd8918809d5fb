"""`sdfleet router` (also `herd`): one address in front of every machine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.compose import House
    from sdfleet.domain import Job
    from sdfleet.settings import Settings


def router(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on; more than loopback needs a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 11435 when not set.")] = None,
    broker_host: Annotated[
        str | None, typer.Option(help="Address that nodes connect to; every one of this machine when not set.")
    ] = None,
    broker_port: Annotated[int | None, typer.Option(help="Port that nodes connect to; 4222 when not set.")] = None,
    node: Annotated[bool, typer.Option("--node", help="Let this machine draw too.")] = False,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve the pictures of a whole fleet over HTTP, as `sdfleet serve` does those of one machine.

    Starts a broker (NATS) of its own, unless SD_NATS_URL names one, and prints how a machine joins. Jobs that nodes
    draw go on when the router ends, and are taken up by its next start.
    """
    with console.answering():
        from sdfleet import compose
        from sdfleet.cli.serve import listen_and_serve

        settings = console.start(
            host=host,
            router_port=port,
            broker_host=broker_host,
            broker_port=broker_port,
            log_level=log_level,
            default_log_level="info",
            for_server=True,
        )
        compose.need_fleet_extra()
        settings = settings.model_copy(update={"port": settings.router_port})

        @contextlib.asynccontextmanager
        async def opens(settings: Settings, *, job_body: Callable[[Job], bytes]) -> AsyncIterator[House]:
            async with compose.router(settings, job_body=job_body) as house:
                _tell(house)
                async with _own_node(house) if node else contextlib.nullcontext():
                    yield house

        listen_and_serve(settings, opens=opens, name="sdfleet router")


def _tell(house: House) -> None:
    """Say how a machine joins."""
    assert house.fleet is not None
    n_nodes = len(house.fleet.members())
    if n_nodes:
        console.note(f"the fleet has {n_nodes} node{'s' if n_nodes > 1 else ''}: sdfleet fleet status")
    console.note("on each machine that is to draw, within 15 minutes (once; a new code: sdfleet fleet code):")
    console.note(f"  sdfleet node --join {house.fleet.code().text()}")


@contextlib.asynccontextmanager
async def _own_node(house: House) -> AsyncIterator[None]:
    """A node on this machine, in a process of its own."""
    from sdfleet.cli.supervising import kept_alive
    from sdfleet.fleet.identity import Identity, identity_file
    from sdfleet.settings import environment_with

    fleet, settings = house.fleet, house.settings
    assert fleet is not None
    known = Identity.load(identity_file(settings.home))
    belongs = known is not None and any(each.key == known.key.public for each in fleet.roster.enrolled())
    arguments = ["node"] if belongs else ["node", "--join", fleet.code().text()]
    async with kept_alive(arguments, env=environment_with({}), drain_s=settings.drain_s):
        yield
