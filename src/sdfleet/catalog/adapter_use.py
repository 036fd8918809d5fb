"""Which files a request's LoRAs and embeddings are, and whether they are for its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdfleet.catalog.adapters import Adapter, Adapters, pattern_of
from sdfleet.catalog.cards import Card
from sdfleet.catalog.family_titles import FAMILY_TITLES
from sdfleet.catalog.identify import Identified
from sdfleet.domain import AdapterFile, Lora, LoraUse
from sdfleet.errors import UnsupportedByModel

# The families whose prompts go through CLIP alone, for which embeddings are made.
_TAKE_EMBEDDINGS = ("sd", "sdxl")


def find_loras(
    adapters: Adapters, uses: Sequence[LoraUse], card: Card, *, warnings: list[str]
) -> tuple[tuple[Lora, ...], tuple[LoraUse, ...]]:
    """The files to draw with, and the same uses with names and contents filled in.

    Raises UnknownName, UnsupportedByModel (of another family, or no LoRA), BrokenCheckpoint and PickleRefused.
    """
    if uses and card.backend is not None:
        raise UnsupportedByModel(f"{card.name} is drawn by {card.backend}, which takes no LoRAs", hint="leave them out")
    found: list[Lora] = []
    filled: list[LoraUse] = []
    for use in uses:
        adapter = adapters.find("lora", use.name)
        family = adapter.facts.family
        if family is not None and family != card.family:
            raise UnsupportedByModel(
                f"the LoRA {adapter.name!r} is for {FAMILY_TITLES[family]}, the checkpoint {card.name} is "
                f"{FAMILY_TITLES[card.family]}",
                hint=f"draw with a checkpoint of {FAMILY_TITLES[family]}, or leave the LoRA out",
            )
        file = adapters.used(adapter)
        if use.content not in {None, file.content}:
            warnings.append(f"the LoRA {adapter.name!r} holds something else now than when this was asked for")
        filled.append(replace(use, name=adapter.name, content=file.content))
        text_scale = use.scale if use.text_scale is None else use.text_scale
        if use.scale or text_scale:
            found.append(Lora(file=file, scale=use.scale, text_scale=text_scale))
    return tuple(found), tuple(filled)


def find_embeddings(
    adapters: Adapters, texts: Sequence[str], found: Identified, *, warnings: list[str]
) -> tuple[AdapterFile, ...]:
    """The embeddings that the texts name and the checkpoint can read; of others it is told that they are words."""
    known = adapters.words()
    pattern = pattern_of(known)
    named = {} if pattern is None else {match.casefold(): None for text in texts for match in pattern.findall(text)}
    used = []
    for word in named:
        adapter = known[word]
        if fits(adapter, found):
            used.append(replace(adapters.used(adapter), name=word))
        else:
            warnings.append(
                f"the embedding {adapter.name!r} is {_said(adapter)} and not for this checkpoint: it is read as words"
            )
    return tuple(used)


def fits(adapter: Adapter, found: Identified) -> bool:
    """Whether the checkpoint's text encoders are as wide as the embedding's vectors."""
    encoders = {part.name: part.config.get("hidden_size") for part in found.components}
    first, second = encoders.get("text_encoder"), encoders.get("text_encoder_2")
    if found.family not in _TAKE_EMBEDDINGS or first is None:
        return False
    wanted = {"": first} if found.family == "sd" else {"clip_l": first, "clip_g": second}
    return dict(adapter.facts.widths or {}) == wanted


def _said(adapter: Adapter) -> str:
    if adapter.facts.family is not None:
        return f"for {FAMILY_TITLES[adapter.facts.family]}"
    return f"{' and '.join(map(str, (adapter.facts.widths or {}).values()))} wide"
