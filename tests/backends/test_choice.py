"""Which backend draws a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdfleet.backends.absent import AbsentBackend
from sdfleet.backends.base import Backend, Capabilities
from sdfleet.backends.choice import Backends, Choice, Way, cards_of
from sdfleet.backends.fake import FakeBackend
from sdfleet.catalog.cards import Card
from sdfleet.catalog.store import BuiltIn, Catalog
from sdfleet.domain import ImageRequest
from sdfleet.errors import (
    BackendNotNamed,
    BackendUnavailable,
    CheckpointNotFound,
    InvalidValue,
    UnknownName,
    UnsupportedByModel,
)
from tests.backends.drawings import drawing

SIZES: dict[str, Any] = {"width_px": 64, "height_px": 64, "steps": 2, "guidance": 1.0, "sampler": "euler"}
HERE = Card(name="here", family="sd", **SIZES)
FLUX = Card(name="flux", family="flux", aliases=("x/flux",), **SIZES)
AWAY = Card(name="flux-away", family="flux", hf="Maker/Flux", **SIZES)
PRO = Card(name="pro", family="other", backend="flux-api", **SIZES)
SAME = Card(name="flux-away", family="other", backend="flux-api", **SIZES)
OWN_LAYOUT = Card(name="sd3-mlx", family="other", backend="diffusionkit", folder="/models/sd3", **SIZES)


class Stands:
    """A house's backends and catalog, with one of each kind beside our own engine."""

    def __init__(self, folder: Path, *, default: str | None = None, **changed: Any) -> None:
        self.own = FakeBackend()
        self.refuses: set[str] = set()
        self.leaves_out: set[str] = set()
        given: dict[str, dict[str, Any]] = {
            "flux-api": {"cards": lambda: (PRO, SAME), "service": "api.example", "is_ours": False},
            "mflux": {"families": ("flux",)},
            "diffusionkit": {"families": ("sd3",), "cards": lambda: (OWN_LAYOUT,)},
            "ollama": {"cards": lambda: (Card(name="flux", family="other", backend="ollama", **SIZES),), "rank": 30},
        }
        self.ways = tuple(
            self._way(name, **(facts | changed.get(name.replace("-", "_"), {}))) for name, facts in given.items()
        )
        self.backends = Backends(self.own, self.ways, default=default)
        self.catalog = Catalog(
            folder,
            built_in=tuple(BuiltIn(card, lambda: folder) for card in (HERE, FLUX)),
            published_cards=(AWAY,),
            elsewhere=lambda: cards_of(self.ways),
        )

    def _way(self, name: str, **facts: Any) -> Way:
        def check(card: Card, _request: ImageRequest) -> tuple[str, ...]:
            if name in self.refuses:
                raise UnsupportedByModel(f"{name} does not draw {card.name}")
            return (f"{name} leaves something out",) if name in self.leaves_out else ()

        given: dict[str, Any] = {"backend": FakeBackend(name=name), "reason": lambda: "", "check": check}
        return Way(id=name, **(given | facts))

    def choose(self, model: str, backend: str | None = None) -> Choice:
        return self.backends.choose(ImageRequest(prompt="x", model=model, backend=backend), self.catalog)

    def warm(self, name: str, model: str) -> None:
        """Let a backend have a model in memory."""
        backend: Backend = self.own if name == "own" else next(way.backend for way in self.ways if way.id == name)
        folder = str(self.catalog.resolve(model).folder)
        asyncio.run(backend.load(drawing(checkpoint=folder)))


@pytest.fixture
def stands(tmp_path: Path) -> Stands:
    return Stands(tmp_path)


@pytest.mark.parametrize(
    ("model", "named", "chosen"),
    [
        ("here", None, "sd"),
        ("here", "auto", "sd"),
        ("here", "local", "sd"),
        ("here", "sd", "sd"),
        ("here", "fake", "fake"),
        ("flux", None, "flux-local"),
        ("x/flux", "flux-local", "flux-local"),
        ("flux", "mflux", "mflux"),
        ("flux", "ollama", "ollama"),
        ("pro", "flux-api", "flux-api"),
        ("flux-away", "flux-api", "flux-api"),
        ("sd3-mlx", None, "diffusionkit"),
        ("sd3-mlx", "diffusionkit", "diffusionkit"),
    ],
)
def test_a_named_backend_draws_and_otherwise_one_that_can(
    stands: Stands, model: str, named: str | None, chosen: str
) -> None:
    assert stands.choose(model, named).backend == chosen


