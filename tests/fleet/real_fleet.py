"""A fleet of real processes on this machine: `sdfleet router` with its broker, `sdfleet node`s, clients that insist.

Everything here may be killed at any moment; what is killed is started again, as systemd would do it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai

from sdfleet.storage import pictures
from tests.fleet.brokers import free_port

# Longer than anything here takes; reached only where something hangs.
PATIENCE_S = 600.0
# How long a client waits before it asks again, and how often somebody looks whether something has come about.
AGAIN_S = 0.2


@dataclass(slots=True, eq=False)
class Program:
    """One `sdfleet` command through all its lives. log: what it said in all of them, one JSON object a line.

    inside: a command before it, such as one that enters a network namespace.
    """

    words: tuple[str, ...]
    env: Mapping[str, object]
    log: Path
    inside: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    n_kills: int = 0

    def start(self) -> None:
        """Begin a life."""
        env = os.environ | {name: str(value) for name, value in self.env.items()}  # noqa: TID251 - set for a child
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.inside, sys.executable, "-m", "sdfleet", *self.words],
                env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL: nothing is said or tidied up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.n_kills += 1

    def end(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()

    def check(self) -> None:
        """Raise if it has ended by itself."""
        assert self.process is not None
        assert self.process.poll() is None, f"{' '.join(self.words)} ended: {self.tail()}"

    def tail(self) -> str:
        """The last of what it said."""
        return "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-8:])

    def records(self) -> Iterator[dict[str, Any]]:
        """Everything it said in a whole line of JSON."""
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(record := json.loads(line), dict):
                    yield record

    def said(self, message: str) -> list[dict[str, Any]]:
        """Every record of this message."""
        return [record for record in self.records() if record.get("message") == message]


@dataclass(slots=True, eq=False)
class RealFleet:
    """The router and the nodes, with their data folders below `folder`."""

    folder: Path
    router: Program
    url: str
    broker_port: int
    nodes: dict[str, Program] = field(default_factory=dict)
    n_broker_kills: int = 0

    def add_node(self, name: str, *, inside: tuple[str, ...] = (), **env: object) -> Program:
        """One more node: joined with a code of its own, started, not waited for."""
        answer = httpx2.post(f"{self.url}/fleet/code", timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        node = Program(
            words=("node", "--join", answer.json()["code"], "--name", name),
            env={**_ENV, "SD_HOME": self.folder / name, "SD_NODE_SLOTS": 1, **env},
            log=self.folder / f"{name}.log",
            inside=inside,
        )
        self.nodes[name] = node
        node.start()
        return node

    def status(self) -> dict[str, Any]:
        """What the router says of its nodes."""
        answer = httpx2.get(f"{self.url}/fleet/status", timeout=PATIENCE_S)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def wait_for_nodes(self, n_nodes: int | None = None) -> None:
        """Return when so many nodes are here; all of them."""
        wanted = len(self.nodes) if n_nodes is None else n_nodes
        self.until(lambda: self._n_online() >= wanted, what=f"{wanted} nodes")
        for node in self.nodes.values():
            # A code is good once: the next lives know who they are.
            node.words = tuple(word for word in node.words if not word.startswith("sdf"))
            node.words = tuple(word for word in node.words if word != "--join")

    def _n_online(self) -> int:
        for node in self.nodes.values():
            node.check()
        n_online: int = self.status()["fleet"]["nodes_online"]
        return n_online

    def until(self, is_so: Callable[[], bool], *, what: str) -> None:
        """Return when it is so. A router that is away just now says nothing either way."""
        ticks = threading.Event()
        for _ in range(int(PATIENCE_S / AGAIN_S)):
            with contextlib.suppress(httpx2.HTTPError):
                if is_so():
                    return
            ticks.wait(AGAIN_S)
        raise AssertionError(f"never came about: {what}; the router says {self.router.tail()}")

    def broker_pids(self) -> list[int]:
        """Every process of the router's broker, the newest last."""
        return [record["pid"] for record in self.router.said("the broker listens") if record["pid"]]

    def kill_broker(self) -> None:
        """SIGKILL to the broker that listens now."""
        for pid in reversed(self.broker_pids()):
            if _is_broker(pid):
                os.kill(pid, signal.SIGKILL)
                self.n_broker_kills += 1
                return

    def kill(self, who: str) -> None:
        """SIGKILL to `router`, `broker` or a node; what is not started again by somebody is started again here."""
        if who == "broker":
            self.kill_broker()
            return
        program = self.router if who == "router" else self.nodes[who]
        program.kill()
        program.start()

    def executions(self) -> list[str]:
        """Job ids as nodes began to draw them, killed ones too."""
        return [record["job_id"] for node in self.nodes.values() for record in node.said("job started")]

    def faults(self) -> list[str]:
        """What any process called an error, or said in no known form and with a traceback."""
        programs = [self.router, *self.nodes.values()]
        told = [json.dumps(r) for p in programs for r in p.records() if r.get("level") in {"error", "critical"}]
        return told + [p.words[0] for p in programs if re.search(r"^Traceback", p.log.read_text(), re.MULTILINE)]

    def spooled(self) -> list[Path]:
        """Finished jobs that lie at the nodes."""
        return [path for name in self.nodes for path in (self.folder / name).rglob("spool/*") if path.is_file()]


