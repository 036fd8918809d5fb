"""What serves others runs on uvloop where it is installed, and on asyncio's own loop where it is not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from sdfleet.cli import console
from tests.api.conftest import fake_server
from tests.api.serving import Running
from tests.fleet.real_fleet import Program, real_fleet

__all__ = ["fake_server"]


async def kind() -> str:
    """Whose loop this is."""
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_what_serves_runs_on_uvloop() -> None:
    assert console.serve(kind()) == "uvloop"


def test_without_uvloop_it_runs_on_asyncios_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert console.serve(kind()) == "asyncio"


def test_a_fault_and_ctrl_c_come_out_of_it_as_from_run() -> None:
    async def fall() -> None:
        raise ZeroDivisionError

    is_tidied = []

    async def wait() -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            is_tidied.append(True)

    with pytest.raises(ZeroDivisionError):
        console.serve(fall())
    with pytest.raises(KeyboardInterrupt):
        console.serve(wait())
    assert is_tidied == [True]


def test_the_api_of_a_server_and_of_a_router_runs_on_uvloop(fake_server: Running) -> None:
    assert type(fake_server.loop).__module__ == "uvloop"


@pytest.mark.slow
def test_a_node_draws_on_uvloop_and_without_it_too(tmp_path: Path) -> None:
    import openai

    def loop_of(node: Program) -> list[str]:
        return [record["event_loop"] for record in node.said("the node begins")]

    # What cannot be imported, as on a machine without it.
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "uvloop.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    path = os.pathsep.join(each for each in (str(hidden), *sys.path) if each)
    with real_fleet(tmp_path / "fleet") as fleet:
        with_it = fleet.add_node("n1", SD_BACKEND="fake")
        fleet.wait_for_nodes()
        with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0) as client:
            assert client.images.generate(prompt="a fox", model="starter").data
            assert with_it.end() == 0
            without = fleet.add_node("n2", SD_BACKEND="fake", PYTHONPATH=path)
            del fleet.nodes["n1"]
            fleet.until(lambda: fleet.status()["fleet"]["nodes_online"] == 1, what="the other node")
            assert client.images.generate(prompt="a fox", model="starter").data
            assert without.end() == 0
        assert (loop_of(with_it), loop_of(without)) == (["uvloop"], ["asyncio"])
        assert fleet.faults() == []
