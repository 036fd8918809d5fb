"""A node that lies, a deputy that is to be confused, and garbage: refused, noted, and nobody stops for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from sdfleet.domain import ImageResult, Job, JobId, Picture
from sdfleet.fleet.messages import Cancel, Chunk, ChunkAnswer, Run, WantBlob, pack_outcome, unpack_outcome
from sdfleet.fleet.packing import CHUNK_BYTES, pack, unpack
from sdfleet.fleet.receiving import MOST_BROKEN
from sdfleet.fleet.shipping import sha256_of
from sdfleet.fleet.signing import SIGNATURE, lease_for, sign
from sdfleet.fleet.subjects import down, inbox_of, up
from sdfleet.fleet.transport import Incoming, NoAnswer
from sdfleet.fleet.transport_memory import MemoryBus
from tests.fleet.fleets import SECRET, FleetInTest, RouterInTest, fleet_of, secret_of
from tests.fleet.playing import begun, play

Lie = Callable[[ImageResult], ImageResult]


@dataclass(slots=True, eq=False)
class Liar:
    """Somebody with the key of node n1 while that node draws: says what it likes on n1's subjects."""

    bus: MemoryBus
    runs: list[Run] = field(default_factory=list)
    sent: list[Chunk] = field(default_factory=list)

    @classmethod
    async def at(cls, fleet: FleetInTest) -> Liar:
        liar = cls(fleet.broker.connect("n1"))

        async def on_run(message: Incoming) -> None:
            liar.runs.append(unpack(Run, message.data))

        async def on_chunk(message: Incoming) -> None:
            liar.sent.append(unpack(Chunk, message.data))

        await liar.bus.subscribe(down("n1", "run"), on_run)
        await liar.bus.subscribe(up("n1", "res"), on_chunk)
        return liar

    async def send(self, job: JobId, lease: str, packed: bytes, *, total: int = 0, sha256: str = "") -> ChunkAnswer:
        """The router's last word on these bytes as a result of the job."""
        answer = ChunkAnswer(verdict="ok")
        for offset in range(0, len(packed), CHUNK_BYTES):
            chunk = Chunk(
                job=job, lease=lease, offset=offset, total=total or len(packed), sha256=sha256 or sha256_of(packed),
                data=packed[offset : offset + CHUNK_BYTES],
            )  # fmt: skip
            said = await self.bus.request(up("n1", "res"), pack(chunk), timeout_s=5.0)
            answer = unpack(ChunkAnswer, said.data)
            if answer.verdict != "ok":
                break
        return answer


async def _truth(router: RouterInTest, liar: Liar) -> ImageResult:
    """What a node sends for an honest job."""
    job = await router.submit(steps=2)
    await router.desk.wait(job.id)
    packed = b"".join(chunk.data for chunk in liar.sent if chunk.job == job.id)
    return cast("ImageResult", unpack_outcome(packed))


async def _under_way(fleet: FleetInTest, router: RouterInTest, go_on: asyncio.Event) -> Job:
    """A job that n1 draws until it is told to go on."""

    async def wait(*_: object) -> None:
        await go_on.wait()

    fleet.nodes["n1"].before_step = wait
    job = await router.submit(steps=2)
    await begun(fleet, job.id)
    return job


def _resized(result: ImageResult, side_px: int) -> ImageResult:
    picture = Picture(width_px=side_px, height_px=side_px, mode="RGB", data=bytes(3 * side_px * side_px))
    return replace(result, images=tuple(replace(image, picture=picture) for image in result.images))


