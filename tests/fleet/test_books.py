"""The router's two books kept alike, and what stands in the second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest

from sdfleet.domain import Caller, Idempotency, ImageRequest, Job, JobId, Picture, Submission, Webhook
from sdfleet.fleet.books import Books
from sdfleet.fleet.entries import pack_entry, unpack_entry
from sdfleet.fleet.packing import BrokenMessage
from sdfleet.fleet.transport import Entry
from sdfleet.fleet.transport_memory import MemoryBroker, MemoryLedger
from tests.fleet import virtual_time


def _job(name: str = "ab", **more: object) -> Job:
    request = ImageRequest(prompt="ein Fuchs 🦊", model="sd", width_px=64, height_px=64, steps=4, seed=2**64 - 1)
    submission = Submission(
        request=replace(request, **more),  # type: ignore[arg-type]
        caller=Caller(name="me"),
        idempotency=Idempotency(key="k", fingerprint="f"),
        webhook=Webhook(url="https://example.org", secret="s"),
        tags=("a", "b"),
        priority=3,
    )
    return Job(id=JobId(name), submission=submission, state="queued", created_s=1.0)


@dataclass(slots=True)
class _Stage:
    """Books over a ledger in memory. states: what the store says, job -> whether open."""

    broker: MemoryBroker = field(default_factory=MemoryBroker)
    states: dict[JobId, bool] = field(default_factory=dict)
    live: set[JobId] = field(default_factory=set)
    told: list[tuple[JobId, bool]] = field(default_factory=list)
    taken: list[JobId] = field(default_factory=list)

    def books(self) -> Books:
        async def is_open(job: JobId) -> bool | None:
            return self.states.get(job)

        async def unknown(entry: Entry) -> bool:
            self.taken.append(entry.job)
            self.states[entry.job] = True
            return True

        return Books(
            MemoryLedger(self.broker), body=pack_entry, is_open=is_open, unknown=unknown,
            ended=lambda job, is_done: self.told.append((job, is_done)), is_live=self.live.__contains__,
        )  # fmt: skip


def _play(story: Callable[[_Stage, Books], Awaitable[None]]) -> None:
    async def main() -> None:
        stage = _Stage()
        books = stage.books()
        keeper = asyncio.create_task(books.run())
        await story(stage, books)
        keeper.cancel()
        await asyncio.wait({keeper})

    virtual_time.run(main())


def test_a_job_can_be_made_again_from_its_entry() -> None:
    job = _job()
    assert unpack_entry(pack_entry(job)) == (job.id, job.submission)


def test_a_job_with_input_pictures_and_garbage_are_told_apart_from_jobs() -> None:
    image = Picture(width_px=64, height_px=64, mode="RGB", data=bytes(64 * 64 * 3))
    assert len(pack_entry(_job(image=image))) < 2000
    for body in (pack_entry(_job(image=image)), b"", b"{}", b"[]", b'{"v":1}', b'{"v":2}', b"\xff" * 100):
        with pytest.raises(BrokenMessage):
            unpack_entry(body)


def test_an_ended_job_leaves_the_ledger_whether_its_entry_had_come_or_not() -> None:
    async def story(stage: _Stage, books: Books) -> None:
        first, second = _job("ab"), _job("cd")
        stage.live |= {first.id, second.id}
        await books.enter(first)
        await asyncio.sleep(1)
        books.on_finished(first, draw_s=0, device_s=0, total_s=0)
        await books.enter(second)
        books.on_failed(second, code="x")  # before its entry was seen
        await asyncio.sleep(2)
        assert stage.broker.written == {}
        assert stage.told == [(first.id, True), (second.id, False)]

    _play(story)


def test_an_entry_of_an_open_job_is_held_for_as_long_as_it_is_open() -> None:
    async def story(stage: _Stage, books: Books) -> None:
        job = _job()
        stage.live.add(job.id)
        await books.enter(job)
        await asyncio.sleep(300)
        assert stage.broker.written[job.id].n_deliveries == 1

    _play(story)


def test_a_job_that_somebody_else_ended_is_struck_within_seconds() -> None:
    async def story(stage: _Stage, books: Books) -> None:
        job = _job()
        stage.live.add(job.id)
        await books.enter(job)
        await asyncio.sleep(1)
        stage.live.clear()
        stage.states[job.id] = False
        await asyncio.sleep(15)
        assert stage.broker.written == {}

    _play(story)


def test_an_entry_that_the_store_does_not_know_is_taken_up_once() -> None:
    async def story(stage: _Stage, books: Books) -> None:
        await MemoryLedger(stage.broker).enter(JobId("ef"), pack_entry(_job("ef")))
        await asyncio.sleep(100)
        assert stage.taken == ["ef"]
        assert "ef" in stage.broker.written
        await books.enter(_job("ef"))  # as at a start: it is there already
        await asyncio.sleep(1)
        assert stage.broker.written[JobId("ef")].n_deliveries == 1

    _play(story)


def test_a_job_tried_again_is_in_the_ledger_again() -> None:
    async def story(stage: _Stage, books: Books) -> None:
        job = _job()
        stage.live.add(job.id)
        await books.enter(job)
        await asyncio.sleep(1)
        for _ in range(3):
            books.on_failed(job, code="x")
            await books.again(job)  # before the strike, and after it
            await asyncio.sleep(2)
            assert job.id in stage.broker.written
        books.on_failed(job, code="x")
        await asyncio.sleep(2)
        assert stage.broker.written == {}
        await books.again(job)
        await asyncio.sleep(2)
        assert job.id in stage.broker.written
        books.on_finished(job, draw_s=0, device_s=0, total_s=0)
        await asyncio.sleep(2)
        assert stage.broker.written == {}

    _play(story)
