"""The `sdfleet` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sdfleet import __version__
from sdfleet.cli import (
    backend,
    bench,
    catalog,
    doctor,
    fleet,
    generate,
    jobs,
    keys,
    node,
    outputs,
    router,
    serve,
    train,
)

app = typer.Typer(
    name="sdfleet",
    help="Stable Diffusion on your own machines.",
    no_args_is_help=True,
    # Tracebacks are kept in a file by cli/console.py; markup in help costs the import of rich.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("show")(generate.show)
app.command("serve")(serve.serve)
app.command("router")(router.router)
app.command("node")(node.node)
app.add_typer(fleet.app, name="fleet")
app.add_typer(catalog.app, name="models")
app.add_typer(backend.app, name="backend")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.add_typer(outputs.app, name="outputs")
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(train.app, name="train")


def herd() -> None:
    """What the `herd` script runs: `sdfleet router`, as users of Ollama Herd call it."""
    sys.argv.insert(1, "router")
    main()


def herd_node() -> None:
    """What the `herd-node` script runs: `sdfleet node`."""
    sys.argv.insert(1, "node")
    main()


def main() -> None:
    """What the `sdfleet` script runs."""
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold bytes that are no text; better to show them escaped than not to answer.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="sdfleet")


def _show_version(asked: bool) -> None:  # noqa: FBT001 - typer calls it with the flag
    if asked:
        typer.echo(f"sdfleet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass
