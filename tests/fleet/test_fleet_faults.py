"""A fleet under worse weather: two routers, half a connection, lost and late messages, full disks, large results."""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdfleet.domain import Drawing, ImageRequest, JobId, LoraUse, Submission
from sdfleet.errors import EngineDied, SdfleetError, UnknownName
from sdfleet.fleet import spool
from sdfleet.fleet.messages import Chunk, ChunkAnswer, Failure, pack_outcome
from sdfleet.fleet.packing import pack, unpack
from sdfleet.fleet.shipping import sha256_of
from sdfleet.fleet.signing import lease_for
from sdfleet.fleet.state import Limits
from sdfleet.fleet.subjects import up
from sdfleet.fleet.transport import NoAnswer, Reign
from tests.fleet.fleets import SECRET, FleetInTest, fleet_of
from tests.fleet.playing import begun, emptied, play


def test_a_router_that_stands_by_reigns_when_the_first_is_killed(tmp_path: Path) -> None:
    """Without a store in common it knows the first one's jobs from the ledger alone, and adopts what nodes have."""

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5, n2=0.5) as fleet:
            other = FleetInTest(tmp_path / "other", broker=fleet.broker, settled=fleet.settled)
            other.folder.mkdir()
            async with fleet.router(is_killed=True) as first:
                jobs = [await first.submit(steps=30, seed=i) for i in range(4)]
                await begun(fleet, jobs[0].id, jobs[1].id)
                waiting = asyncio.create_task(_stands_by(other, [job.id for job in jobs]))
                await asyncio.sleep(3)
                assert not waiting.done()
                epoch = first.fleet.epoch
            states, second_epoch = await waiting
            assert states == ["done"] * 4
            assert second_epoch > epoch
            drawn = Counter(job for node in fleet.nodes.values() for job in node.drawn)
            assert set(drawn.values()) == {1}
            await emptied(fleet)

    play(story)


async def _stands_by(fleet: FleetInTest, jobs: list[JobId]) -> tuple[list[str], int]:
    async with fleet.router() as router:
        while True:
            found = [await router.store.job(job) for job in jobs]
            if all(job is not None and job.has_ended for job in found):
                return [job.state for job in found if job is not None], router.fleet.epoch
            await asyncio.sleep(0.5)


def test_a_router_that_was_away_too_long_gives_out_no_work_any_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as first:
            fleet.broker.epoch += 1
            fleet.broker.reign = Reign(router="another", epoch=fleet.broker.epoch)
            fleet.broker.reign_until_s = asyncio.get_running_loop().time() + 1000
            await asyncio.wait_for(first.fleet.dethroned(), 10)
            job = await first.submit()
            await asyncio.sleep(20)
            assert not first.fleet.is_reigning
            assert fleet.nodes["n1"].drawn == []
            assert (await first.desk.status(job.id)).job.state == "queued"

    play(story)


@pytest.mark.parametrize("which", ["control", "bulk"])
def test_half_a_connection_lost_for_a_while_costs_no_execution(tmp_path: Path, which: str) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.2, n2=0.2) as fleet, fleet.router() as router:
            jobs = [await router.submit(steps=20, seed=i) for i in range(2)]
            at = await begun(fleet, *(job.id for job in jobs))
            bus = getattr(fleet.nodes[at], which)
            bus.cut()
            await asyncio.sleep(10)
            bus.cut(is_cut=False)
            done = [await router.desk.wait(job.id) for job in jobs]
            assert [job.state for job in done] == ["done"] * 2
            assert sum(len(node.drawn) for node in fleet.nodes.values()) == 2
            await emptied(fleet)

    play(story)


def test_a_router_cut_off_for_a_minute_thinks_nobody_dead(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5, n2=0.5) as fleet, fleet.router() as router:
            jobs = [await router.submit(steps=30, seed=i) for i in range(3)]
            await begun(fleet, jobs[0].id, jobs[1].id)
            fleet.broker.stop()
            await asyncio.sleep(60)
            fleet.broker.start()
            done = [await router.desk.wait(job.id) for job in jobs]
            assert [job.state for job in done] == ["done"] * 3
            assert sum(len(node.drawn) for node in fleet.nodes.values()) == 3
            await emptied(fleet)

    play(story)


@pytest.mark.parametrize("seed", range(3))
def test_lost_and_late_messages_lose_no_job(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1, n2=0.1, n3=0.2) as fleet, fleet.router() as router:
            for node in fleet.nodes.values():
                for bus in (node.control, node.bulk):
                    assert bus is not None
                    bus.drops = lambda _: chance.random() < 0.2
                    bus.delay_s = chance.uniform(0, 0.3)
            jobs = [await router.submit(steps=chance.randint(1, 20), seed=i) for i in range(20)]
            done = [await router.desk.wait(job.id) for job in jobs]
            assert {job.state for job in done} == {"done"}
            # A node that has a job says `have`, however often it is asked.
            assert sum(len(node.drawn) for node in fleet.nodes.values()) <= 20 + 2
            await emptied(fleet)

    play(story, within_s=900)


def test_a_full_disk_at_a_node_keeps_no_picture_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as router:
            monkeypatch.setattr(spool, "os", SimpleNamespace(fsync=_full))
            monkeypatch.setattr(spool, "MOST_HELD_BYTES", 2**20)
            done = [await router.desk.wait((await router.submit(seed=i)).id) for i in range(3)]
            assert [job.state for job in done] == ["done"] * 3
            # Without memory left, one that cannot be sent keeps its slot until there is room.
            monkeypatch.setattr(spool, "MOST_HELD_BYTES", 0)
            node = fleet.nodes["n1"]
            assert node.bulk is not None
            node.bulk.drops = lambda _: True
            jobs = [await router.submit(seed=i) for i in (8, 9)]
            await asyncio.sleep(30)
            assert len(node.drawn) == 4
            monkeypatch.undo()
            await asyncio.sleep(30)
            assert len(node.drawn) == 5
            node.bulk.drops = lambda _: False
            assert [(await router.desk.wait(job.id)).state for job in jobs] == ["done"] * 2
            assert len(node.drawn) == 5
            await emptied(fleet)

    play(story)


def test_a_node_that_ends_right_after_a_picture_leaves_it_on_its_disk(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as router:
            node = fleet.nodes["n1"]
            assert node.bulk is not None
            assert node.it is not None
            node.bulk.drops = lambda _: True
            job = await router.submit()
            while not node.it._spool.all():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.001)
            await node.kill()
            assert [path.name.partition(".")[0] for path in node.spooled] == [job.id]
            await node.start()
            assert (await router.desk.wait(job.id)).state == "done"
            assert node.drawn == [job.id]

    play(story)


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_node_that_leaves_finishes_what_it_has_and_gets_no_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.2, n2=0.2) as fleet, fleet.router() as router:
            jobs = [await router.submit(steps=20, seed=i) for i in range(6)]
            at = await begun(fleet, jobs[0].id, jobs[1].id)
            node = fleet.nodes[at].it
            assert node is not None
            await node.leave(within_s=60)
            assert len(fleet.nodes[at].drawn) == 1
            done = [await router.desk.wait(job.id) for job in jobs]
            assert [job.state for job in done] == ["done"] * 6
            assert len(fleet.nodes[at].drawn) == 1

    play(story)


def test_a_job_whose_node_has_just_become_busy_goes_to_another(tmp_path: Path) -> None:
    """The router's picture of a node is a moment old: what the node says itself counts."""

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1, n2=0.2) as fleet, fleet.router() as router:
            assert fleet.nodes["n1"].control is not None
            node = fleet.nodes["n1"].it
            assert node is not None
            fleet.nodes["n1"].control.drops = lambda subject: subject.endswith(".hb")
            node.is_leaving = True  # and its heartbeats, which would say so, do not come through
            done = await router.desk.wait((await router.submit()).id, deadline_s=30)
            assert (done.state, done.node) == ("done", "n2")

    play(story)


def test_a_deadline_that_passes_stops_the_node_too(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5) as fleet, fleet.router() as router:
            request = ImageRequest(prompt="fox", model="starter", steps=100, seed=1)
            job = await router.desk.submit(Submission(request=request, deadline_s=5.0))
            ended = await router.desk.wait(job.id)
            assert ended.state == "failed"
            assert ended.error is not None
            assert ended.error["code"] == "deadline_exceeded"
            after = await router.submit(steps=1)
            assert (await router.desk.wait(after.id, deadline_s=5)).state == "done"
            await emptied(fleet)

    play(story)


def test_a_large_result_on_a_slow_line_frees_its_slot_and_delays_no_heartbeat(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.05) as fleet, fleet.router() as router:
            node = fleet.nodes["n1"]
            assert node.bulk is not None
            node.bulk.delay_s = 0.3  # 16 MB in windows of three chunks: some 13 s
            request = ImageRequest(prompt="fox", model="starter", width_px=2048, height_px=1360, n_images=2, seed=1)
            large = await router.desk.submit(Submission(request=request))
            await begun(fleet, large.id)
            small = await router.submit(seed=2)
            heard: list[float] = []
            member = router.fleet.members.get("n1")
            assert member is not None
            while (await router.desk.status(large.id)).job.state == "running":
                heard.append(router.fleet.now_s() - member.heard_s)
                await asyncio.sleep(0.25)
            assert max(heard) <= 2.5
            assert small.id in node.drawn
            done = await router.desk.wait(large.id)
            assert (done.state, len(done.outputs)) == ("done", 2)
            assert (await router.desk.wait(small.id)).state == "done"
            await emptied(fleet)

    play(story)


