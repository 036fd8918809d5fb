"""`sdfleet jobs` on a store without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sdfleet.domain import ImageRequest, JobId, Submission
from sdfleet.storage.database import open_database
from sdfleet.storage.jobs import JobStore
from tests.cli.conftest import Run


@pytest.fixture
def jobs(home: Path) -> tuple[str, str]:
    """The ids of a waiting and of a failed job."""

    async def make() -> None:
        database = await open_database(None, home=home)
        try:
            store = JobStore(database)
            for job_id, prompt in (("aaaa00000001", "a fox\nin snow"), ("aaaa00000002", "x" * 100)):
                request = ImageRequest(prompt=prompt, model="toy", width_px=64, height_px=64, steps=3, seed=7)
                await store.accept(Submission(request=request), job_id=JobId(job_id), max_queued=10)
            await store.fail(JobId("aaaa00000002"), {"code": "out_of_memory", "message": "no room", "hint": "less"})
        finally:
            await database.close()

    asyncio.run(make())
    return "aaaa00000001", "aaaa00000002"


def test_jobs_are_listed_newest_first_in_one_line_each(run: Run, jobs: tuple[str, str]) -> None:
    lines = run("jobs", "list").out.splitlines()
    assert [line.split()[:2] for line in lines] == [[jobs[1], "failed"], [jobs[0], "queued"]]
    assert lines[1].endswith("a fox in snow")
    assert lines[0].endswith("...")


def test_the_list_can_be_cut_by_state_and_text(run: Run, jobs: tuple[str, str]) -> None:
    assert [job["id"] for job in run("jobs", "list", "--state", "failed", "--json").json["jobs"]] == [jobs[1]]
    assert [job["id"] for job in run("jobs", "list", "--search", "FOX", "--json").json["jobs"]] == [jobs[0]]
    assert [job["id"] for job in run("jobs", "list", "--limit", "1", "--json").json["jobs"]] == [jobs[1]]
    refused = run("jobs", "list", "--state", "lost")
    assert (refused.code, "is not one of queued" in refused.err) == (2, True)


def test_a_job_is_shown_with_why_it_failed(run: Run, jobs: tuple[str, str]) -> None:
    assert "error: code out_of_memory, message no room, hint less" in run("jobs", "show", jobs[1]).out
    assert run("jobs", "show", jobs[0], "--json").json["seed"] == 7


@pytest.mark.parametrize("command", ["show", "cancel", "retry"])
def test_an_unknown_job_is_told(run: Run, command: str) -> None:
    answer = run("jobs", command, "nobody")
    assert (answer.code, "there is no job 'nobody'" in answer.err) == (1, True)


def test_a_waiting_job_is_cancelled_and_tried_again(run: Run, jobs: tuple[str, str]) -> None:
    assert run("jobs", "cancel", jobs[0]).out == f"{jobs[0]} is cancelled\n"
    assert "is cancelled already" in run("jobs", "cancel", jobs[0]).err
    assert run("jobs", "retry", jobs[0], "--json").json["state"] == "queued"


def test_only_an_ended_job_is_tried_again(run: Run, jobs: tuple[str, str]) -> None:
    assert "is queued; only a failed or cancelled job" in run("jobs", "retry", jobs[0]).err
    assert run("jobs", "retry", jobs[1]).out == f"{jobs[1]} is queued\n"
