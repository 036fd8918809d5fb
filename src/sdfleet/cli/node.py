"""`sdfleet node` (also `herd-node`): this machine draws for a router."""

from __future__ import annotations

import contextlib
import logging
import platform
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from sdfleet.fleet.identity import Identity
    from sdfleet.fleet.keys import NKey
    from sdfleet.settings import Settings

log = logging.getLogger(__name__)

_COUNT_WITHIN_S = 20.0
BROKER_PORT = 4222


def node(
    *,
    join: Annotated[
        str | None, typer.Option(metavar="CODE", help="Join the fleet of this code; `sdfleet fleet code` makes one.")
    ] = None,
    router: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Ask this router to be let in, without a code.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the fleet calls it; this machine's name when not set.")] = None,
    slots: Annotated[int | None, typer.Option(help="Pictures drawn at once; found by measuring when not set.")] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="N", help="Serve this NVIDIA GPU alone; all of them when not set.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Draw for a router. A machine joins once, with a code or after a yes on the router, and is remembered there.

    Every NVIDIA GPU is a node of its own. SIGTERM and Ctrl-C: it takes no more jobs, and ends those that run within
    SD_DRAIN_S; the router gives what is left to others.
    """
    with console.answering():
        from sdfleet import compose
        from sdfleet.settings import read_surroundings

        settings = console.start(node_name=name, node_slots=slots, log_level=log_level, default_log_level="info")
        compose.need_fleet_extra()
        gpus = [gpu] if gpu is not None else _gpus(settings)
        identities = console.run(_joined(settings, gpus, code=join, place=router))
        if len(gpus) > 1 or (gpu is not None and gpu != read_surroundings().get("CUDA_VISIBLE_DEVICES")):
            console.run(_all(settings, gpus))
        else:
            first = _device_of(gpus[0] if gpus else "")
            console.serve(_serve(settings, identities[0], device=first))


def _gpus(settings: Settings) -> list[str]:
    """The numbers of the NVIDIA GPUs that this machine draws with; none where it draws with something else."""
    from sdfleet.settings import read_surroundings

    if settings.backend != "local" or settings.device not in {"auto", "cuda"}:
        return []
    chosen = read_surroundings().get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [each for each in chosen.split(",") if each.strip() not in {"", "-1"}]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_COUNT_WITHIN_S, check=True).stdout  # noqa: S603 - found on PATH, no input of others
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip().isdigit()]


def _device_of(gpu: str) -> str:
    """What tells the devices of this machine apart on its disk; the first one has no name, as where it is the only."""
    return "" if gpu in {"", "0"} else gpu.replace("/", "-")


async def _joined(settings: Settings, gpus: list[str], *, code: str | None, place: str | None) -> list[Identity]:
    """Who each device is; with a code, or where one has not joined yet, they join. Raises JoinRefused."""
    from sdfleet.errors import JoinRefused
    from sdfleet.fleet.asking import join
    from sdfleet.fleet.identity import Identity, identity_file
    from sdfleet.fleet.keys import NKey

    files = [identity_file(settings.home, device=_device_of(gpu)) for gpu in gpus or [""]]
    known = [Identity.load(path) for path in files]
    here = [each for each in known if each is not None]
    if code is None and place is None and len(here) == len(files):
        return here
    keys = [NKey.new() if each is None else each.key for each in known]
    wish = settings.node_name or platform.node() or "node"
    if code is not None:
        try:
            made = await join(code, keys=keys, wish=wish)
        except JoinRefused:
            # As when a service is started again with the code that it joined with the first time.
            if len(here) == len(files):
                console.note("the code was not taken; this machine goes on as the node it is already")
                return here
            raise
    else:
        made = await _asked(settings, keys, wish=wish, place=place)
    return _kept(made, files)


def _kept(made: tuple[Identity, ...], files: list[Path]) -> list[Identity]:
    for each, path in zip(made, files, strict=True):
        each.save(path)
        console.note(f"this machine has joined the fleet as {each.node}")
    return list(made)


async def _asked(settings: Settings, keys: list[NKey], *, wish: str, place: str | None) -> tuple[Identity, ...]:
    """Ask a router to be let in. Raises JoinRefused, NotReady, StoreUnavailable."""
    import asyncio

    from sdfleet.fleet.asking import ask

    found = place or await _seen(settings)
    if ":" not in found:
        found = f"{found}:{BROKER_PORT}"

    def show(code: str) -> None:
        console.note(f"asking the router at {found} to be let in. There, if it shows the same code, say yes:")
        console.note(f"  sdfleet fleet approve {code}")

    async def confirm(code: str) -> bool:
        if not sys.stdin.isatty():
            # Nobody is here to compare; whoever approved it has seen this code, which is in the log above.
            return place is not None
        return await asyncio.to_thread(typer.confirm, f"Did the router show {code}?", err=True)

    return await ask(found, keys=keys, wish=wish, show=show, confirm=confirm)


async def _seen(settings: Settings) -> str:
    """Where a router says it is on this network. Raises JoinRefused."""
    from sdfleet.errors import JoinRefused, StoreUnavailable
    from sdfleet.fleet.discovery import look_around

    hint = "on the router: sdfleet fleet code; here: sdfleet node --join CODE"
    sightings = ()
    if settings.discovery:
        console.note("looking for a router on this network")
        with contextlib.suppress(StoreUnavailable):
            sightings = await look_around()  # type: ignore[assignment]
    if not sightings:
        raise JoinRefused("this machine belongs to no fleet, and no router was found on its network", hint=hint)
    if len(sightings) > 1:
        named = ", ".join(f"{each.name} ({each.places[0]})" for each in sightings if each.places)
        raise JoinRefused(f"there are several routers here: {named}", hint="name one: sdfleet node --router HOST:PORT")
    return sightings[0].places[0]


async def _serve(settings: Settings, identity: Identity, *, device: str) -> None:
    """One device, until a signal comes."""
    import asyncio

    from sdfleet import compose
    from sdfleet.compose.noding import Device

    ending, is_here = _ending(), asyncio.Event()
    console.note(f"node {identity.node} serves {', '.join(identity.places[:2])}  (Ctrl-C ends it)")
    # Either `uvloop` or asyncio's own.
    kind = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    log.info("the node begins", extra={"node": identity.node, "event_loop": kind})

    async def work() -> None:
        async with compose.node(settings, Device(identity=identity, name=device)) as node:
            is_here.set()
            running, told = asyncio.ensure_future(node.run()), asyncio.ensure_future(ending.wait())
            try:
                await asyncio.wait({running, told}, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
                await node.leave(within_s=settings.drain_s)
            finally:
                for task in (running, told):
                    task.cancel()
                await asyncio.wait({running, told})

    working, told = asyncio.ensure_future(work()), asyncio.ensure_future(ending.wait())
    await asyncio.wait({working, told}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done() and not is_here.is_set():
        working.cancel()  # it still waits for a broker that is away
    told.cancel()
    await asyncio.wait({working, told})
    if not working.cancelled():
        working.result()


async def _all(settings: Settings, gpus: list[str]) -> None:
    """A process for each GPU, kept alive until a signal comes."""
    from sdfleet.cli.supervising import kept_alive
    from sdfleet.settings import environment_with

    ending = _ending()
    console.note(f"one node for each of {len(gpus)} GPUs  (Ctrl-C ends them)")
    async with contextlib.AsyncExitStack() as stack:
        for gpu in gpus:
            env = environment_with({"CUDA_VISIBLE_DEVICES": gpu})
            await stack.enter_async_context(kept_alive(["node", "--gpu", gpu], env=env, drain_s=settings.drain_s))
        await ending.wait()


def _ending() -> asyncio.Event:
    """Set by SIGTERM and Ctrl-C."""
    import asyncio

    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C comes as KeyboardInterrupt
            loop.add_signal_handler(each, ending.set)
    return ending