def test_a_cancel_that_meets_the_finished_picture_ends_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.05) as fleet, fleet.router() as router:
            node = fleet.nodes["n1"]
            assert node.bulk is not None
            node.bulk.cut()
            job = await router.submit(steps=2)
            await begun(fleet, job.id)
            await asyncio.sleep(1)  # drawn, and cannot be sent
            await router.desk.cancel(job.id)
            ended = await router.desk.wait(job.id, deadline_s=1)
            assert ended.state == "cancelled"
            node.bulk.cut(is_cut=False)
            await emptied(fleet)

    play(story)


def test_a_cancelled_job_does_not_move_when_its_node_dies(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5, n2=0.5) as fleet, fleet.router() as router:
            job = await router.submit(steps=50)
            at = await begun(fleet, job.id)
            fleet.nodes[at].cut()
            await asyncio.sleep(11)
            await router.desk.cancel(job.id)
            assert (await router.desk.wait(job.id)).state == "cancelled"
            await asyncio.sleep(30)
            assert sum(len(node.drawn) for node in fleet.nodes.values()) == 1

    play(story)


def test_a_cancelled_job_tried_again_is_in_the_ledger_again_and_is_drawn(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.2) as fleet:
            async with fleet.router(is_killed=True) as router:
                job = await router.submit(steps=20)
                await begun(fleet, job.id)
                await router.desk.cancel(job.id)
                assert (await router.desk.wait(job.id)).state == "cancelled"
                await emptied(fleet)
                await router.desk.retry(job.id)
                assert job.id in fleet.broker.written
            async with fleet.router() as router:
                assert (await router.desk.wait(job.id)).state == "done"
                await emptied(fleet)

    play(story)


def test_jobs_of_several_pictures_share_the_slots_and_are_whole(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path) as fleet:
            await fleet.node("n1", step_s=0.1, slots=4)
            most = 0

            async def look(_: Drawing, __: int) -> None:
                nonlocal most
                node = fleet.nodes["n1"].it
                assert node is not None
                most = max(most, node.n_drawing)

            fleet.nodes["n1"].before_step = look
            async with fleet.router() as router:
                jobs = [await router.submit(n=n, seed=10 * n) for n in (3, 1, 2, 6, 2)]
                done = [await router.desk.wait(job.id) for job in jobs]
                assert [len(job.outputs) for job in done] == [3, 1, 2, 6, 2]
                assert [output.seed for output in done[0].outputs] == [30, 31, 32]
                # Six are more than the slots: they run alone.
                assert most == 6
                await emptied(fleet)

    play(story)


def test_a_lora_is_drawn_where_it_is(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01, n2=0.1) as fleet:
            folder = fleet.nodes["n2"].home / "models" / "loras"
            folder.mkdir(parents=True)
            layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
            parts = {
                f"{layer}.lora_down.weight": np.zeros((2, 8), np.float32),
                f"{layer}.lora_up.weight": np.zeros((8, 2), np.float32),
            }
            save_file(parts, folder / "ink.safetensors")
            async with fleet.router() as router:
                await asyncio.sleep(6)
                request = ImageRequest(prompt="fox", model="starter", seed=1, loras=(LoraUse(name="ink"),))
                job = await router.desk.submit(Submission(request=request))
                done = await router.desk.wait(job.id)
                assert (done.state, done.node) == ("done", "n2"), done.error
                with pytest.raises(UnknownName):
                    await router.desk.submit(Submission(request=replace(request, loras=(LoraUse(name="oil"),))))

    play(story)


def test_a_drained_node_gets_nothing_and_a_limit_is_kept(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.01, n2=0.1, n3=0.01) as fleet, fleet.router() as router:
            settled = dict(fleet.settled)
            settled["n1"] = replace(settled["n1"], is_draining=True)
            settled["n3"] = replace(settled["n3"], limits=Limits(max_steps=3))
            router.fleet.admit(settled.values())
            done = [await router.desk.wait((await router.submit(steps=4, seed=i)).id) for i in range(3)]
            assert {job.node for job in done} == {"n2"}

    play(story)


def test_a_node_that_is_put_out_loses_its_job_to_another(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.2, n2=0.2) as fleet, fleet.router() as router:
            job = await router.submit(steps=20)
            at = await begun(fleet, job.id)
            router.fleet.admit([each for each in fleet.settled.values() if each.node != at])
            done = await router.desk.wait(job.id)
            assert (done.state, done.node) == ("done", next(node for node in fleet.nodes if node != at))

    play(story)


