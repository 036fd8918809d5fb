"""`sdfleet train`: the recipes that make weights."""

from __future__ import annotations

import typer

from sdfleet.cli import console

app = typer.Typer(no_args_is_help=True, help="Train weights.")


@app.command(
    "starter",
    # Its options are the recipe's own, and so is its help.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def starter(ctx: typer.Context) -> None:
    """Train the built-in model from nothing; `--help` lists its options."""
    with console.answering():
        console.start()
        from sdfleet.train.starter import main

        main(list(ctx.args))
