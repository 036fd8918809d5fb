"""A network between namespaces of this machine, made in Python: packets that are late, few at a time, or lost.

Linux alone. The kernel's own netem is a module that a container rarely has; TUN devices it has nearly always.

    namespace of the router:  tun device --\\
                                            >-- Wire (a thread): delay, rate, loss, cut --> real TCP on both sides
    namespace of a node:      tun device --/

`python -m tests.fleet.wire FD NAME ADDRESS` is the node's side: it makes the device, hands it over, and holds the
namespace until its stdin is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

ROUTER = "10.77.0.1"
_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000
_MTU = 1500


def why_not() -> str:
    """What this machine lacks for it; empty where nothing."""
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun here"
    missing = [program for program in ("unshare", "nsenter", "ip") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)}: not installed"
    made = subprocess.run([*ENTER, "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "network namespaces are not allowed here"


# A namespace in which we are root; what is started in it ends with it.
ENTER = ("unshare", "-Urn", "--kill-child")


class Wire:
    """Between the namespace that this process is in and a new one, `inside` which a node is to be started.

    delay_s: of each direction. bits_per_s: of each direction, None: as fast as it goes. loss: [0, 1) of the packets.
    is_cut: nothing arrives. All may be set at any moment.
    """

    # What waits before the slow part: 0.1 s at 20 Mbit/s, as in a home router.
    QUEUE_BYTES = 256 * 1024

    def __init__(self, number: int) -> None:
        self.delay_s = 0.0
        self.bits_per_s: float | None = None
        self.loss = 0.0
        self.is_cut = False
        self.n_carried = self.n_lost = 0
        self._luck = random.Random(number)
        address, device = f"10.77.{number}.2", f"wire{number}"
        here = _device(device)
        _ip("addr", "add", f"{ROUTER}/32", "peer", f"{address}/32", "dev", device)
        _ip("link", "set", device, "up")
        mine, its = socket.socketpair()
        with mine:
            with its:
                self._holder = subprocess.Popen(
                    ["unshare", "-n", sys.executable, "-m", "tests.fleet.wire", str(its.fileno()), device, address],
                    stdin=subprocess.PIPE, pass_fds=(its.fileno(),),
                )  # fmt: skip
            _, (there,), *_ = socket.recv_fds(mine, 16, 1)
        self.inside = ("nsenter", "-t", str(self._holder.pid), "-n")
        self._loop = asyncio.new_event_loop()
        self._free_s = {here: 0.0, there: 0.0}
        for source, target in ((here, there), (there, here)):
            os.set_blocking(source, False)
            self._loop.add_reader(source, self._take, source, target)
        self._thread = threading.Thread(target=self._loop.run_forever, name=device)
        self._thread.start()

    def close(self) -> None:
        """Take it away, and the namespace with it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for device in self._free_s:
            os.close(device)
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait()

    def _take(self, source: int, target: int) -> None:
        """A packet leaves one side."""
        with contextlib.suppress(BlockingIOError):
            packet = os.read(source, 2 * _MTU)
            now_s = self._loop.time()
            begun_s = max(now_s, self._free_s[source])
            seconds_per_byte = 8 / self.bits_per_s if self.bits_per_s else 0.0
            is_full = (begun_s - now_s) > self.QUEUE_BYTES * seconds_per_byte and self.bits_per_s is not None
            if self.is_cut or is_full or self._luck.random() < self.loss:
                self.n_lost += 1
                return
            self._free_s[source] = begun_s + len(packet) * seconds_per_byte
            self._loop.call_at(self._free_s[source] + self.delay_s, self._give, target, packet)

    def _give(self, target: int, packet: bytes) -> None:
        """A packet arrives at the other."""
        if not self.is_cut:
            self.n_carried += 1
            with contextlib.suppress(OSError):
                os.write(target, packet)


def _device(name: str) -> int:
    """A TUN device in the namespace of this process: packets as they are, without headers of a link."""
    import fcntl  # not on Windows, where this file is only looked at

    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER))
    return device


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def up() -> None:
    """Loopback, which a new namespace has to be given."""
    _ip("link", "set", "lo", "up")


def _hold(socket_fd: int, name: str, address: str) -> None:
    up()
    device = _device(name)
    _ip("addr", "add", f"{address}/32", "peer", f"{ROUTER}/32", "dev", name)
    _ip("link", "set", name, "up")
    with socket.socket(fileno=socket_fd) as wire:
        socket.send_fds(wire, [b"here"], [device])
    sys.stdin.read()


if __name__ == "__main__":
    _hold(int(sys.argv[1]), sys.argv[2], sys.argv[3])
