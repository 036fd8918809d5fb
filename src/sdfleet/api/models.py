"""`/api/models`: which models are here and in memory, and having them come, go and stay."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import house_of
from sdfleet.api.native import DIALECT, FAULTS
from sdfleet.catalog.cards import Card
from sdfleet.catalog.family_titles import FAMILY_TITLES
from sdfleet.compose import House
from sdfleet.residents import Resident

__all__ = ["DIALECT", "router"]

router = APIRouter(prefix="/api/models", tags=["native"], responses=FAULTS)


class ModelAnswer(BaseModel):
    """A model of this machine. size_bytes: of its weights in memory. expires_at: null while it stays by itself.

    backend: the only one that draws it; null where whichever can read the weights does.
    """

    model_config = ConfigDict(protected_namespaces=())

    name: str
    family: str
    backend: str | None
    loaded: bool
    pinned: bool
    size_bytes: int
    jobs: int
    expires_at: str | None


class CardAnswer(BaseModel):
    """What is known of a model before any weight is read; what a request leaves open is taken from here.

    multiple: what sides must be a multiple of. min_side, max_side: sides it draws well; where `resizes`, others are
    drawn near and resized. ignores: what has no effect on its pictures. backend: the only one that draws it, if so.
    """

    name: str
    title: str
    family: str
    family_title: str
    licence: str | None
    licence_url: str | None
    gated: bool
    repository: str | None
    width: int
    height: int
    area: int
    multiple: int
    min_side: int | None
    max_side: int | None
    resizes: bool
    steps: int
    guidance: float
    sampler: str
    strength: float | None
    ignores: list[str]
    backend: str | None


class ChoiceAnswer(BaseModel):
    """Models by their cards. default: what is meant where a request names none.

    here: those that draw on this server; absent: those that could be pulled, see `/api/pull`.
    """

    default: str
    here: list[CardAnswer]
    absent: list[CardAnswer]


class ModelsAnswer(BaseModel):
    """All models of this machine, those in memory first."""

    models: list[ModelAnswer]


@router.get("")
async def models(request: Request) -> ModelsAnswer:
    """The models of this machine, and how each stands."""
    check_right(caller_of(request), "read")
    answers = await _answers(house_of(request))
    return ModelsAnswer(models=sorted(answers, key=lambda answer: (not answer.loaded, answer.name)))


@router.get("/cards")
async def cards(request: Request) -> ChoiceAnswer:
    """What can be drawn with, and what could be after a download."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    return ChoiceAnswer(
        default=house.settings.model,
        here=[_card(entry.card) for entry in await asyncio.to_thread(house.catalog.entries)],
        absent=[_card(card) for card in await asyncio.to_thread(house.catalog.absent)],
    )


@router.post("/{name:path}/load", dependencies=[needs("manage")])
async def load(request: Request, name: str) -> ModelAnswer:
    """Have a model in memory before somebody asks for a picture."""
    house = house_of(request)
    await house.runtime.load(name)
    return await _answer(house, name)


@router.post("/{name:path}/unload", dependencies=[needs("manage")])
async def unload(request: Request, name: str) -> ModelAnswer:
    """Let a model leave the memory, pinned or not. 409 while a job draws with it."""
    house = house_of(request)
    await house.runtime.unload(name)
    return await _answer(house, name)


@router.post("/{name:path}/pin", dependencies=[needs("manage")])
async def pin(request: Request, name: str) -> ModelAnswer:
    """Have a model in memory, and let nothing push it out. 507 with the numbers where too much is pinned."""
    house = house_of(request)
    await house.runtime.load(name, is_pinned=True)
    return await _answer(house, name)


@router.post("/{name:path}/unpin", dependencies=[needs("manage")])
async def unpin(request: Request, name: str) -> ModelAnswer:
    """Let a pinned model leave again, when it is idle for long or another one needs the room."""
    house = house_of(request)
    await house.runtime.unpin(name)
    return await _answer(house, name)


def _card(card: Card) -> CardAnswer:
    return CardAnswer(
        name=card.name,
        title=card.title or card.name,
        family=card.family,
        family_title=FAMILY_TITLES[card.family],
        licence=card.licence,
        licence_url=card.licence_url,
        gated=card.is_gated,
        repository=card.hf or card.modelscope,
        width=card.width_px,
        height=card.height_px,
        area=card.area_px,
        # As Identified.side_multiple_px, which would read the files.
        multiple=card.side_multiple_px or (8 if card.family in {"sd", "sdxl"} else 16),
        min_side=card.min_side_px,
        max_side=card.max_side_px,
        resizes=card.resizes,
        steps=card.steps,
        guidance=card.guidance,
        sampler=card.sampler,
        strength=card.strength,
        ignores=list(card.ignores),
        backend=card.backend,
    )


async def _answer(house: House, name: str) -> ModelAnswer:
    card = (await asyncio.to_thread(house.catalog.resolve, name)).card
    return next(answer for answer in await _answers(house) if answer.name == card.name)


async def _answers(house: House) -> list[ModelAnswer]:
    entries = await asyncio.to_thread(house.catalog.entries)
    here = {resident.checkpoint: resident for resident in house.runtime.residents.here()}
    answers = []
    for entry in entries:
        resident = here.get(str(entry.folder))
        answers.append(
            ModelAnswer(
                name=entry.card.name,
                family=entry.card.family,
                backend=entry.card.backend,
                loaded=resident is not None,
                pinned=resident is not None and resident.is_pinned,
                size_bytes=0 if resident is None else resident.n_bytes,
                jobs=0 if resident is None else resident.n_jobs,
                expires_at=None if resident is None else expires_at(resident),
            )
        )
    return answers


def expires_at(resident: Resident) -> str | None:
    """When it leaves, in RFC 3339; None while it is used, and where it stays by itself."""
    if resident.expires_s is None:
        return None
    return datetime.fromtimestamp(resident.expires_s, UTC).isoformat().replace("+00:00", "Z")
