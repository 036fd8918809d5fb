"""The router's own broker: a nats-server that it starts, watches, starts again, and tells who may connect.

Who wants another broker sets SD_NATS_URL; then nothing here is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from sdfleet.errors import StoreUnavailable

log = logging.getLogger(__name__)

PROGRAM = "nats-server"
MAX_PAYLOAD_BYTES = 2**20
# It listens 20 ms after its start; with a large ledger on a slow disk, later.
START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 5.0
_PROBE_S = 0.02
_AGAIN_FIRST_S, _AGAIN_MOST_S = 0.1, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Who may connect, and what it may say and hear. One of: nkey (public), or user with bcrypt-ed password.

    publish, subscribe: subjects with wildcards; None: everything. denied: neither said nor heard all the same.
    """

    nkey: str | None = None
    user: str | None = None
    password: str | None = None
    publish: tuple[str, ...] | None = None
    subscribe: tuple[str, ...] | None = None
    denied: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"User({self.nkey or self.user})"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """What the broker is told. tls_certificate, tls_key: PEM files; None: no TLS, for loopback alone."""

    host: str = "127.0.0.1"
    port: int = 4222
    users: tuple[User, ...] = ()
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    n_connections: int = 4096


def rendered(config: BrokerConfig, *, folder: Path) -> str:
    """The server's configuration file: its format takes JSON values.

    JetStream syncs every write: after a power cut right after 200 acknowledged writes the default kept none of them.
    """
    tls = ""
    if config.tls_certificate is not None and config.tls_key is not None:
        files = f"cert_file: {_text(config.tls_certificate)}, key_file: {_text(config.tls_key)}"
        tls = f"tls {{ {files}, handshake_first: true, timeout: 5 }}\n"
    return (
        f"host: {_text(config.host)}\n"
        f"port: {config.port}\n"
        f"pid_file: {_text(folder / 'nats.pid')}\n"
        f"log_file: {_text(folder / 'nats.log')}\n"
        "logfile_size_limit: 10MB\n"
        f"max_payload: {MAX_PAYLOAD_BYTES}\n"
        f"max_connections: {config.n_connections}\n"
        "write_deadline: 10s\n"
        f"jetstream {{ store_dir: {_text(folder / 'jetstream')}, sync_interval: always }}\n"
        f"{tls}"
        f"{authorization(config.users)}"
    )


def authorization(users: tuple[User, ...]) -> str:
    """The part of the configuration that says who may connect: also what the operator of another broker is given."""
    lines = "\n".join(f"  {_user(user)}" for user in users)
    return f"authorization {{ timeout: 5, users: [\n{lines}\n] }}\n"


def _text(value: object) -> str:
    return json.dumps(str(value))


def _user(user: User) -> str:
    who = {"nkey": user.nkey} if user.nkey else {"user": user.user, "password": user.password}
    rights = {"publish": _right(user.publish, user.denied), "subscribe": _right(user.subscribe, user.denied)}
    given = {name: right for name, right in rights.items() if right}
    return json.dumps({**who, "permissions": given} if given else who)


def _right(allowed: tuple[str, ...] | None, denied: tuple[str, ...]) -> dict[str, list[str]]:
    """Nothing allowed is spelled as everything denied: an empty list would allow everything."""
    if allowed == ():
        return {"deny": [">"]}
    right = {"allow": list(allowed)} if allowed else {}
    return {**right, "deny": list(denied)} if denied else right


def find_program() -> str:
    """The nats-server that came with the extra, or the one on PATH. Raises StoreUnavailable with the way out."""
    beside = Path(sys.executable).parent / (PROGRAM + (".exe" if os.name == "nt" else ""))
    found = str(beside) if beside.exists() else shutil.which(PROGRAM)
    if found is None:
        raise StoreUnavailable(
            "there is no nats-server here",
            hint="pip install 'sdfleet[fleet]', or set SD_NATS_URL to a broker that runs already",
        )
    return found


