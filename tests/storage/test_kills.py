"""What a store has said yes to is there after its process was killed."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from sdfleet.domain import JobState
from tests.storage.conftest import Stage, play_on

# Says each thing only once the store has said it. Four at a time, so that they share transactions.
CHILD = """
import asyncio, os, sys
from tests.storage.conftest import play_on, submit
from sdfleet.domain import Picture

url, name, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
picture = Picture(width_px=64, height_px=64, mode="RGB", data=bytes(64 * 64 * 3))

def say(word, job):
    os.write(1, f"{word} {job.id}\\n".encode())

async def life(stage, number):
    job = await stage.accept(submit(image=picture), job_id=f"{name}{number}")
    say("queued", job)
    if number == last:
        os._exit(9)
    if number % 2:
        assert await stage.jobs.begin(job.id)
        say("running", job)
        assert await stage.finish(job)
        say("done", job)

async def story(stage):
    for first in range(0, 100_000, 4):
        await asyncio.gather(*(life(stage, first + i) for i in range(4)))

play_on(url, story)
"""
ORDER: tuple[JobState, ...] = ("queued", "running", "done")


def _heard(lines: list[str]) -> dict[str, JobState]:
    """The last thing said of each job; a line that was cut by the kill is no promise."""
    whole = [line.split() for line in lines if line.endswith("\n")]
    return {job_id: word for word, job_id in whole}  # type: ignore[misc]


def _states(url: str) -> dict[str, JobState]:
    async def story(stage: Stage) -> dict[str, JobState]:
        jobs, _ = await stage.jobs.page(limit=100_000)
        # Each can be read back whole, with its picture.
        assert all([(await stage.jobs.job(job.id)).request.image for job in jobs[:20]])  # type: ignore[union-attr]
        assert {len(job.outputs) for job in jobs if job.state == "done"} <= {1}
        return {job.id: job.state for job in jobs}

    return play_on(url, story)


def test_no_accepted_job_is_lost_by_a_kill_at_any_moment(url: str) -> None:
    chance = random.Random(4)
    heard: dict[str, JobState] = {}
    for life in range(10):
        command = [sys.executable, "-c", CHILD, url, f"life{life}x", "-1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(chance.randrange(1, 40))]
            child.kill()
            heard |= _heard(lines + child.stdout.readlines())
    states = _states(url)
    assert len(heard) >= 10
    assert [job_id for job_id in heard if job_id not in states] == []
    went_back = {i: (said, states[i]) for i, said in heard.items() if ORDER.index(states[i]) < ORDER.index(said)}
    assert went_back == {}


def test_a_process_that_ends_in_the_moment_of_acceptance_leaves_the_job(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    for last in range(4):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, url, f"life{last}x", str(last)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 9, done.stderr
        assert f"queued life{last}x{last}" in done.stdout
    states = _states(url)
    assert {f"life{last}x{last}" for last in range(4)} <= set(states)


def test_what_a_killed_process_had_begun_is_taken_up_once(url: str) -> None:
    command = [sys.executable, "-c", CHILD, url, "x", "-1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        while not child.stdout.readline().startswith("running"):
            pass
        child.kill()

    async def story(stage: Stage) -> tuple[set[str], set[str]]:
        resumed = [job.id for job in await stage.jobs.resume()]
        assert len(resumed) == len(set(resumed))
        open_jobs, _ = await stage.jobs.page(states=frozenset({"queued", "running"}), limit=100_000)
        assert {job.state for job in open_jobs} == {"queued"}
        return set(resumed), {job.id for job in open_jobs}

    resumed, waiting = play_on(url, story)
    assert resumed == waiting != set()