def test_a_lone_node_whose_engine_dies_is_tried_three_times(tmp_path: Path) -> None:
    async def story() -> None:
        async def die(_: Drawing, __: int) -> None:
            raise EngineDied("the engine process ended twice")

        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as router:
            fleet.nodes["n1"].before_step = die
            failed = await router.desk.wait((await router.submit()).id)
            assert failed.error is not None
            assert "after 3 attempts on n1, n1, n1" in failed.error["message"]
            assert len(fleet.nodes["n1"].drawn) == 3
            await emptied(fleet)

    play(story)


def test_a_fault_of_ours_in_a_node_fails_that_job_and_frees_its_slot(tmp_path: Path) -> None:
    async def story() -> None:
        async def fall(_: Drawing, __: int) -> None:
            raise ZeroDivisionError

        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as router:
            fleet.nodes["n1"].before_step = fall
            failed = await router.desk.wait((await router.submit()).id, deadline_s=60)
            assert failed.error is not None
            assert "ZeroDivisionError in sdfleet itself, on n1" in failed.error["message"]
            fleet.nodes["n1"].before_step = None
            assert (await router.desk.wait((await router.submit()).id, deadline_s=60)).state == "done"

    play(story)


def test_an_old_attempt_s_failure_does_not_end_the_new_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5) as fleet, fleet.router() as router:
            job = await router.submit(steps=20)
            await begun(fleet, job.id)
            packed = pack_outcome(Failure(job_id=job.id, error=SdfleetError("of long ago")))
            chunk = Chunk(
                job=job.id, lease=lease_for(SECRET, job=job.id, node="n1", attempt=1), offset=0, total=len(packed),
                sha256=sha256_of(packed), data=packed,
            )  # fmt: skip
            assert fleet.nodes["n1"].bulk is not None
            answer = await fleet.nodes["n1"].bulk.request(up("n1", "res"), pack(chunk), timeout_s=5)
            assert unpack(ChunkAnswer, answer.data).verdict == "refuse"
            assert (await router.desk.wait(job.id)).state == "done"

    play(story)


def test_a_router_that_stands_by_answers_no_node(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5) as fleet:
            fleet.broker.epoch = 5
            async with fleet.router() as router:
                router.fleet._throne._reign = None  # as if another had taken it
                packed = pack_outcome(Failure(job_id=JobId("ab"), error=SdfleetError("x")))
                chunk = Chunk(
                    job=JobId("ab"), lease=lease_for(SECRET, job=JobId("ab"), node="n1", attempt=1), offset=0,
                    total=len(packed), sha256=sha256_of(packed), data=packed,
                )  # fmt: skip
                assert fleet.nodes["n1"].bulk is not None
                with pytest.raises(NoAnswer):
                    await fleet.nodes["n1"].bulk.request(up("n1", "res"), pack(chunk), timeout_s=0.2)

    play(story)


def test_nothing_is_kept_of_jobs_that_have_ended(tmp_path: Path) -> None:
    """Done, failed, cancelled while waiting and while drawn, late: the router's memory is as before."""

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1, n2=0.1) as fleet, fleet.router() as router:

            async def fail(drawing: Drawing, _: int) -> None:
                if drawing.prompt == "fail":
                    raise SdfleetError("no")

            for node in fleet.nodes.values():
                node.before_step = fail
            jobs = [await router.submit("fail" if i % 3 == 0 else "fox", steps=10, seed=i) for i in range(9)]
            await router.desk.cancel(jobs[8].id)
            await begun(fleet, jobs[1].id)
            await router.desk.cancel(jobs[1].id)
            request = ImageRequest(prompt="late", model="starter", steps=100, seed=1)
            jobs.append(await router.desk.submit(Submission(request=request, deadline_s=3.0)))
            for job in jobs:
                await router.desk.wait(job.id)
            await emptied(fleet)
            await asyncio.sleep(5)
            under_way, books = router.fleet._under_way, router.books  # nobody else sees a leak
            kept = {name: value for name, value in vars(under_way).items() if value}
            assert kept == {}
            assert [*books._held, *books._to_strike, *books._done] == []
            assert not router.fleet._receiving._inbound
            assert all(not member.sent and not member.found for member in router.fleet.members.all())
            for node in fleet.nodes.values():
                assert node.it is not None
                assert [*node.it._jobs, *node.it._shipping._not_before_s] == []

    play(story)


def test_a_job_that_another_process_ended_leaves_the_ledger_and_the_router_s_memory(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=10.0) as fleet, fleet.router() as router:
            await begun(fleet, (await router.submit(steps=10)).id)
            job = await router.submit()
            await asyncio.sleep(1)
            await router.store.cancel(job.id, {"code": "job_cancelled", "message": "elsewhere", "hint": ""})
            live = router.desk._board.lives[job.id]  # what the follower does every two seconds
            router.desk._board.follow(live, await router.store.job(job.id))
            await asyncio.sleep(15)
            assert job.id not in fleet.broker.written

    play(story)