class Broker:
    """One nats-server, from `start` to `close`; started again when it ends.

    folder: its configuration, log and ledger; made with rights for this user only.
    on_start: called on the event loop whenever it listens (again).
    """

    def __init__(self, folder: Path, config: BrokerConfig, *, on_start: Callable[[], None] | None = None) -> None:
        self.config = config
        self.n_starts = 0
        self._folder = folder
        self._on_start = on_start or (lambda: None)
        self._process: Process | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def _conf(self) -> Path:
        return self._folder / "nats.conf"

    @property
    def pid(self) -> int | None:
        """Of the running server."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Start it and return when it listens. Raises StoreUnavailable with its last words."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        await asyncio.to_thread(self._end_orphan)
        self._write()
        await self._launch()
        self._watch = asyncio.create_task(self._keep_alive(), name="broker")

    async def become(self, config: BrokerConfig) -> None:
        """Another set of users, without a restart: whose user is gone is disconnected at once."""
        self.config = config
        self._write()
        if self.pid is None:
            return  # it reads the file when it starts again
        if os.name == "nt":  # no signals there; a restart takes 20 ms and loses nothing
            self._process.terminate() if self._process else None
            return
        os.kill(self.pid, signal.SIGHUP)

    async def close(self) -> None:
        """End it; the ledger stays."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.wait({watch})
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(STOP_DEADLINE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def _write(self) -> None:
        temporary = self._conf.with_suffix(".new")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(rendered(self.config, folder=self._folder))
        temporary.replace(self._conf)

    def _end_orphan(self) -> None:
        """End the server of this folder that a killed router left behind: it would keep the port and the old users."""
        try:
            pid = int((self._folder / "nats.pid").read_text(encoding="ascii"))
            process = psutil.Process(pid)
            if str(self._conf) not in process.cmdline():
                return  # the number is another program's now
            log.info("the broker of a router that was killed is ended", extra={"pid": pid})
            process.terminate()
            try:
                process.wait(STOP_DEADLINE_S)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(STOP_DEADLINE_S)
        except (OSError, ValueError, psutil.Error):
            return  # there is none

    def _check_port(self) -> None:
        """Raise StoreUnavailable where another program has the port: it would be taken for our server."""
        family = socket.AF_INET6 if ":" in self.config.host else socket.AF_INET
        with socket.socket(family) as probe:
            if os.name != "nt":  # there it would let two programs have one port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.config.host, self.config.port))
            except OSError as exc:
                raise StoreUnavailable(
                    f"{self.config.host}:{self.config.port} cannot be listened on: {exc.strerror or exc}",
                    hint="end the program that has the port, or name another: SD_BROKER_PORT",
                ) from exc

    async def _launch(self) -> None:
        program = find_program()
        self._check_port()
        try:
            self._process = await asyncio.create_subprocess_exec(
                program, "-c", str(self._conf),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
                # Ctrl-C at the terminal is the router's to handle: it drains, and ends the broker last.
                start_new_session=True,
            )  # fmt: skip
        except OSError as exc:
            raise StoreUnavailable(f"{program} cannot be started: {exc.strerror or exc}") from exc
        await self._listening(self._process)
        self.n_starts += 1
        log.info("the broker listens", extra={"host": self.config.host, "port": self.config.port, "pid": self.pid})
        self._on_start()

    async def _listening(self, process: Process) -> None:
        host = "127.0.0.1" if self.config.host in {"0.0.0.0", "::"} else self.config.host  # noqa: S104
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                while True:
                    if process.returncode is not None:
                        raise StoreUnavailable(
                            f"nats-server ended at once: {self._last_words()}",
                            hint=f"is port {self.config.port} taken? see {self._folder / 'nats.log'}",
                        )
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_connection(host, self.config.port)
                        writer.close()
                        return
                    await asyncio.sleep(_PROBE_S)
        except TimeoutError as exc:
            process.kill()
            raise StoreUnavailable(f"nats-server did not listen within {START_DEADLINE_S:g} s") from exc

    def _last_words(self) -> str:
        try:
            lines = (self._folder / "nats.log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "it left no log"
        faults = [line for line in lines[-20:] if "[FTL]" in line or "[ERR]" in line] or lines[-1:]
        return " / ".join(line.split("] ", 1)[-1] for line in faults)[:400]

    async def _keep_alive(self) -> None:
        pause_s = _AGAIN_FIRST_S
        while True:
            if self._process is not None:
                code = await self._process.wait()
                log.warning("the broker ended and is started again", extra={"code": code, "why": self._last_words()})
            try:
                await self._launch()
                pause_s = _AGAIN_FIRST_S
            except StoreUnavailable as exc:
                log.warning("the broker cannot be started", extra={"why": str(exc)})
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _AGAIN_MOST_S)