_ENV: dict[str, object] = {
    "SD_LOG_JSON": 1, "SD_LOG_LEVEL": "info", "SD_DISCOVERY": "false", "SD_THREADS": 1, "SD_DEVICE": "cpu",
    "SD_DTYPE": "float32", "SD_EXECUTOR": "torch", "SD_ENGINES": 1, "SD_DRAIN_S": 5,
}  # fmt: skip


@contextlib.contextmanager
def real_fleet(folder: Path, *, inside: tuple[str, ...] = (), **env: object) -> Iterator[RealFleet]:
    """A router without nodes, that answers. inside: see `Program`. env: settings of the router."""
    folder.mkdir(parents=True, exist_ok=True)
    port, broker_port = free_port(), free_port()
    router = Program(
        words=("router",),
        env={
            **_ENV, "SD_HOME": folder / "router", "SD_ROUTER_PORT": port, "SD_BROKER_PORT": broker_port,
            "SD_BROKER_HOST": "127.0.0.1", "SD_BROKER_NAMES": "127.0.0.1", **env,
        },
        log=folder / "router.log",
        inside=inside,
    )  # fmt: skip
    fleet = RealFleet(folder=folder, router=router, url=f"http://127.0.0.1:{port}", broker_port=broker_port)
    router.start()
    try:
        fleet.until(lambda: _answers(fleet), what="a router")
        yield fleet
    finally:
        for program in [*fleet.nodes.values(), router]:
            if program.process is not None:
                program.end()
        for pid in fleet.broker_pids():
            if _is_broker(pid):  # of a router that was killed
                os.kill(pid, signal.SIGKILL)


def _answers(fleet: RealFleet) -> bool:
    fleet.router.check()
    return httpx2.get(f"{fleet.url}/health", timeout=PATIENCE_S).status_code == httpx2.codes.OK


def _is_broker(pid: int) -> bool:
    try:
        return b"nats-server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One job of a client. key: its Idempotency-Key."""

    key: str
    prompt: str
    seed: int
    steps: int
    size: str = "128x128"


@dataclass(slots=True, eq=False)
class Clients:
    """Programs with OpenAI's client that ask for pictures and ask again, with the same key, until they have them.

    pixels: by key. again: how often a client had to ask again.
    """

    fleet: RealFleet
    asked: list[Asked]
    pixels: dict[str, bytes] = field(default_factory=dict)
    again: int = 0
    done: queue.Queue[str] = field(default_factory=queue.Queue)
    refused: list[str] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _left: queue.Queue[Asked] = field(default_factory=queue.Queue)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self, n_clients: int) -> None:
        """Ask for everything, `n_clients` at a time."""
        for one in self.asked:
            self._left.put(one)
        self._threads = [threading.Thread(target=self._work) for _ in range(n_clients)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, n_more: int) -> None:
        """Return when so many more pictures have come; a client that was refused counts too."""
        for _ in range(n_more):
            self.done.get(timeout=PATIENCE_S)

    def close(self) -> None:
        """Ask for nothing any more."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        with openai.OpenAI(
            base_url=f"{self.fleet.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        ) as client:
            while not self._stop.is_set():
                try:
                    one = self._left.get_nowait()
                except queue.Empty:
                    return
                self._insist(client, one)
                self.done.put(one.key)

    def _insist(self, client: openai.OpenAI, one: Asked) -> None:
        while not self._stop.is_set():
            try:
                answer = client.images.generate(
                    prompt=one.prompt, size=one.size, extra_body={"seed": one.seed, "steps": one.steps},
                    extra_headers={"Idempotency-Key": one.key},
                )  # fmt: skip
            except openai.APIStatusError as exc:
                if exc.status_code not in {httpx2.codes.TOO_MANY_REQUESTS, httpx2.codes.SERVICE_UNAVAILABLE}:
                    self.refused.append(f"{one.key}: {exc}")
                    return
            except openai.APIConnectionError:
                pass
            else:
                assert answer.data is not None
                found = pictures.decode(base64.b64decode(answer.data[0].b64_json or ""))
                self.pixels[one.key] = found.data
                return
            self.again += 1
            self._stop.wait(AGAIN_S)
