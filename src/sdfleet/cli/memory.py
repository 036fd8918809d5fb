"""`sdfleet models load|unload|pin|unpin|ps`: what the running server has in memory."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from sdfleet.cli import console, serving
from sdfleet.cli.pulling import size

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]
Model = Annotated[str, typer.Argument(metavar="NAME", help="Name or alias of a model.", show_default=False)]


def load(*, name: Model, as_json: AsJson = False) -> None:
    """Have the running server load a model before somebody asks for a picture."""
    _do("load", name, as_json=as_json)


def unload(*, name: Model, as_json: AsJson = False) -> None:
    """Let a model leave the running server's memory, pinned or not; refused while a job draws with it."""
    _do("unload", name, as_json=as_json)


def pin(*, name: Model, as_json: AsJson = False) -> None:
    """Load a model into the running server and keep it there, whatever else is asked for."""
    _do("pin", name, as_json=as_json)


def unpin(*, name: Model, as_json: AsJson = False) -> None:
    """Let a pinned model leave again, when it is idle for long or another one needs the room."""
    _do("unpin", name, as_json=as_json)


def in_memory(*, as_json: AsJson = False) -> None:
    """List the models in the running server's memory, and when each leaves."""
    with console.answering(as_json=as_json):
        answer = serving.must_ask(console.start(), "GET", "/api/models")
        loaded = [model for model in answer["models"] if model["loaded"]]
        if as_json:
            console.say_json({"models": loaded})
            return
        for model in loaded:
            console.say(f"{model['name']:<20} {model['family']:<7} {size(model['size_bytes']):>10}  {_stay(model)}")


def _do(verb: str, name: str, *, as_json: bool) -> None:
    with console.answering(as_json=as_json):
        model = serving.must_ask(console.start(), "POST", f"/api/models/{quote(name)}/{verb}")
        if as_json:
            console.say_json(model)
        elif model["loaded"]:
            console.say(f"{model['name']} is in memory: {size(model['size_bytes'])}, {_stay(model)}")
        else:
            console.say(f"{model['name']} is not in memory")


def _stay(model: dict[str, Any]) -> str:
    if model["jobs"]:
        return f"draws {model['jobs']} job{'' if model['jobs'] == 1 else 's'}"
    if model["pinned"]:
        return "pinned"
    return "stays" if model["expires_at"] is None else f"leaves at {model['expires_at'][:19]}Z if nobody uses it"
