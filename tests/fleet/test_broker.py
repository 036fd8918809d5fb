"""The router's own nats-server: found again, not doubled, and never mistaken for another program."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.broker import Broker, BrokerConfig, User
from tests.fleet.brokers import ROUTER, free_port

USERS = (User(user=ROUTER.user, password=ROUTER.password),)


def test_the_broker_of_a_killed_router_makes_room_for_the_next_ones(tmp_path: Path) -> None:
    async def main() -> None:
        config = BrokerConfig(port=free_port(), users=USERS)
        left, again = Broker(tmp_path, config), Broker(tmp_path, config)
        await left.start()
        assert left.pid is not None
        orphan = psutil.Process(left.pid)
        assert left._watch is not None
        left._watch.cancel()  # its router is gone: nobody starts it again
        await asyncio.wait({left._watch})
        await again.start()
        try:
            assert again.pid not in {None, orphan.pid}
            await left.close()
            assert not orphan.is_running()
        finally:
            await again.close()

    asyncio.run(main())


def test_another_program_with_that_pid_is_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "nats.pid").write_text(str(os.getpid()))
        broker = Broker(tmp_path, BrokerConfig(port=free_port(), users=USERS))
        await broker.start()
        await broker.close()

    asyncio.run(main())


def test_a_port_that_another_program_has_is_not_taken_for_ours(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            broker = Broker(tmp_path, BrokerConfig(port=port, users=USERS))
            with pytest.raises(StoreUnavailable, match=str(port)) as caught:
                await broker.start()
            assert "SD_BROKER_PORT" in caught.value.hint
            with contextlib.suppress(ProcessLookupError):
                assert broker.pid is None

    asyncio.run(main())


def test_a_broker_that_is_killed_listens_again(tmp_path: Path) -> None:
    async def main() -> None:
        started = asyncio.Event()
        broker = Broker(tmp_path, BrokerConfig(port=free_port(), users=USERS), on_start=started.set)
        await broker.start()
        try:
            started.clear()
            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGKILL)
            async with asyncio.timeout(60):
                await started.wait()
            assert broker.n_starts == 2
        finally:
            await broker.close()

    asyncio.run(main())