def test_what_is_in_memory_goes_before_and_then_the_rank_decides(tmp_path: Path) -> None:
    stands = Stands(tmp_path)
    stands.warm("mflux", "flux")
    assert stands.choose("flux").backend == "mflux"
    stands.warm("own", "flux")
    assert stands.choose("flux").backend == "flux-local"
    preferred = Stands(tmp_path, mflux={"rank": 5})
    assert preferred.choose("flux").backend == "mflux"
    preferred.warm("own", "flux")
    assert preferred.choose("flux").backend == "flux-local"


def test_one_that_would_leave_something_out_draws_only_where_it_is_named(tmp_path: Path) -> None:
    stands = Stands(tmp_path, mflux={"rank": 5})
    stands.leaves_out.add("mflux")
    assert stands.choose("flux").backend == "flux-local"
    assert stands.choose("flux", "mflux").warnings == ("mflux leaves something out",)


def test_one_that_cannot_or_is_not_here_is_passed_over_and_says_why_when_it_is_named(tmp_path: Path) -> None:
    stands = Stands(tmp_path, mflux={"rank": 5})
    stands.refuses.add("mflux")
    assert stands.choose("flux").backend == "flux-local"
    with pytest.raises(UnsupportedByModel, match="mflux does not draw flux"):
        stands.choose("flux", "mflux")
    gone = Stands(tmp_path, mflux={"rank": 5, "reason": lambda: "not installed: sdfleet backend install mflux"})
    assert gone.choose("flux").backend == "flux-local"
    with pytest.raises(BackendUnavailable, match="mflux cannot be used: not installed: sdfleet backend install mflux"):
        gone.choose("flux", "mflux")


def test_a_prompt_leaves_this_machine_only_when_somebody_has_said_so(tmp_path: Path) -> None:
    stands = Stands(tmp_path)
    with pytest.raises(BackendNotNamed, match=r"drawn by api\.example.*name the backend 'flux-api'"):
        stands.choose("pro")
    with pytest.raises(CheckpointNotFound, match=r"models pull flux-away.*'flux-api'"):
        stands.choose("flux-away")
    assert stands.choose("pro", "flux-api").service == "api.example"
    by_default = Stands(tmp_path, default="flux-api")
    assert by_default.choose("pro").service == "api.example"
    assert by_default.choose("here").backend == "sd", "what it does not have is drawn here"
    stands.own._is_closed = True
    assert stands.choose("here").backend == "sd", "a fault of ours is no word to send it elsewhere"


def test_of_two_that_have_a_model_the_one_that_keeps_the_prompt_here_is_meant(tmp_path: Path) -> None:
    both = Card(name="both", family="other", backend="ollama", **SIZES)
    at_a_service = both.model_copy(update={"backend": "flux-api"})
    stands = Stands(tmp_path, flux_api={"cards": lambda: (at_a_service,)}, ollama={"cards": lambda: (both,)})
    assert stands.choose("both").backend == "ollama"
    assert stands.choose("both", "flux-api").backend == "flux-api"


def test_the_default_is_preferred_and_another_draws_what_it_cannot(tmp_path: Path) -> None:
    stands = Stands(tmp_path, default="mflux")
    assert stands.choose("flux").backend == "mflux"
    assert stands.choose("here").backend == "sd"
    stands.refuses.add("mflux")
    assert stands.choose("flux").backend == "flux-local"
    assert Stands(tmp_path, default="flux-local").choose("here").backend == "sd"


def test_a_default_that_is_not_set_up_is_told_and_nothing_else_draws_its_models(tmp_path: Path) -> None:
    away = {"reason": lambda: "no key", "cards": tuple}
    stands = Stands(tmp_path, default="flux-api", flux_api=away)
    with pytest.raises(BackendUnavailable, match="no key"):
        stands.choose("pro")
    assert stands.choose("here").backend == "sd"


