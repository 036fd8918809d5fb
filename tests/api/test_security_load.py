"""Clients that cost nothing: idle, deaf, slow or gone; and an event loop that none of them holds up."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from sdfleet.domain import JobId, Picture
from sdfleet.storage import pictures
from tests.api.serving import PATIENCE_S, running
from tests.api.test_chaos import life
from tests.api.test_security_bodies import connect

N_IDLE = 10_000
# What is left for everything else this process has open.
N_SPARE_FILES = 500


@contextlib.contextmanager
def many_files(n_wanted: int) -> Iterator[int]:
    """How many files may be opened now, at most as many as wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = n_wanted + N_SPARE_FILES if hard == resource.RLIM_INFINITY else min(n_wanted + N_SPARE_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        yield min(n_wanted, max(soft, most) - N_SPARE_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_ten_thousand_idle_connections_cost_little_and_health_answers(tmp_path: Path) -> None:
    with life(tmp_path, SD_BACKEND="fake") as one, many_files(N_IDLE) as n_idle, contextlib.ExitStack() as idle:
        # Fewer only where the machine's hard limit of open files is lower.
        assert n_idle == N_IDLE or resource.getrlimit(resource.RLIMIT_NOFILE)[1] < N_IDLE + N_SPARE_FILES
        one.until(lambda _: bool(one.url))
        with httpx2.Client(base_url=one.url, timeout=PATIENCE_S) as client:
            assert client.get("/health").status_code == 200
            server = psutil.Process(one.process.pid)
            n_files, n_bytes = server.num_fds(), server.memory_info().rss
            address = ("127.0.0.1", int(one.url.rpartition(":")[2]))
            let_go = select.poll()
            for i in range(n_idle):
                connection = idle.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
                let_go.register(connection, select.POLLIN)
                if i % 3 == 1:
                    connection.sendall(b"GET /health HT")
                elif i % 3 == 2:
                    connection.sendall(b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
                if i % 1000 == 0:
                    assert client.get("/health").status_code == 200
            # Some still wait in the kernel to be accepted. A busy machine may take so long to open them all that the
            # server has already hung up on the first, as it should on a head or body that does not come.
            _asked_until(client, lambda: server.num_fds() + len(let_go.poll(0)) >= n_files + n_idle)
            assert server.memory_info().rss - n_bytes < n_idle * 64 * 1024
            idle.close()
            _asked_until(client, lambda: server.num_fds() <= n_files + 50)


def _asked_until(client: httpx2.Client, is_so: Callable[[], bool]) -> None:
    """Ask for /health, which answers each time, until something is so."""
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert client.get("/health").status_code == 200
        assert time.monotonic() < end_s


def test_readers_of_events_that_never_read_or_leave_hold_up_nobody(tmp_path: Path) -> None:
    # Each event tells the prompt: what a hundred deaf readers are owed is more than a gigabyte in the end.
    asked = {"prompt": "a " * 15_000, "steps": 500}
    with running(tmp_path) as here, httpx2.Client(base_url=here.url, timeout=PATIENCE_S) as client:
        with here.holding() as gate, contextlib.ExitStack() as readers:
            job_id = client.post("/api/jobs", json=asked).json()["id"]
            gate.wait_for_job()
            head = f"GET /api/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            deaf = [readers.enter_context(connect(here)) for _ in range(100)]
            for reader in deaf:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                reader.sendall(head)
                assert reader.recv(1) == b"H"  # it is being told
            slow = readers.enter_context(connect(here))
            slow.sendall(head)
            before = psutil.Process().memory_info().rss
            for i in range(100):
                gate.let(5)
                slow.recv(1)
                if i < 50:
                    deaf[i].close()
                assert client.get("/health").status_code == 200
            gate.let()
            with client.stream("GET", f"/api/jobs/{job_id}/events") as events:
                assert any(line == "event: done" for line in events.iter_lines())
            assert psutil.Process().memory_info().rss - before < 200 * 2**20
        assert client.get(f"/api/jobs/{job_id}").json()["state"] == "done"
        assert not here.house.desk._board.lives


def test_a_stream_nobody_reads_any_more_takes_its_job_along(tmp_path: Path) -> None:
    with running(tmp_path) as here, httpx2.Client(base_url=here.url, timeout=PATIENCE_S) as client:
        for path, body in (
            ("/v1/images/generations", {"prompt": "a", "steps": 50, "stream": True, "partial_images": 3}),
            ("/api/generate", {"model": "starter", "prompt": "a", "steps": 50}),
            ("/api/txt2img", {"prompt": "a", "steps": 50}),
            ("/sdapi/v1/txt2img", {"prompt": "a", "steps": 50}),
        ):
            with here.holding() as gate:
                with connect(here) as leaver:
                    data = json.dumps(body).encode()
                    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
                    leaver.sendall(head.encode() + data)
                    gate.wait_for_job()
                job_id = client.get("/api/jobs?limit=1").json()["jobs"][0]["id"]
                ended = here.call(here.house.desk.wait(JobId(job_id)))
            assert ended.state == "cancelled", path
        assert not here.app.state.waiting.n_waiting


# ----------------------------------------------------------------------------------------------------- the event loop


class Held:
    """Callbacks that held the event loop of a thread, in seconds of that thread's own work."""

    def __init__(self, limit_s: float) -> None:
        self.found: list[tuple[float, str]] = []
        self._limit_s = limit_s
        self._real: Callable[[asyncio.Handle], None] = asyncio.Handle._run

    def run(self, handle: asyncio.Handle) -> None:
        # Not the clock on the wall: a busy machine is slow without any fault of ours.
        begun_s = time.thread_time()
        task = getattr(getattr(handle, "_callback", None), "__self__", None)
        self._real(handle)
        spent_s = time.thread_time() - begun_s
        if spent_s > self._limit_s:
            what = task.get_coro() if isinstance(task, asyncio.Task) else handle
            self.found.append((round(spent_s, 3), repr(what)))


def _noise(side_px: int) -> str:
    picture = Picture(width_px=side_px, height_px=side_px, mode="RGB", data=os.urandom(3 * side_px**2))
    return base64.b64encode(pictures.encode(picture, "png")).decode()


@pytest.mark.slow
def test_large_pictures_in_and_out_never_hold_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side_px = 1536
    image = _noise(side_px)
    size = {"width": side_px, "height": side_px}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/api/img2img", {"prompt": "a", "image": image, "n": 2, **size}),
        ("/api/jobs", {"prompt": "a", "image": image, "mask": image, **size}),
        ("/v1/images/edits", {"prompt": "a", "image": image, "n": 2, "size": f"{side_px}x{side_px}"}),
        (
            "/v1/images/generations",
            {"prompt": "a", "size": f"{side_px}x{side_px}", "stream": True, "partial_images": 2},
        ),
        ("/sdapi/v1/img2img", {"prompt": "a", "init_images": [image], "mask": image, **size}),
        ("/sdapi/v1/png-info", {"image": image}),
        ("/sdapi/v1/extra-single-image", {"image": image, "upscaler_1": "Lanczos", "upscaling_resize": 1.5}),
        ("/api/generate", {"model": "starter", "prompt": "a", "images": [image], **size}),
        ("/api/generate-image", {"model": "starter", "prompt": "a", **size}),
        ("/v1/flux-pro-1.1", {"prompt": "a", "input_image": image, **size}),
        ("/generate", {"prompt": "a", **size}),
    ]
    with running(tmp_path, loop="asyncio") as here:
        # The framework builds its table of routes with the first request, once: 45 ms.
        assert httpx2.get(f"{here.url}/nowhere").status_code == 404
        held = Held(0.05)
        monkeypatch.setattr(asyncio.Handle, "_run", lambda handle: held.run(handle))  # noqa: PLW0108 - a method of the class it replaces

        def ask(path: str, body: dict[str, Any]) -> None:
            answers.append(
                (path, httpx2.post(here.url + path, json={"steps": 2, **body}, timeout=PATIENCE_S).status_code)
            )

        answers: list[tuple[str, int]] = []
        threads = [threading.Thread(target=ask, args=one) for one in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
    assert sorted(answers) == sorted((path, 202 if path == "/api/jobs" else 200) for path, _ in asked)
    assert held.found == []
