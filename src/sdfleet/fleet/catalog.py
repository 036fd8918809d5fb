"""The models of a fleet: what its nodes have on their disks, looked up as those of one machine are.

No folder of a node is ever known here. Entries have a made-up one, whose last part is the model's name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from sdfleet.catalog.adapter_header import AdapterFacts, Kind
from sdfleet.catalog.adapters import TITLES, Adapter, Adapters
from sdfleet.catalog.cards import Card, Family
from sdfleet.catalog.component import Component
from sdfleet.catalog.family_titles import FAMILY_TITLES
from sdfleet.catalog.identify import Identified
from sdfleet.catalog.store import Catalog, Entry
from sdfleet.domain import AdapterFile
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, NotReady, UnknownName
from sdfleet.fleet.messages import AdapterHere, ModelHere
from sdfleet.plain import Misfit, from_plain

log = logging.getLogger(__name__)

FLEET = Path("fleet")


class FleetAdapters(Adapters):
    """LoRAs and embeddings of the nodes. What their files hold, and which embedding a prompt names, these decide."""

    def __init__(self, models_folder: Path, here: Callable[[], Mapping[tuple[str, str], AdapterHere]]) -> None:
        super().__init__(models_folder)
        self._here = here

    def all(self, kind: Kind) -> tuple[Adapter, ...]:
        """Every one that a node has, by name."""
        found = [_adapter(one) for (its_kind, _), one in self._here().items() if its_kind == kind]
        return tuple(sorted(found, key=lambda adapter: adapter.name.casefold()))

    def find(self, kind: Kind, name: str) -> Adapter:
        """The one of this name, whatever its case, or of this alias. Raises UnknownName."""
        known = self.all(kind)
        same = [one for one in known if one.name == name]
        alike = [one for one in known if one.name.casefold() == name.casefold()]
        for one in (*same, *alike, *(one for one in known if one.alias == name)):
            return one
        raise UnknownName(TITLES[kind], name, (one.name for one in known))

    def used(self, adapter: Adapter) -> AdapterFile:
        """It, by its name; the node that draws fills in what it holds."""
        return AdapterFile(name=adapter.name, path="", content="")

    def words(self) -> dict[str, Adapter]:
        """None: prompts are read at the node."""
        return {}


class FleetCatalog(Catalog):
    """models: what can be drawn somewhere now; adapters: with which LoRAs.

    The rest (cards of what could be pulled) is as on one machine.
    """

    def __init__(
        self,
        models_folder: Path,
        *,
        models: Callable[[], Mapping[str, ModelHere]],
        adapters: Callable[[], Mapping[tuple[str, str], AdapterHere]] = dict,
        gathers: Callable[[], bool] = lambda: False,
    ) -> None:
        """gathers: whether nodes that belong to the fleet have not been heard yet; what they have is not known then."""
        super().__init__(models_folder)
        self.adapters = FleetAdapters(models_folder, adapters)
        self._models = models
        self._gathers = gathers

    def entries(self) -> tuple[Entry, ...]:
        """Every model that a node which is here can draw with, by name."""
        found = [entry for _, model in sorted(self._models().items()) if (entry := _entry(model)) is not None]
        return tuple(found)

    def resolve(self, name: str, *, backend: str | None = None) -> Entry:
        """The model that answers to this name. Raises CheckpointNotFound (no node has it), UnknownName, NotReady."""
        models = self._models()
        entries = self.entries()
        found = next((entry for entry in entries if entry.card.name == name), None) or next(
            (entry for entry in entries if entry.card.answers_to(name)), None
        )
        if found is not None:
            return found
        if self._gathers():
            # A client that is told 404 does not come back.
            raise NotReady("the router was started just now and has not heard its nodes yet", retry_after_s=2.0)
        try:
            card = super().card(name)
        except UnknownName as exc:
            raise UnknownName("model", name, models.keys()) from exc
        raise CheckpointNotFound(
            f"{card.name} is on no node that is here", hint=f"get it on one: sdfleet fleet pull NODE {card.name}"
        )

    def inspect(self, entry: Entry) -> Identified:
        """What the node's own catalog found. Raises CheckpointNotFound where the last node that had it has left."""
        model = self._models().get(entry.card.name)
        if model is None:
            raise CheckpointNotFound(f"{entry.card.name} is on no node that is here", hint="wait for its node")
        return found_of(model, entry.folder)


def announced(entry: Entry, found: Identified, *, identity: str) -> ModelHere:
    """What a node tells of a model on its disk: everything but folders."""
    card = entry.card.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    card.pop("folder", None)
    return ModelHere(name=entry.card.name, identity=identity, n_bytes=found.n_bytes, card=card, found=_facts(found))


def _facts(found: Identified) -> dict[str, Any]:
    return {
        "family": found.family,
        "pipeline_class": found.pipeline_class,
        "components": [
            {
                "name": part.name,
                "class_name": part.class_name,
                "bytes_by_dtype": dict(part.bytes_by_dtype),
                "n_parameters": part.n_parameters,
            }
            for part in found.components
        ],
        "width_px": found.width_px,
        "height_px": found.height_px,
        "steps": found.steps,
        "guidance": found.guidance,
        "sampler": found.sampler,
        "t5": found.t5,
        "ignores": list(found.ignores),
        "strength": found.strength,
    }


def found_of(model: ModelHere, folder: Path) -> Identified:
    """The inverse of what `announced` tells. Raises BrokenCheckpoint for what is not so."""
    facts = dict(model.found)
    try:
        parts = cast("list[dict[str, Any]]", facts.pop("components"))
        components = tuple(
            Component(
                name=str(part["name"]),
                class_name=str(part["class_name"]),
                config={},
                bytes_by_dtype={str(k): int(v) for k, v in part["bytes_by_dtype"].items()},
                n_parameters=int(part["n_parameters"]),
            )
            for part in parts
        )
        t5 = cast("Literal['here', 'left_out', 'never_had']", from_plain(_T5, facts.pop("t5"), [], where="t5"))
        ignores = tuple(cast("list[Any]", facts.pop("ignores")))
        return Identified(folder=folder, components=components, t5=t5, ignores=ignores, **cast("dict[str, Any]", facts))
    except (KeyError, TypeError, ValueError, AttributeError, Misfit) as exc:
        raise BrokenCheckpoint(f"a node announced {model.name} in a way that makes no sense: {exc}") from exc


def _adapter(here: AdapterHere) -> Adapter:
    family = here.family if here.family in FAMILY_TITLES else None
    facts = AdapterFacts(
        kind=here.kind, family=cast("Family | None", family), widths=here.widths, n_vectors=here.n_vectors,
        word=here.word,
    )  # fmt: skip
    return Adapter(name=here.name, path=FLEET / here.name, n_bytes=here.n_bytes, facts=facts, metadata=here.metadata)


_T5 = Literal["here", "left_out", "never_had"]


def _entry(model: ModelHere) -> Entry | None:
    try:
        card = Card.model_validate(dict(model.card))
    except ValidationError as exc:
        log.warning("a node's card cannot be read", extra={"model": model.name, "why": str(exc)[:200]})
        return None
    return Entry(card=card, folder=FLEET / model.name, is_built_in=False)
