"""`sdfleet serve` itself, killed and stopped: each accepted job is done, once, with the pictures of a calm run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from httpx2 import Client

from sdfleet.domain import Job
from sdfleet.storage import pictures
from sdfleet.storage.database import open_database
from sdfleet.storage.jobs import JobStore
from sdfleet.storage.output_files import OutputFiles

N_JOBS = 50
# Longer than anything here takes; reached only where something hangs.
PATIENCE_S = 120.0


@dataclass(slots=True)
class Life:
    """One life of a server's process. lines: what it says on stderr; None is the end."""

    process: subprocess.Popen[str]
    url: str = ""
    engines: list[int] = field(default_factory=list)
    lines: queue.Queue[str | None] = field(default_factory=queue.Queue)
    said: list[str] = field(default_factory=list)

    def listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.put(line)
        self.lines.put(None)

    def next(self) -> dict[str, Any] | None:
        """The next line: a record of the log, or {}; None at the end."""
        line = self.lines.get(timeout=PATIENCE_S)
        if line is None:
            return None
        self.said.append(line)
        if (found := re.search(r"listens on http://localhost:(\d+)", line)) is not None:
            self.url = f"http://127.0.0.1:{found[1]}"
        if not line.startswith("{") or not line.endswith("}\n"):
            return {}
        record: dict[str, Any] = json.loads(line)
        if record["message"] == "engine is ready":
            self.engines.append(record["pid"])
        return record

    def until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read on to a line like this."""
        while (record := self.next()) is not None:
            if is_it(record):
                return record
        raise AssertionError("the server ended: " + "".join(self.said[-5:]))

    def rest(self) -> str:
        """Everything it said, once it has ended."""
        while self.next() is not None:
            pass
        return "".join(self.said)

    def kill_engines(self) -> None:
        for pid in self.engines:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.engines.clear()


@contextlib.contextmanager
def life(home: Path, **settings: object) -> Iterator[Life]:
    given = {
        "SD_HOME": home, "SD_PORT": 0, "SD_LOG_JSON": 1, "SD_DEVICE": "cpu", "SD_DTYPE": "float32",
        "SD_EXECUTOR": "torch", "SD_ENGINES": 1, "SD_THREADS": 1, **settings,
    }  # fmt: skip
    set_by = [f"{name}={value}" for name, value in given.items()]
    process = subprocess.Popen(
        ["env", *set_by, sys.executable, "-m", "sdfleet", "serve"], stderr=subprocess.PIPE, text=True
    )
    with process:
        one = Life(process)
        reader = threading.Thread(target=one.listen)
        reader.start()
        try:
            yield one
        finally:
            process.kill()
            reader.join()


def body(i: int) -> dict[str, Any]:
    """The job of a number, the same in every life."""
    return {
        "prompt": f"a red circle number {i}", "steps": 2 + i % 3, "seed": 1000 * i, "n": 1 + i % 2,
        "reproducible": i % 2 == 0, "priority": i % 3,
    }  # fmt: skip


class Submitter(threading.Thread):
    """A client that sends every job again with the same key, as one does that never got its answer."""

    def __init__(self, url: str, ids: dict[int, str]) -> None:
        super().__init__()
        self._url, self._ids = url, ids
        self.fault: str | None = None

    def run(self) -> None:
        # A killed server is a torn connection here; the next life is asked again.
        with contextlib.suppress(httpx2.TransportError), Client(base_url=self._url, timeout=PATIENCE_S) as client:
            for i in range(N_JOBS):
                answer = client.post("/api/jobs", json=body(i), headers={"Idempotency-Key": f"job-{i}"})
                if answer.status_code != 202 or self._ids.setdefault(i, answer.json()["id"]) != answer.json()["id"]:
                    self.fault = f"job {i}: {answer.status_code} {answer.text}"
                    return


def run_to_the_end(home: Path, plan: list[tuple[str, int]]) -> tuple[dict[int, str], Counter[str], int]:
    """Lives until all jobs are done. plan: who is killed, after how many lines. Ids, ends told of each, lives."""
    ids: dict[int, str] = {}
    ends: Counter[str] = Counter()
    n_lives = 0
    while True:
        n_lives += 1
        with life(home) as one:
            one.until(lambda _: bool(one.url))
            submitter = Submitter(one.url, ids)
            submitter.start()
            try:
                is_over = _live(one, submitter, plan, ends, ids)
            finally:
                if one.process.poll() is None and not plan:
                    one.process.send_signal(signal.SIGTERM)
                submitter.join(PATIENCE_S)
            assert submitter.fault is None
            if is_over:
                return ids, ends, n_lives


def _live(
    one: Life, submitter: Submitter, plan: list[tuple[str, int]], ends: Counter[str], ids: dict[int, str]
) -> bool:
    """One life, to its killing or to the end of all jobs; True for that."""
    n_lines = 0
    while True:
        if plan and n_lines >= plan[0][1] and (one.engines or plan[0][0] == "server"):
            who, _ = plan.pop(0)
            if who in {"engine", "both"}:
                one.kill_engines()
            if who in {"server", "both"}:
                one.process.kill()
                return False
            n_lines = 0
        record = one.next()
        assert record is not None, "the server ended by itself: " + "".join(one.said[-5:])
        n_lines += 1
        if record.get("message") == "job done":
            ends[record["job_id"]] += 1
        if not plan and record.get("message") in {"job done", "request"} and not submitter.is_alive():
            with Client(base_url=one.url, timeout=PATIENCE_S) as client:
                if not client.get("/api/jobs", params={"state": ["queued", "running"], "limit": 1}).json()["jobs"]:
                    assert len(ids) == N_JOBS
                    return True


def stored(home: Path) -> list[Job]:
    async def read() -> list[Job]:
        database = await open_database(None, home=home)
        try:
            found, _ = await JobStore(database).page(limit=200)
            return found
        finally:
            await database.close()

    return asyncio.run(read())


def drawn(home: Path) -> dict[str, list[np.ndarray[Any, np.dtype[np.int16]]]]:
    """The pixels of every job's pictures, by its key."""
    files = OutputFiles(home / "outputs")
    found = {}
    for job in stored(home):
        assert job.submission.idempotency is not None
        decoded = [pictures.decode(files.read(output)) for output in job.outputs]
        found[job.submission.idempotency.key] = [np.frombuffer(one.data, np.uint8).astype(np.int16) for one in decoded]
    return found


