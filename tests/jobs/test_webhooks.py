"""Telling the end of a job to a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sdfleet.domain import Job, Webhook
from sdfleet.errors import InvalidValue
from sdfleet.jobs.webhooks import Webhooks, sign
from sdfleet.storage.database import Database, open_database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.webhooks import WebhookStore
from tests.jobs.desks import opened, submission, tell


@dataclass(slots=True)
class Receiver:
    """Answers each request with the next status; `arrived` is set whenever one came."""

    statuses: list[int]
    url: str = ""
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    is_silent: bool = False

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")[1:-2]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.got.append((headers, body))
        self.arrived.set()
        if self.is_silent:
            await reader.read()
        else:
            status = self.statuses.pop(0) if self.statuses else 200
            extra = f"Location: {self.url}again\r\n" if status == 302 else ""
            writer.write(f"HTTP/1.1 {status} X\r\n{extra}Content-Length: 0\r\n\r\n".encode())
            await writer.drain()
        writer.close()

    async def n(self, n_requests: int) -> None:
        """Return when so many requests have come."""
        while len(self.got) < n_requests:
            self.arrived.clear()
            await self.arrived.wait()


@contextlib.asynccontextmanager
async def receiving(*statuses: int, is_silent: bool = False) -> AsyncIterator[Receiver]:
    receiver = Receiver(list(statuses), is_silent=is_silent)
    server = await asyncio.start_server(receiver.answer, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?x=1"
    async with server:
        yield receiver


def body(job: Job) -> bytes:
    return json.dumps({"id": job.id, "state": job.state}).encode()


@contextlib.asynccontextmanager
async def delivering(folder: Path, **more: Any) -> AsyncIterator[WebhookStore]:
    """A `Webhooks` at work beside whatever else has the database open."""
    database: Database = await open_database(None, home=folder)
    store = WebhookStore(database)
    given: dict[str, Any] = {"body": body, "secret": "server", "allow_private": True, "pauses_s": (0.01, 0.01)} | more
    webhooks = Webhooks(store=store, jobs=JobStore(database), **given)
    task = asyncio.create_task(webhooks.run())
    try:
        yield store
    finally:
        task.cancel()
        await asyncio.wait({task})
        await database.close()


class Ignored(Webhooks):
    """Takes every URL and delivers nothing: the rows stay for the one under test."""

    def check(self, webhook: Webhook) -> None:
        pass

    async def run(self) -> Any:
        await asyncio.Event().wait()


async def ended_job(folder: Path, url: str, *, secret: str | None = None) -> Job:
    database = await open_database(None, home=folder)
    try:
        ignored = Ignored(store=WebhookStore(database), jobs=JobStore(database), body=body)
        async with opened(folder, desk={"webhooks": ignored}) as place:
            asked = submission(webhook=Webhook(url=url, secret=secret))
            return await place.desk.wait((await place.desk.submit(asked)).id)
    finally:
        await database.close()


async def nothing_due(store: WebhookStore) -> None:
    while await store.next_due_s() is not None:  # noqa: ASYNC110 - a table cannot be waited for
        await asyncio.sleep(0.01)


def test_the_end_of_a_job_is_posted_and_signed(tmp_path: Path) -> None:
    async def story() -> None:
        async with receiving() as receiver, receiving() as other:
            job = await ended_job(tmp_path, receiver.url, secret="mine")
            await ended_job(tmp_path, other.url)
            async with delivering(tmp_path) as store:
                await receiver.n(1)
                await other.n(1)
                await nothing_due(store)
            headers, content = receiver.got[0]
            assert json.loads(content) == {"id": job.id, "state": "done"}
            assert headers["x-sdfleet-signature"] == sign(content, "mine")
            assert other.got[0][0]["x-sdfleet-signature"] == sign(other.got[0][1], "server")
            assert headers["content-type"] == "application/json"

    tell(story)


def test_a_receiver_that_fails_is_told_again_with_the_same_delivery(tmp_path: Path) -> None:
    async def story() -> None:
        async with receiving(500, 302, 204) as receiver:
            await ended_job(tmp_path, receiver.url)
            async with delivering(tmp_path) as store:
                await receiver.n(3)
                await nothing_due(store)
            assert len({headers["x-sdfleet-delivery"] for headers, _ in receiver.got}) == 1
            assert len(receiver.got) == 3

    tell(story)


@pytest.mark.parametrize(("statuses", "n_tries"), [((410,), 1), ((500, 500, 500), 3)])
def test_a_receiver_that_is_gone_is_given_up(tmp_path: Path, statuses: tuple[int, ...], n_tries: int) -> None:
    async def story() -> None:
        async with receiving(*statuses) as receiver:
            await ended_job(tmp_path, receiver.url)
            async with delivering(tmp_path) as store:
                await nothing_due(store)
            assert len(receiver.got) == n_tries

    tell(story)


def test_a_receiver_that_never_answers_costs_its_time_only(tmp_path: Path) -> None:
    async def story() -> None:
        async with receiving(is_silent=True) as silent, receiving() as receiver:
            await ended_job(tmp_path, silent.url)
            await ended_job(tmp_path, receiver.url)
            async with delivering(tmp_path, answer_within_s=0.2, pauses_s=()) as store:
                await receiver.n(1)
                await nothing_due(store)
            assert len(silent.got) == 1

    tell(story)


def test_what_was_not_delivered_is_delivered_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        async with receiving(500, 200) as receiver:
            await ended_job(tmp_path, receiver.url)
            async with delivering(tmp_path, pauses_s=(0.05,)):
                await receiver.n(1)
            async with delivering(tmp_path) as store:
                await nothing_due(store)
            assert len(receiver.got) == 2

    tell(story)


def test_a_name_that_leads_into_our_network_is_not_called(tmp_path: Path) -> None:
    async def resolve(_: str, __: int) -> Sequence[str]:
        return ["127.0.0.1"]

    async def story() -> None:
        async with receiving() as receiver:
            port = receiver.url.split(":")[2].split("/")[0]
            await ended_job(tmp_path, f"http://rebind.example:{port}/")
            async with delivering(tmp_path, allow_private=False, resolve=resolve) as store:
                await nothing_due(store)
            assert receiver.got == []

    tell(story)


def test_a_desk_nudges_its_webhooks_and_refuses_private_urls(tmp_path: Path) -> None:
    async def story() -> None:
        database = await open_database(None, home=tmp_path)
        try:
            async with receiving() as receiver:
                jobs = JobStore(database)
                given: dict[str, Any] = {"store": WebhookStore(database), "jobs": jobs, "body": body}
                async with opened(tmp_path, desk={"webhooks": Webhooks(**given, allow_private=True)}) as place:
                    await place.desk.submit(submission(webhook=Webhook(url=receiver.url)))
                    await receiver.n(1)
                async with opened(tmp_path, desk={"webhooks": Webhooks(**given)}) as place:
                    with pytest.raises(InvalidValue):
                        await place.desk.submit(submission(webhook=Webhook(url=receiver.url)))
                async with opened(tmp_path) as place:
                    with pytest.raises(InvalidValue, match="calls nobody"):
                        await place.desk.submit(submission(webhook=Webhook(url="https://example.org/")))
        finally:
            await database.close()

    tell(story)


def test_a_fault_of_ours_gives_up_one_delivery_and_not_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        async with receiving() as receiver:
            bad, good = await ended_job(tmp_path, receiver.url), await ended_job(tmp_path, receiver.url)

            def faulty(job: Job) -> bytes:
                if job.id == bad.id:
                    raise ZeroDivisionError
                return body(job)

            async with delivering(tmp_path, body=faulty) as store:
                await nothing_due(store)
            assert [json.loads(content)["id"] for _, content in receiver.got] == [good.id]

    tell(story)
