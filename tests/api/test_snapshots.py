"""One snapshot for everybody, none for nobody, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from sdfleet.api.snapshots import Snapshots


class _Maker:
    """Makes snapshots that hold how many were made."""

    def __init__(self) -> None:
        self.n_made = 0

    async def __call__(self) -> Mapping[str, Any]:
        self.n_made += 1
        return {"n": self.n_made}


def test_a_hundred_readers_share_one_snapshot() -> None:
    async def story() -> None:
        snapshots, make = Snapshots(), _Maker()
        found = await asyncio.gather(*(snapshots.after(0, make) for _ in range(100)))
        assert {one.text for one in found if one is not None} == {'{"n":1}'}
        assert make.n_made == 1

    asyncio.run(story())


def test_who_has_seen_the_newest_waits_for_another_and_who_was_away_gets_it_at_once() -> None:
    async def story() -> None:
        snapshots, make = Snapshots(period_s=0.05, clock=lambda: 0.0), _Maker()
        first = await snapshots.after(0, make)
        assert first is not None
        waiting = asyncio.ensure_future(snapshots.after(first.number, make))
        second = await waiting
        assert second is not None
        assert second.number > first.number
        again = await snapshots.after(first.number, make)
        assert again == second
        assert make.n_made == 2

    asyncio.run(story())


def test_a_number_of_another_life_of_the_server_is_no_reason_to_wait_for_ever() -> None:
    async def story() -> None:
        snapshots, make = Snapshots(period_s=0.01), _Maker()
        for n in (1, 2):
            snapshot = await snapshots.after(10**18, make)
            assert snapshot is not None
            assert json.loads(snapshot.text) == {"n": n}
            assert snapshot.number < 10**18

    asyncio.run(story())


def test_what_nobody_asked_for_in_the_meantime_is_made_anew() -> None:
    async def story() -> None:
        times = iter([0.0, 0.0, 0.0, 5.0])
        snapshots, make = Snapshots(period_s=1.0, clock=lambda: next(times, 5.0)), _Maker()
        await snapshots.after(0, make)
        late = await snapshots.after(0, make)
        assert late is not None
        assert json.loads(late.text) == {"n": 2}

    asyncio.run(story())


def test_a_reader_who_leaves_while_it_makes_one_leaves_the_others_theirs() -> None:
    async def story() -> None:
        snapshots, make, is_free = Snapshots(), _Maker(), asyncio.Event()

        async def slow() -> Mapping[str, Any]:
            await is_free.wait()
            return {}

        first = asyncio.ensure_future(snapshots.after(0, slow))
        second = asyncio.ensure_future(snapshots.after(0, make))
        await asyncio.sleep(0)
        first.cancel()
        found = await second
        assert found is not None
        assert found.text == '{"n":1}'

    asyncio.run(story())


def test_a_fault_reaches_the_one_who_asked_and_the_next_is_made_again() -> None:
    async def story() -> None:
        snapshots, make = Snapshots(period_s=0.01), _Maker()

        async def fails() -> Mapping[str, Any]:
            raise LookupError("no such thing")

        with pytest.raises(LookupError):
            await snapshots.after(0, fails)
        assert await snapshots.after(0, make) is not None

    asyncio.run(story())


def test_closing_lets_every_reader_go() -> None:
    async def story() -> None:
        snapshots, make = Snapshots(period_s=3600.0), _Maker()
        first = await snapshots.after(0, make)
        assert first is not None
        waiting = [asyncio.ensure_future(snapshots.after(first.number, make)) for _ in range(3)]
        await asyncio.sleep(0)
        snapshots.close()
        assert await asyncio.gather(*waiting) == [None, None, None]

    asyncio.run(story())
