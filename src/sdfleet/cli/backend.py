"""`sdfleet backend`: engines of other projects, installed beside ours and removed again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdfleet.cli import console, pulling

if TYPE_CHECKING:
    from sdfleet.backends.guests.venv import Pins

app = typer.Typer(no_args_is_help=True, help="Install, list and remove engines of other projects.")

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="mflux or diffusionkit.", show_default=False)]


@app.command("list")
def list_backends(*, as_json: AsJson = False) -> None:
    """List the engines that can be installed, and why one cannot be used."""
    with console.answering(as_json=as_json):
        from sdfleet.backends.guests.venv import GUESTS, GuestVenv

        settings = console.start()
        venvs = [GuestVenv(settings.home, guest) for guest in GUESTS]
        if as_json:
            console.say_json({"backends": [_facts(venv) for venv in venvs]})
            return
        for venv in venvs:
            console.say(f"{venv.guest:<14} {venv.pins.version:<8} {venv.reason() or 'installed'}")


@app.command("install")
def install(*, name: Name, yes: Yes = False, as_json: AsJson = False) -> None:
    """Make a virtual environment with an engine in it, after showing what comes and a yes."""
    with console.answering(as_json=as_json):
        from sdfleet.backends.guests.venv import GuestVenv, guest_of, why_not_here
        from sdfleet.errors import BackendUnavailable

        settings = console.start()
        venv = GuestVenv(settings.home, guest_of(name))
        if why := why_not_here():
            raise BackendUnavailable(venv.guest, why)
        if venv.reason():
            if not as_json:
                _show(venv.pins)
                console.say(f"  into {venv.folder}")
            if not yes:
                question = f"install {len(venv.pins.packages)} packages?"
                pulling.ask(question, otherwise=f"sdfleet backend install {venv.guest} --yes")
        venv.install(venv.consent(), say=console.note)
        console.say_json(_facts(venv)) if as_json else console.say(f"{venv.guest} is installed in {venv.folder}")


@app.command("remove")
def remove(*, name: Name, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete an engine's virtual environment. Models stay."""
    with console.answering(as_json=as_json):
        from sdfleet.backends.guests.venv import GuestVenv, guest_of

        settings = console.start()
        venv = GuestVenv(settings.home, guest_of(name))
        n_bytes = 0
        if venv.is_here:
            if not yes:
                pulling.ask(f"delete {venv.folder}?", otherwise=f"sdfleet backend remove {venv.guest} --yes")
            n_bytes = venv.remove()
        if as_json:
            console.say_json({"name": venv.guest, "n_freed_bytes": n_bytes})
            return
        console.say(f"removed {venv.guest}: {pulling.size(n_bytes)} freed" if n_bytes else f"{venv.guest} is not here")


def _show(pins: Pins) -> None:
    console.say(f"{pins.title} {pins.version}: {pins.about}")
    console.say(f"  {pins.homepage}")
    for package in pins.packages:
        size = pulling.size(package.n_bytes) if package.n_bytes else "?"
        console.say(f"  {package.name:<20} {package.version:<12} {size:>9}  {package.licence}")
    console.say(f"  {pulling.size(pins.n_bytes)} or a little more on disk; no model is among it")


def _facts(venv: Any) -> dict[str, Any]:
    pins = venv.pins
    return {
        "name": venv.guest,
        "title": pins.title,
        "version": pins.version,
        "is_installed": not venv.reason(),
        "reason": venv.reason(),
        "folder": str(venv.folder),
        "n_bytes": pins.n_bytes,
        "packages": [
            {"name": package.name, "version": package.version, "licence": package.licence} for package in pins.packages
        ],
    }