LIES: dict[str, Lie] = {
    "of another job": lambda result: replace(result, job_id=JobId("f" * 32)),
    "too few": lambda result: replace(result, images=()),
    "too many": lambda result: replace(result, images=result.images * 2),
    "another seed": lambda result: replace(
        result, images=tuple(replace(image, seed=image.seed + 99) for image in result.images)
    ),
    "another size": lambda result: _resized(result, 64),
    "degraded unasked": lambda result: replace(_resized(result, 64), rungs=("smaller_picture",)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_result_that_is_not_what_was_asked_for_is_refused(
    tmp_path: Path, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            liar, go_on = await Liar.at(fleet), asyncio.Event()
            truth = await _truth(router, liar)
            job = await _under_way(fleet, router, go_on)
            lease = next(run.lease for run in liar.runs if run.job == job.id)
            packed = pack_outcome(LIES[lie](replace(truth, job_id=job.id)))
            answer = await liar.send(job.id, lease, packed)
            assert answer.verdict in {"again", "refuse"}
            go_on.set()
            assert len((await router.desk.wait(job.id)).outputs) == 1

    play(story)
    assert "a result was refused" in caplog.messages


def test_a_node_whose_results_stay_wrong_loses_the_job_to_another(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            liar, go_on = await Liar.at(fleet), asyncio.Event()
            truth = await _truth(router, liar)
            job = await _under_way(fleet, router, go_on)
            await fleet.node("n2", step_s=0.01)
            router.fleet.admit(fleet.settled.values())
            while "n2" not in router.fleet.members.at("starter"):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.5)
            lease = next(run.lease for run in liar.runs if run.job == job.id)
            packed = pack_outcome(LIES["too few"](replace(truth, job_id=job.id)))
            answers = [(await liar.send(job.id, lease, packed)).verdict for _ in range(MOST_BROKEN)]
            assert answers == ["again"] * (MOST_BROKEN - 1) + ["dup"]
            done = await router.desk.wait(job.id)
            assert (done.state, done.node) == ("done", "n2")
            go_on.set()

    play(story)


def test_a_lone_node_whose_results_stay_wrong_fails_the_job(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            liar, go_on = await Liar.at(fleet), asyncio.Event()
            truth = await _truth(router, liar)
            job = await _under_way(fleet, router, go_on)
            lease = next(run.lease for run in liar.runs if run.job == job.id)
            packed = pack_outcome(LIES["too many"](replace(truth, job_id=job.id)))
            for _ in range(MOST_BROKEN):
                await liar.send(job.id, lease, packed)
            failed = await router.desk.wait(job.id)
            assert failed.error is not None
            assert (failed.state, failed.error["code"]) == ("failed", "broken_result")
            assert "n1" in failed.error["message"]
            go_on.set()

    play(story)


def test_a_result_of_another_s_job_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also with the other node's own lease, which a thief might have overheard."""

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            liar, go_on = await Liar.at(fleet), asyncio.Event()
            truth = await _truth(router, liar)
            job = await _under_way(fleet, router, go_on)
            packed = pack_outcome(replace(truth, job_id=job.id))
            for lease in (
                lease_for(SECRET, job=job.id, node="n2", attempt=100_001),
                lease_for(SECRET, job=JobId("0" * 32), node="n1", attempt=100_001),
                lease_for(b"another secret", job=job.id, node="n1", attempt=100_001),
                "1." + "0" * 32,
                "",
                "9" * 400,
            ):
                assert (await liar.send(job.id, lease, packed)).verdict == "dup"
            assert not (await router.desk.status(job.id)).job.has_ended
            go_on.set()
            assert (await router.desk.wait(job.id)).state == "done"

    play(story)
    assert "a node sent a result of a job it was not given" in caplog.messages


def test_a_result_with_another_hash_or_size_than_announced_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            liar, go_on = await Liar.at(fleet), asyncio.Event()
            truth = await _truth(router, liar)
            job = await _under_way(fleet, router, go_on)
            lease = next(run.lease for run in liar.runs if run.job == job.id)
            packed = pack_outcome(replace(truth, job_id=job.id))
            assert (await liar.send(job.id, lease, packed, sha256="0" * 64)).verdict == "again"
            assert (await liar.send(job.id, lease, packed, total=2**40)).verdict == "refuse"
            assert (await liar.send(job.id, lease, packed, total=-1)).verdict == "refuse"
            go_on.set()
            assert (await router.desk.wait(job.id)).state == "done"

    play(story)
    assert {"a result was refused", "a node sent more than was asked for"} <= set(caplog.messages)


def test_the_router_answers_nowhere_but_in_the_node_s_inbox(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may say what a node may not; a node that names another's subject as its own inbox would use that."""

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            liar, go_on = await Liar.at(fleet), asyncio.Event()
            job = await _under_way(fleet, router, go_on)
            lease = next(run.lease for run in liar.runs if run.job == job.id)
            heard: list[str] = []

            async def note(message: Incoming) -> None:
                heard.append(message.subject)

            replies = ("fleet.n.n2.run", "_INBOX_n2.x", "_INBOX_n1", "_INBOX_n12.x", "$JS.API.STREAM.PURGE.JOBS")
            for reply in replies:
                await liar.bus.subscribe(reply, note)
            chunk = Chunk(job=job.id, lease=lease, offset=0, total=4, sha256="0" * 64, data=b"abcd")
            want = WantBlob(job=job.id, lease=lease, sha256="0" * 64, offset=0)
            for reply in replies:
                await liar.bus.publish(up("n1", "res"), pack(chunk), reply=reply)
                await liar.bus.publish(up("n1", "blob"), pack(want), reply=reply)
            await asyncio.sleep(1)
            assert heard == []
            assert caplog.messages.count("a node asked to be answered elsewhere") == 2 * len(replies)
            go_on.set()
            assert (await router.desk.wait(job.id)).state == "done"

    play(story)


def test_an_order_that_the_router_did_not_sign_is_not_obeyed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Unsigned, signed with another node's secret, or what was said to another node, said again."""

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01, n2=0.01) as fleet, fleet.router() as router:
            go_on = asyncio.Event()
            fleet.settled["n2"] = replace(fleet.settled["n2"], is_draining=True)
            router.fleet.admit(fleet.settled.values())
            liar = await Liar.at(fleet)
            job = await _under_way(fleet, router, go_on)
            cancel = pack(Cancel(job=job.id, lease="", epoch=2**40))
            subject = down("n1", "cancel")
            overheard = sign(secret_of("n2"), down("n2", "cancel"), cancel)
            genuine = sign(secret_of("n1"), down("n2", "cancel"), cancel)
            for headers in (
                {},
                {SIGNATURE: ""},
                {SIGNATURE: "é" * 64},
                {SIGNATURE: sign(secret_of("n2"), subject, cancel)},
                {SIGNATURE: overheard},
                {SIGNATURE: genuine},
                {SIGNATURE: sign(secret_of("n1"), subject, cancel + b" ")},
            ):
                await liar.bus.publish(subject, cancel, headers=headers)
            await asyncio.sleep(1)
            assert caplog.messages.count("a message that the router did not sign was not heeded") == 7
            go_on.set()
            assert (await router.desk.wait(job.id)).state == "done"

    play(story)


def test_a_revoked_node_s_spool_is_refused(tmp_path: Path) -> None:
    """Its broker connection is cut at once; what it said a moment before is refused all the same."""

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            liar, go_on = await Liar.at(fleet), asyncio.Event()
            truth = await _truth(router, liar)
            job = await _under_way(fleet, router, go_on)
            lease = next(run.lease for run in liar.runs if run.job == job.id)
            router.fleet.admit([])
            with pytest.raises(NoAnswer):
                await liar.send(job.id, lease, pack_outcome(replace(truth, job_id=job.id)))
            assert not (await router.desk.status(job.id)).job.has_ended
            await fleet.node("n2", step_s=0.01)
            router.fleet.admit([fleet.settled["n2"]])
            assert (await router.desk.wait(job.id)).node == "n2"

    play(story)


def test_garbage_on_every_subject_stops_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        chance = random.Random(4)
        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            liar = await Liar.at(fleet)
            await _truth(router, liar)
            honest = pack(liar.sent[0])
            deep = b"[" * 200_000
            payloads = [
                b"", b"\0", b"\xff" * 8, b"\x00\x00\x00\x02{}", b"\x7f\xff\xff\xff{}", bytes(2**20),
                len(deep).to_bytes(4, "big") + deep, honest[:-1], honest + b"x", honest[: len(honest) // 2],
                b'\x00\x00\x00\x16{"v":1,"blobs":[-1,1]}', b'\x00\x00\x00\x15{"v":1,"blobs":[1e99]}',
                *(bytes(chance.choices(range(256), k=chance.randrange(1, 400))) for _ in range(40)),
                *(_spoiled(honest, chance) for _ in range(40)),
            ]  # fmt: skip
            whats = ("hb", "hello", "ev.x", "ev.*", "ans.x", "res", "blob", "joined", "unheard.of")
            for what in whats:
                for payload in payloads:
                    for reply in ("", f"{inbox_of('n1')}.x"):
                        await liar.bus.publish(f"fleet.up.n1.{what}", payload, reply=reply)
            for subject in ("fleet.up.*.hb", "fleet.up.N1.hb", "fleet.up..hb", f"fleet.up.{'n' * 200}.hb"):
                await liar.bus.publish(subject, b"{}")
            for what in ("run", "cancel", "watch", "order", "hello"):
                for payload in payloads:
                    subject = down("n1", what)
                    await liar.bus.publish(
                        subject, payload, headers={SIGNATURE: sign(secret_of("n1"), subject, payload)}
                    )
            await asyncio.sleep(1)
            job = await router.submit(seed=77)
            assert (await router.desk.wait(job.id)).state == "done"

    play(story)


def _spoiled(payload: bytes, chance: random.Random) -> bytes:
    spoiled = bytearray(payload)
    for _ in range(chance.randrange(1, 6)):
        spoiled[chance.randrange(min(len(spoiled), 400))] = chance.randrange(256)
    return bytes(spoiled)
