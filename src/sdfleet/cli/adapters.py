"""What `sdfleet models` says of LoRAs and embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.catalog.adapters import Adapter
    from sdfleet.catalog.store import Catalog


def named(catalog: Catalog, name: str) -> Adapter | None:
    """The LoRA or embedding of this name; None where a model has it or nothing does. Raises a file's own fault."""
    from sdfleet.errors import CheckpointError, UnknownName

    try:
        catalog.card(name)
    except (UnknownName, CheckpointError):
        pass
    else:
        return None
    for kind in ("lora", "embedding"):
        try:
            return catalog.adapters.find(kind, name)
        except UnknownName:
            continue
    return None


def line_of(adapter: Adapter) -> str:
    """A line of the list: name, for which family, what it is."""
    return f"{adapter.name:<20} {adapter.facts.family or '':<6} {adapter.facts.kind:<9} {adapter.path}"


def facts_of(adapter: Adapter) -> dict[str, Any]:
    """What is known of it, for JSON."""
    facts = adapter.facts
    told: dict[str, Any] = {
        "name": adapter.name, "kind": facts.kind, "family": facts.family, "path": str(adapter.path),
        "n_bytes": adapter.n_bytes, "alias": adapter.alias,
    }  # fmt: skip
    if facts.kind == "lora":
        return told | {
            "layout": facts.layout, "n_layers": facts.n_layers, "rank": facts.rank, "is_for_text": facts.is_for_text
        }  # fmt: skip
    return told | {"n_vectors": facts.n_vectors, "widths": dict(facts.widths or {}), "word": facts.word}


def show(adapter: Adapter, *, as_json: bool) -> None:
    """Tell all of it."""
    if as_json:
        console.say_json(facts_of(adapter))
        return
    for key, value in facts_of(adapter).items():
        if value not in (None, "", False):
            shown = (
                ", ".join(f"{k or 'any encoder'} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            )
            console.say(f"{key}: {shown}")
    console.say(f"use: {_use(adapter)}")


def said_of_import(adapter: Adapter, *, as_json: bool) -> None:
    """Tell what an import has made of a file."""
    if as_json:
        console.say_json(facts_of(adapter))
        return
    console.say(
        f"imported {adapter.name}: {adapter.facts.kind}, {adapter.facts.family or 'any family'}, {adapter.path}"
    )
    console.say(f"  {_use(adapter)}")


def _use(adapter: Adapter) -> str:
    if adapter.facts.kind == "lora":
        return f"--lora {adapter.name}:0.8, or <lora:{adapter.name}:0.8> in a prompt"
    return f"write {adapter.facts.word or adapter.name} in a prompt"
