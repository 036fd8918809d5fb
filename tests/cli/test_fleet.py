"""`sdfleet router`, `node` and `fleet` as real processes with a real broker: a person's first ten minutes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx2
import pytest

from sdfleet import compose
from tests.cli.conftest import Run
from tests.fleet.brokers import free_port

PATIENCE_S = 120.0
CODE = re.compile(r"sdf1-[a-z0-9]+")


class Process:
    """A command that runs on; its words are read as they come."""

    def __init__(self, *arguments: str, env: Mapping[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SD_")}  # noqa: TID251 - for a child
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "sdfleet", *arguments], env={**kept, **env}, text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._said: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self._news:
                self._said.append(line)
                self._news.notify_all()

    @property
    def said(self) -> str:
        return "".join(self._said)

    def wait_for(self, text: str) -> str:
        """Return what it has said once this is in it."""
        with self._news:
            assert self._news.wait_for(lambda: text in self.said, PATIENCE_S), self.said
        return self.said

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after this signal."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        code = self.popen.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return code


class FleetOfProcesses:
    """A router on free ports, and what is needed to talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.broker_port = free_port(), free_port()
        self.env = {"SD_HOME": str(folder / "router"), "SD_DISCOVERY": "false", "SD_BROKER_HOST": "127.0.0.1"}
        self.router = self.start_router()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_router(self) -> Process:
        ports = ("--port", str(self.port), "--broker-port", str(self.broker_port))
        process = Process("router", *ports, env={**self.env, "SD_DRAIN_S": "1"})
        process.wait_for("this router gives out work")
        return process

    def node(self, name: str, *arguments: str) -> Process:
        env = {"SD_HOME": str(self.folder / name), "SD_BACKEND": "fake", "SD_DISCOVERY": "false"}
        return Process("node", "--name", name, *arguments, env=env)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetOfProcesses]:
    made = FleetOfProcesses(tmp_path_factory.mktemp("fleet"))
    try:
        yield made
    finally:
        made.router.end()


def _picture(fleet: FleetOfProcesses) -> httpx2.Response:
    asked = {"model": "starter", "prompt": "a fox", "steps": 2, "seed": 1}
    return httpx2.post(f"{fleet.url}/api/generate-image", json=asked, timeout=PATIENCE_S)


def test_two_commands_make_a_fleet_that_outlives_its_processes(
    fleet: FleetOfProcesses, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_HOME", fleet.env["SD_HOME"])
    code = CODE.search(fleet.router.said)
    assert code is not None
    node = fleet.node("alpha", "--join", code[0])
    try:
        fleet.router.wait_for("standing=online")
        drawn = _picture(fleet)
        assert (drawn.status_code, drawn.headers["x-fleet-node"]) == (200, "alpha")
        assert "alpha" in run("fleet", "status").out
        assert "alpha: done in" in run("fleet", "explain", drawn.headers["x-job-id"]).out

        assert fleet.router.end(signal.SIGKILL) == -signal.SIGKILL
        fleet.router = fleet.start_router()
        fleet.router.wait_for("standing=online")
        again = _picture(fleet)
        assert again.headers["x-fleet-node"] == "alpha"

        assert run("fleet", "revoke", "alpha").out == "alpha is out\n"
        assert node.popen.wait(PATIENCE_S) == 1
        assert "has revoked node alpha" in node.wait_for("revoked")
        node.end()
        node = fleet.node("alpha")
        assert node.popen.wait(PATIENCE_S) == 1
        assert "has revoked node alpha" in node.wait_for("revoked")
    finally:
        node.end()


def test_a_node_goes_when_it_is_asked_to(fleet: FleetOfProcesses, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_HOME", fleet.env["SD_HOME"])
    code = CODE.search(run("fleet", "code").out)
    assert code is not None
    node = fleet.node("beta", "--join", code[0])
    try:
        node.wait_for("node beta serves")
        fleet.router.wait_for("node=beta standing=online")
    finally:
        assert node.end() == 0


def test_a_used_code_is_refused_with_the_way_out(
    fleet: FleetOfProcesses, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_HOME", fleet.env["SD_HOME"])
    code = CODE.search(run("fleet", "code").out)
    assert code is not None
    first = fleet.node("gamma", "--join", code[0])
    first.wait_for("has joined")
    second = fleet.node("delta", "--join", code[0])
    try:
        assert second.popen.wait(PATIENCE_S) == 1
        assert "sdfleet fleet code" in second.wait_for("error:")
    finally:
        first.end()
        second.end()


def test_a_taken_broker_port_is_told_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"SD_HOME": str(tmp_path), "SD_BROKER_HOST": "127.0.0.1", "SD_DISCOVERY": "false"}
        process = Process("router", "--port", str(free_port()), "--broker-port", str(port), env=env)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(PATIENCE_S)
        assert process.end() == 1
        assert f"{port} cannot be listened on" in process.said
        assert "end the program that has the port" in process.said


def test_without_a_router_the_fleets_commands_say_how_to_start_one(run: Run) -> None:
    answer = run("fleet", "status")
    assert answer.code == 1
    assert "sdfleet router" in answer.err


def test_a_missing_extra_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(compose, "_FLEET_PACKAGES", ("no_such_package",))
    answer = run("router")
    assert answer.code == 1
    assert "pip install 'sdfleet[fleet]'" in answer.err


def test_a_code_that_is_none_is_refused(run: Run) -> None:
    answer = run("node", "--join", "hello")
    assert answer.code == 2
    assert "sdf1-" in answer.err