def test_models_of_others_are_listed_behind_those_that_are_here_and_never_twice(stands: Stands) -> None:
    assert [entry.card.name for entry in stands.catalog.entries()] == ["here", "flux", "sd3-mlx", "pro", "flux-away"]
    assert stands.catalog.resolve("flux").card.backend is None
    assert stands.catalog.resolve("flux", backend="ollama").card.backend == "ollama"
    assert str(stands.catalog.resolve("sd3-mlx").folder) == "/models/sd3"
    assert [card.name for card in stands.catalog.absent()] == ["flux-away"]


@pytest.mark.parametrize(
    ("model", "named", "error"),
    [
        ("here", "flux-local", UnsupportedByModel),
        ("here", "mflux", UnsupportedByModel),
        ("here", "flux-api", UnsupportedByModel),
        ("here", "ollama", UnsupportedByModel),
        ("pro", "sd", UnsupportedByModel),
        ("pro", "local", UnsupportedByModel),
        ("nothing", None, UnknownName),
        ("nothing", "flux-api", UnknownName),
    ],
)
def test_a_model_that_the_named_one_does_not_draw_is_refused(
    stands: Stands, model: str, named: str | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        stands.choose(model, named)


@pytest.mark.parametrize("name", ["", "nope", "\ud800", "x" * 500])
def test_an_unknown_backend_is_a_bad_value_that_names_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidValue, match="is not one of sd, flux-local") as caught:
        ImageRequest(prompt="x", backend=name)
    assert caught.value.field == "backend"


def test_a_drawing_goes_to_its_backend_and_wishes_to_all(stands: Stands) -> None:
    async def story() -> None:
        backends = stands.backends
        for name in ("", "sd", "mflux", "flux-api"):
            await backends.generate(drawing(checkpoint=f"of {name}", backend=name))
        held: dict[str, object] = {"own": stands.own.capabilities().facts["checkpoints"]}
        held |= {way.id: way.backend.capabilities().facts["checkpoints"] for way in stands.ways}
        assert (held["own"], held["mflux"], held["flux-api"]) == (["of ", "of sd"], ["of mflux"], ["of flux-api"])
        assert backends.capabilities().facts["checkpoints"] == ["of ", "of sd", "of flux-api", "of mflux"]
        await backends.unload("of mflux")
        assert backends.capabilities().facts["checkpoints"] == ["of ", "of sd", "of flux-api"]
        await backends.close()
        assert {way.backend.capabilities().state for way in stands.ways} == {"closed"}
        with pytest.raises(BackendUnavailable):
            await Backends(stands.own).generate(drawing(backend="mflux"))

    asyncio.run(story())


def test_every_backend_says_how_it_stands_and_why_not(tmp_path: Path) -> None:
    absent = AbsentBackend("flux-api", "no key")
    stands = Stands(tmp_path, flux_api={"backend": absent, "reason": lambda: "no key", "cards": tuple})
    told = {each.id: each for each in stands.backends.standings()}
    assert list(told) == ["sd", "flux-local", "fake", "flux-api", "mflux", "diffusionkit", "ollama"]
    assert (told["flux-api"].state, told["flux-api"].reason) == ("unavailable", "no key")
    assert (told["sd"].engine, told["sd"].state, told["sd"].reason) == ("fake", "ready", "")
    entries = stands.catalog.entries()
    models = {name: stands.backends.models_of(name, entries) for name in told}
    assert models == {
        "sd": ["here"], "flux-local": ["flux"], "fake": ["here", "flux"], "flux-api": [], "mflux": ["flux"],
        "diffusionkit": ["sd3-mlx"], "ollama": ["flux"],
    }  # fmt: skip


def test_a_fleet_leaves_the_choice_to_its_nodes(stands: Stands) -> None:
    fleet = Backends(FakeBackend(name="fleet"), is_fleet=True)
    choose: Callable[..., Choice] = lambda **asked: fleet.choose(ImageRequest(prompt="x", **asked), stands.catalog)  # noqa: E731
    assert choose(model="here").backend == choose(model="here", backend="sd").backend == ""
    with pytest.raises(UnsupportedByModel):
        choose(model="here", backend="flux-local")
    with pytest.raises(BackendUnavailable, match="its nodes choose"):
        choose(model="flux", backend="mflux")


def test_one_backend_alone_is_told_as_it_is(stands: Stands) -> None:
    told: Capabilities = stands.own.capabilities()
    assert Backends(stands.own).capabilities() == told