@pytest.mark.slow
def test_fifty_jobs_survive_kills_of_the_server_its_engine_and_both(tmp_path: Path) -> None:
    run_to_the_end(tmp_path / "calm", [])
    luck = random.Random(4)
    kinds = ["server", "engine", "both", "server", "engine", "both"]
    luck.shuffle(kinds)
    ids, ends, n_lives = run_to_the_end(tmp_path / "chaos", [(kind, luck.randrange(5, 90)) for kind in kinds])

    assert n_lives == 5, "a life for each kill of the server, and the last"
    jobs = stored(tmp_path / "chaos")
    assert {job.id for job in jobs} == set(ids.values())
    assert [job.state for job in jobs] == ["done"] * N_JOBS
    assert max(ends.values()) == 1
    files = OutputFiles(tmp_path / "chaos" / "outputs")
    assert files.usage().n_files == sum(job.request.n_images for job in jobs), "a file that belongs to no job"
    calm, chaos = drawn(tmp_path / "calm"), drawn(tmp_path / "chaos")
    assert calm.keys() == chaos.keys()
    for i in range(N_JOBS):
        pairs = list(zip(calm[f"job-{i}"], chaos[f"job-{i}"], strict=True))
        assert len(pairs) == body(i)["n"]
        most = max(int(np.abs(one - other).max()) for one, other in pairs)
        assert most <= (0 if body(i)["reproducible"] else 2), f"job {i} differs by {most}"


