"""Which engine of a machine is asked, and what becomes of one that cannot say what it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import pytest

from sdfleet.errors import ModelNotFound, SdfleetError, UpstreamFailed, UpstreamRefused
from sdfleet.language.asking import Ask, LanguageModel
from sdfleet.language.shelf import FORGIVEN_LOOKS, Shelf

CHAT = Ask(door="/api/chat", model="m", body={})


@dataclass(eq=False)
class Scripted:
    """An engine with one model. fault: what it raises instead of an answer; list_fault: instead of its list."""

    name: str = "m"
    capability: str = "completion"
    is_warm: bool = True
    fault: SdfleetError | None = None
    list_fault: SdfleetError | None = None
    n_asked: int = 0

    async def models(self) -> tuple[LanguageModel, ...]:
        if self.list_fault is not None:
            raise self.list_fault
        model = LanguageModel(name=self.name, engine="openai", capabilities=(self.capability,), is_warm=self.is_warm)
        return (model,)

    async def answer(self, model: LanguageModel, ask: Ask) -> AsyncGenerator[bytes]:
        self.n_asked += 1
        if self.fault is not None:
            raise self.fault
        yield b"1"

    async def close(self) -> None:
        return None


async def answered(*engines: Scripted, ask: Ask = CHAT) -> tuple[int, ...]:
    shelf = Shelf(engines)
    await shelf.look()
    async with shelf.ask(ask) as answer:
        assert [piece async for piece in answer.pieces] == [b"1"]
    return tuple(engine.n_asked for engine in engines)


def test_of_several_the_warm_one_is_asked_and_the_one_that_can() -> None:
    assert asyncio.run(answered(Scripted(is_warm=False), Scripted())) == (0, 1)
    embed = Ask(door="/api/embed", model="m", body={})
    assert asyncio.run(answered(Scripted(), Scripted(capability="embedding"), ask=embed)) == (0, 1)
    assert asyncio.run(answered(Scripted(name="m:latest"), Scripted(name="m"))) == (0, 1)


def test_the_next_one_is_asked_where_the_first_fails_and_not_where_it_refuses() -> None:
    assert asyncio.run(answered(Scripted(fault=UpstreamFailed("x")), Scripted())) == (1, 1)
    with pytest.raises(UpstreamRefused):
        asyncio.run(answered(Scripted(fault=UpstreamRefused("x")), Scripted()))


def test_an_engine_that_is_late_with_its_list_keeps_its_models_for_a_while() -> None:
    async def main() -> None:
        engine = Scripted()
        shelf = Shelf([engine])
        await shelf.look()
        engine.list_fault = UpstreamFailed("late")
        for _ in range(FORGIVEN_LOOKS - 1):
            await shelf.look()
        assert shelf.find("m:latest") is not None
        await shelf.look()
        assert shelf.find("m") is None
        with pytest.raises(ModelNotFound):
            async with shelf.ask(CHAT):
                pass
        engine.list_fault = None
        await shelf.look()
        assert shelf.find("m") is not None

    asyncio.run(main())


def test_a_model_that_came_a_moment_ago_is_found() -> None:
    async def main() -> None:
        engine = Scripted(name="other")
        shelf = Shelf([engine])
        engine.name = "m"
        async with shelf.ask(CHAT) as answer:
            assert answer.model.name == "m"
            assert shelf.running() == {"m": 1}
        assert shelf.running() == {}

    asyncio.run(main())
