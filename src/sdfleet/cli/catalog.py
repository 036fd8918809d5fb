"""`sdfleet models`: which checkpoints are here, and making a folder known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdfleet.cli import console, memory, pulling

if TYPE_CHECKING:
    from sdfleet.catalog.identify import Identified
    from sdfleet.catalog.store import Entry

app = typer.Typer(no_args_is_help=True, help="List, pull, import, check and remove models.")

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]


@app.command("list")
def list_models(*, as_json: AsJson = False) -> None:
    """List the models of this machine, and on stderr those that can be pulled."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.catalog.adapters import FOLDERS
        from sdfleet.cli.adapters import facts_of, line_of

        catalog = compose.catalog(console.start())
        entries, absent = catalog.entries(), catalog.absent()
        if as_json:
            absent_names = [card.name for card in absent]
            adapters = {FOLDERS[kind]: [facts_of(one) for one in catalog.adapters.all(kind)] for kind in FOLDERS}
            models = [_facts(entry) for entry in entries]
            console.say_json({"models": models, **adapters, "can_be_pulled": absent_names})
            return
        for entry in entries:
            card = entry.card
            where = "built in" if entry.is_built_in else str(entry.folder)
            if is_elsewhere := card.backend is not None:
                where = f"drawn by {card.backend}"
            missing = "" if is_elsewhere or entry.folder.is_dir() else "  (folder is missing)"
            console.say(f"{card.name:<20} {card.family:<6} {card.width_px}x{card.height_px:<5} {where}{missing}")
        for kind in FOLDERS:
            for adapter in catalog.adapters.all(kind):
                console.say(line_of(adapter))
        if absent:
            names = ", ".join(card.name for card in absent)
            console.note(f"can be pulled: {names}; see `sdfleet models plan NAME`")


@app.command("import")
def import_model(
    *,
    path: Annotated[
        Path,
        typer.Argument(help="Folder in the diffusers layout, or one .safetensors or .gguf file.", show_default=False),
    ],
    name: Annotated[
        str | None, typer.Option(help="What to call it here: a-z 0-9 . _ -; its own name if left out.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Model or diffusers folder that has what a single file lacks.", metavar="NAME_OR_FOLDER"),
    ] = None,
    prediction: Annotated[
        Literal["epsilon", "v"] | None,
        typer.Option(help="What a single file's UNet predicts, where the file does not say."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a folder or file of weights known under a name. It stays where it is; a LoRA or an embedding is copied."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.cli.adapters import said_of_import

        settings = console.start()
        adapter = None if base or prediction else compose.import_adapter(settings, path, name=name)
        if adapter is not None:
            said_of_import(adapter, as_json=as_json)
            return
        entry, notes = compose.import_checkpoint(settings, path, name=name, base=base, prediction=prediction)
        if as_json:
            found = compose.catalog(settings).inspect(entry)
            console.say_json({**_facts(entry, found), "notes": list(notes)})
            return
        card = entry.card
        console.say(f"imported {card.name}: {card.family}, {card.width_px}x{card.height_px}, {entry.folder}")
        for note in notes:
            console.say(f"  {note}")


@app.command("show")
def show_model(
    *,
    name: Annotated[str, typer.Argument(help="Name or alias of a model, a LoRA or an embedding.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Tell what a model is, and check its files if it is here."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.cli.adapters import named, show

        catalog = compose.catalog(console.start())
        adapter = named(catalog, name)
        if adapter is not None:
            show(adapter, as_json=as_json)
            return
        card = catalog.card(name)
        if card in catalog.absent():
            facts: dict[str, Any] = card.model_dump(mode="json", exclude_none=True)
            facts |= {"is_here": False, "pull": f"sdfleet models pull {card.name}"}
        else:
            entry = catalog.resolve(name)
            facts = _facts(entry, catalog.inspect(entry))
        if as_json:
            console.say_json(facts)
            return
        components = facts.pop("components", [])
        for key, value in facts.items():
            if value in ("", [], False):
                continue
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            console.say(f"{key.removesuffix('_px')}: {shown}")
        for part in components:
            sizes = ", ".join(f"{dtype} {_mib(n_bytes)}" for dtype, n_bytes in part["bytes_by_dtype"].items())
            console.say(f"  {part['name']:<16} {part['class_name']:<34} {sizes}")


app.command("plan")(pulling.plan)
app.command("pull")(pulling.pull)
app.command("rm")(pulling.remove)
app.command("verify")(pulling.verify)
app.command("du")(pulling.usage)
app.command("load")(memory.load)
app.command("unload")(memory.unload)
app.command("pin")(memory.pin)
app.command("unpin")(memory.unpin)
app.command("ps")(memory.in_memory)


def _facts(entry: Entry, found: Identified | None = None) -> dict[str, Any]:
    card = entry.card.model_dump(mode="json", exclude_none=True, exclude={"folder"})
    facts: dict[str, Any] = {**card, "folder": str(entry.folder), "is_built_in": entry.is_built_in}
    if found is not None:
        facts["pipeline_class"] = found.pipeline_class
        facts["n_bytes"] = found.n_bytes
        facts["components"] = [
            {
                "name": part.name,
                "class_name": part.class_name,
                "n_parameters": part.n_parameters,
                "bytes_by_dtype": dict(part.bytes_by_dtype),
            }
            for part in found.components
        ]
    return facts


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