def _begin_three(one: Life) -> list[str]:
    """Three long jobs, of which the first is being drawn; the ids."""
    one.until(lambda _: bool(one.url))
    with Client(base_url=one.url, timeout=PATIENCE_S) as client:
        bodies = [{"prompt": "a circle", "steps": 60, "seed": i} for i in range(3)]
        ids: list[str] = [client.post("/api/jobs", json=body).json()["id"] for body in bodies]
        with client.stream("GET", f"/api/jobs/{ids[0]}/events?previews=false") as events:
            assert any(line == "event: step" for line in events.iter_lines())
    return ids


@pytest.mark.slow
def test_sigterm_lets_the_running_job_end_and_keeps_the_others(tmp_path: Path) -> None:
    heard: list[httpx2.Response] = []

    def wait_for_a_picture(url: str) -> None:
        heard.append(httpx2.post(f"{url}/api/txt2img", json={"prompt": "late", "steps": 2}, timeout=PATIENCE_S))

    with life(tmp_path, SD_MAX_PICTURES=1, SD_DRAIN_S=60) as one:
        ids = _begin_three(one)
        with Client(base_url=one.url, timeout=PATIENCE_S) as client:
            while client.get("/status").json()["loaded"] is False:
                one.next()
        waiter = threading.Thread(target=wait_for_a_picture, args=(one.url,))
        waiter.start()
        one.until(lambda record: record.get("message") == "job queued" and record["dialect"] == "native")
        one.process.send_signal(signal.SIGTERM)
        waiter.join(PATIENCE_S)
        said = one.rest()
        assert one.process.wait(PATIENCE_S) == 0, said
    assert "Traceback" not in said
    by_id = {str(job.id): job for job in stored(tmp_path)}
    assert [by_id[id_].state for id_ in ids] == ["done", "queued", "queued"]
    # Its picture is drawn too: the caller was told to come back, and did not leave.
    assert (heard[0].status_code, heard[0].json()["code"]) == (503, "shutting_down")
    assert sorted(job.state for job in by_id.values()) == ["done", "queued", "queued", "queued"]


@pytest.mark.slow
def test_a_job_that_does_not_end_within_the_drain_is_drawn_by_the_next_life(tmp_path: Path) -> None:
    with life(tmp_path, SD_MAX_PICTURES=1, SD_DRAIN_S=0) as one:
        ids = _begin_three(one)
        one.process.send_signal(signal.SIGTERM)
        said = one.rest()
        assert one.process.wait(PATIENCE_S) == 0, said
    with life(tmp_path) as one:
        left = set(ids)
        while left:
            left.discard(one.until(lambda record: record.get("message") == "job done")["job_id"])
    jobs = {str(job.id): job for job in stored(tmp_path)}
    assert [jobs[id_].attempts for id_ in ids] == [2, 1, 1]


def test_a_second_server_on_the_same_home_is_refused_in_one_line(tmp_path: Path) -> None:
    with life(tmp_path, SD_BACKEND="fake") as first:
        first.until(lambda _: bool(first.url))
        assert httpx2.get(f"{first.url}/health", timeout=PATIENCE_S).status_code == 200
        with life(tmp_path, SD_BACKEND="fake") as second:
            said = second.rest()
            assert second.process.wait(PATIENCE_S) == 1
        assert f"error: another server (process {first.process.pid}) uses {tmp_path}" in said
        assert "Traceback" not in said
        first.process.send_signal(signal.SIGTERM)
        first.rest()
        assert first.process.wait(PATIENCE_S) == 0


def test_the_lock_goes_with_a_killed_server(tmp_path: Path) -> None:
    with life(tmp_path, SD_BACKEND="fake") as first:
        first.until(lambda _: bool(first.url))
        httpx2.get(f"{first.url}/health", timeout=PATIENCE_S)
        first.process.kill()
    with life(tmp_path, SD_BACKEND="fake") as second:
        second.until(lambda _: bool(second.url))
        assert httpx2.get(f"{second.url}/health", timeout=PATIENCE_S).status_code == 200
