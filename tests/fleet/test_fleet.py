"""The whole fleet in one process, under a clock that jumps: nothing is lost, nothing is drawn twice without need."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path

import pytest

from sdfleet.domain import Drawing, ImageRequest, JobId, Picture, Submission
from sdfleet.errors import EngineDied, JobCancelled, SdfleetError
from tests.fleet.fleets import FleetInTest, RouterInTest, fleet_of
from tests.fleet.playing import begun, emptied, play


def test_a_job_goes_to_a_node_and_its_picture_comes_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as router:
            job = await router.submit()
            done = await router.desk.wait(job.id, deadline_s=60)
            assert (done.state, done.node, done.attempts) == ("done", "n1", 1)
            assert len(await router.pixels(done)) == 1
            await emptied(fleet)
            assert fleet.nodes["n1"].drawn == [job.id]

    play(story)


def test_a_place_is_free_again_when_a_job_ends_between_two_heartbeats(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path) as fleet:
            await fleet.node("n1", step_s=0.0, slots=2)
            async with fleet.router() as router:
                await router.desk.wait((await router.submit(steps=1)).id, deadline_s=60)
                loop = asyncio.get_running_loop()
                begun_s = loop.time()
                for seed in range(6):
                    await router.desk.wait((await router.submit(steps=1, seed=seed)).id, deadline_s=60)
                assert loop.time() - begun_s < 1.0

    play(story)


def test_progress_and_previews_come_from_the_node(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=1.0) as fleet, fleet.router() as router:
            job = await router.submit(steps=6)
            steps, previews = set(), 0
            async for event in router.desk.watch(job.id, previews=True):
                if event.progress is not None:
                    steps.add(event.progress.step)
                    previews += event.progress.preview is not None
            assert {2, 3, 4, 5} <= steps
            assert previews >= 3

    play(story)


def test_input_pictures_reach_the_node_whole(tmp_path: Path) -> None:
    async def story() -> None:
        seen: list[Drawing] = []

        async def look(drawing: Drawing, _: int) -> None:
            seen.append(drawing)

        async with fleet_of(tmp_path, n1=0.01) as fleet, fleet.router() as router:
            fleet.nodes["n1"].before_step = look
            pixels = random.Random(3).randbytes(1024 * 768 * 3)
            image = Picture(width_px=1024, height_px=768, mode="RGB", data=pixels)
            mask = Picture(width_px=1024, height_px=768, mode="L", data=bytes(1024 * 768))
            request = ImageRequest(prompt="fox", model="starter", image=image, mask=mask, seed=1, strength=0.5)
            job = await router.desk.submit(Submission(request=request))
            done = await router.desk.wait(job.id, deadline_s=600)
            assert done.state == "done", done.error
            here = await router.runtime.prepare(request)
            assert seen[0].image == here.drawing.image
            assert seen[0].mask == here.drawing.mask

    play(story)


def test_six_equal_jobs_on_two_equal_nodes_take_the_time_of_three(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=1.0, n2=1.0) as fleet, fleet.router() as router:
            warm = [await router.submit(steps=2) for _ in range(2)]
            for job in warm:
                await router.desk.wait(job.id)
            begun_s = asyncio.get_running_loop().time()
            jobs = [await router.submit(steps=10, seed=i) for i in range(6)]
            for job in jobs:
                assert (await router.desk.wait(job.id)).state == "done"
            assert asyncio.get_running_loop().time() - begun_s <= 1.1 * 30
            assert {len(node.drawn) for node in fleet.nodes.values()} == {4}

    play(story)


def test_a_killed_node_s_jobs_move_and_are_the_same_pictures(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5, n2=0.5) as fleet, fleet.router() as router:
            jobs = [await router.submit(steps=20, seed=i) for i in range(4)]
            at = await begun(fleet, jobs[0].id)
            await asyncio.sleep(2)
            await fleet.nodes[at].kill()
            done = [await router.desk.wait(job.id) for job in jobs]
            assert [(job.state, job.attempts) for job in done] == [("done", 1)] * 4
            assert {job.node for job in done} == set(fleet.nodes) - {at}
            drawn = Counter(job for node in fleet.nodes.values() for job in node.drawn)
            assert sum(drawn.values()) == 5
            await fleet.nodes[at].start()
            again = await router.submit(steps=20, seed=0)
            assert await router.pixels(await router.desk.wait(again.id)) != []

    play(story)


def test_a_node_that_starts_again_quickly_is_given_its_job_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5) as fleet, fleet.router() as router:
            job = await router.submit(steps=20)
            await begun(fleet, job.id)
            await fleet.nodes["n1"].kill()
            await fleet.nodes["n1"].start()
            begun_s = asyncio.get_running_loop().time()
            assert (await router.desk.wait(job.id)).state == "done"
            # Another boot says at once that what it did is lost: nobody waits for 15 s of silence.
            assert asyncio.get_running_loop().time() - begun_s < 10 + 6
            assert fleet.nodes["n1"].drawn == [job.id, job.id]

    play(story)


def test_a_short_cut_of_the_network_costs_no_execution(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5, n2=0.5) as fleet, fleet.router() as router:
            job = await router.submit(steps=40)
            at = await begun(fleet, job.id)
            await asyncio.sleep(3)
            fleet.nodes[at].cut()
            await asyncio.sleep(12)
            fleet.nodes[at].cut(is_cut=False)
            done = await router.desk.wait(job.id)
            assert (done.state, done.node) == ("done", at)
            assert sum(len(node.drawn) for node in fleet.nodes.values()) == 1
            await emptied(fleet)

    play(story)


def test_after_a_long_cut_the_first_result_wins_and_the_other_is_let_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5, n2=0.5) as fleet, fleet.router() as router:
            job = await router.submit(steps=60)
            at = await begun(fleet, job.id)
            fleet.nodes[at].cut()
            await asyncio.sleep(20)
            fleet.nodes[at].cut(is_cut=False)
            done = await router.desk.wait(job.id)
            assert done.state == "done"
            assert sum(len(node.drawn) for node in fleet.nodes.values()) == 2
            await emptied(fleet)

    play(story)


def test_a_killed_router_finds_its_jobs_where_they_are(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5, n2=0.5) as fleet:
            async with fleet.router(is_killed=True) as router:
                jobs = [await router.submit(steps=20, seed=i) for i in range(5)]
                await begun(fleet, jobs[0].id, jobs[1].id)
                await asyncio.sleep(3)
            await asyncio.sleep(11)  # both are drawn meanwhile, and wait in the spools
            async with fleet.router() as router:
                done = [await router.desk.wait(job.id) for job in jobs]
                assert [job.state for job in done] == ["done"] * 5
                drawn = Counter(job for node in fleet.nodes.values() for job in node.drawn)
                assert set(drawn.values()) == {1}
                await emptied(fleet)

    play(story)


def test_a_killed_broker_takes_nothing_along(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.5, n2=0.5) as fleet, fleet.router() as router:
            jobs = [await router.submit(steps=10, seed=i) for i in range(4)]
            await asyncio.sleep(2)
            fleet.broker.stop()
            with pytest.raises(SdfleetError, match="broker"):
                await router.submit(seed=9)
            assert (await router.store.counts()).get("cancelled", 0) == 0
            await asyncio.sleep(4)
            fleet.broker.start()
            done = [await router.desk.wait(job.id) for job in jobs]
            assert [job.state for job in done] == ["done"] * 4
            assert sum(len(node.drawn) for node in fleet.nodes.values()) == 4
            await emptied(fleet)

    play(story)


def test_a_cancelled_job_stops_at_its_node(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=1.0) as fleet, fleet.router() as router:
            job, waiting = await router.submit(steps=50), await router.submit(steps=50)
            await begun(fleet, job.id)
            await router.desk.cancel(waiting.id)
            await router.desk.cancel(job.id)
            ended = await router.desk.wait(job.id, deadline_s=5)
            assert ended.state == "cancelled"
            after = await router.submit(steps=1)
            assert (await router.desk.wait(after.id, deadline_s=10)).state == "done"
            assert waiting.id not in fleet.nodes["n1"].drawn
            await emptied(fleet)

    play(story)


def test_a_job_that_ends_engines_fails_on_three_nodes_with_their_names(tmp_path: Path) -> None:
    async def story() -> None:
        async def die(_: Drawing, __: int) -> None:
            raise EngineDied("the engine process ended twice")

        async with fleet_of(tmp_path, n1=0.1, n2=0.1, n3=0.1, n4=0.1) as fleet, fleet.router() as router:
            for node in fleet.nodes.values():
                node.before_step = die
            job = await router.submit()
            failed = await router.desk.wait(job.id)
            assert failed.state == "failed"
            assert failed.error is not None
            assert "after 3 attempts on n" in failed.error["message"]
            assert sum(len(node.drawn) for node in fleet.nodes.values()) == 3
            await emptied(fleet)

    play(story)


def test_a_fault_of_one_node_is_mended_by_another(tmp_path: Path) -> None:
    async def story() -> None:
        async def die(_: Drawing, __: int) -> None:
            raise EngineDied("the engine process ended twice")

        async with fleet_of(tmp_path, n1=0.01, n2=0.1) as fleet, fleet.router() as router:
            fleet.nodes["n1"].before_step = die
            done = [await router.desk.wait((await router.submit(seed=i)).id) for i in range(3)]
            assert {(job.state, job.node) for job in done} == {("done", "n2")}
            await emptied(fleet)

    play(story)


def test_a_second_router_gives_out_no_work_while_the_first_reigns(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as first:
            await asyncio.sleep(1)
            assert first.fleet.is_reigning
            other = FleetInTest(tmp_path / "other", broker=fleet.broker, settled=fleet.settled)
            other.folder.mkdir()
            async with other.router() as second:
                await asyncio.sleep(30)
                assert not second.fleet.is_reigning
                assert first.fleet.is_reigning

    play(story)


def test_jobs_wait_for_a_node_and_begin_when_one_comes(tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as router:
            await router.desk.wait((await router.submit()).id)
            await fleet.nodes["n1"].kill()
            await asyncio.sleep(20)
            job = await router.submit()
            await asyncio.sleep(60)
            assert (await router.desk.status(job.id)).job.state == "queued"
            await fleet.nodes["n1"].start()
            assert (await router.desk.wait(job.id)).state == "done"

    play(story)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_whatever_is_killed_when(tmp_path: Path, seed: int) -> None:
    """Nodes, router and broker are killed at random moments; every job is done once, with the undisturbed picture."""
    chance = random.Random(seed)

    async def hurt(fleet: FleetInTest, stop: asyncio.Event) -> int:
        n_killed = 0
        while not stop.is_set():
            await asyncio.sleep(chance.uniform(2, 12))
            if chance.random() < 0.6:
                node = fleet.nodes[chance.choice(sorted(fleet.nodes))]
                await node.kill()
                n_killed += 1
                await asyncio.sleep(chance.uniform(0, 20))
                await node.start()
            else:
                fleet.broker.stop()
                await asyncio.sleep(chance.uniform(0.1, 3))
                fleet.broker.start()
        return n_killed

    async def submitted(router: RouterInTest, n: int) -> list[JobId]:
        found = []
        for i in range(n):
            with contextlib.suppress(SdfleetError):
                found.append((await router.submit(f"fox {i}", steps=chance.randint(2, 20), seed=i)).id)
            await asyncio.sleep(chance.uniform(0, 0.5))
        return found

    async def story() -> None:
        async with fleet_of(tmp_path, n1=0.4, n2=0.2, n3=0.1) as fleet:
            stop = asyncio.Event()
            pain = asyncio.create_task(hurt(fleet, stop))
            accepted: list[JobId] = []
            for _ in range(3):
                async with fleet.router(is_killed=True) as router:
                    accepted += await submitted(router, 12)
                    await asyncio.sleep(chance.uniform(0, 20))
                await asyncio.sleep(chance.uniform(0, 5))
            async with fleet.router() as router:
                done = [await router.desk.wait(job) for job in accepted]
                stop.set()
                n_killed = await pain
                assert {job.state for job in done} == {"done"}, [job.error for job in done]
                assert len({output.id for job in done for output in job.outputs}) == len(accepted) > 30
                drawn = Counter(job for node in fleet.nodes.values() for job in node.drawn)
                assert sum(drawn.values()) - len(accepted) <= n_killed * 1 + 3
                await emptied(fleet)
                job = done[0]
                again = await router.submit(
                    job.request.prompt, steps=job.request.steps or 1, seed=job.request.seed or 0
                )
                redrawn = await router.desk.wait(again.id)
                assert _same(await router.pixels(redrawn), await router.pixels(job))

    play(story, within_s=36_000)


def _same(one: list[bytes], other: list[bytes]) -> bool:
    import io

    from PIL import Image

    pairs = zip(one, other, strict=True)
    return all(Image.open(io.BytesIO(a)).tobytes() == Image.open(io.BytesIO(b)).tobytes() for a, b in pairs)


def test_the_error_of_a_request_is_the_node_s_own(tmp_path: Path) -> None:
    async def story() -> None:
        async def refuse(_: Drawing, __: int) -> None:
            raise JobCancelled("not today")

        async with fleet_of(tmp_path, n1=0.1) as fleet, fleet.router() as router:
            fleet.nodes["n1"].before_step = refuse
            ended = await router.desk.wait((await router.submit()).id)
            assert ended.state == "cancelled"
            assert ended.error is not None
            assert ended.error["message"] == "not today"

    play(story)
