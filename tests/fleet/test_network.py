"""Bad lines between real processes in namespaces of their own: heartbeats go through, one picture comes of each job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import wire

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(wire.why_not()), reason=wire.why_not())]


def told(story: str, folder: Path) -> dict[str, Any]:
    """What one of `network_story.STORIES` saw; with no fault in it."""
    command = [*wire.ENTER, sys.executable, "-m", "tests.fleet.network_story", story, str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    assert found["refused"] == []
    assert found["faults"] == []
    assert set(found["states"]) == {"done"}
    assert set(found["n_pictures"]) == {1}
    return found


def test_sixteen_megabytes_on_a_slow_and_lossy_line_delay_no_heartbeat(tmp_path: Path) -> None:
    found = told("slow_line", tmp_path)
    assert found["standings"] == {"n1": ["online"], "n2": ["online"]}
    assert found["pixels"][-2:] == [2336 * 2400 * 3] * 2
    assert found["n_packets_lost"] > 0
    assert (found["n_done"], found["n_executions"]) == (12, 12)


def test_a_node_whose_line_is_away_for_a_while_goes_on_with_its_job(tmp_path: Path) -> None:
    found = told("short_cut", tmp_path)
    assert found["standings"]["n1"] == ["online", "suspect", "online"]
    assert (found["n_done"], found["n_executions"]) == (1, 1)


def test_a_node_whose_line_is_away_for_long_is_replaced_and_one_picture_is_taken(tmp_path: Path) -> None:
    found = told("long_cut", tmp_path)
    assert found["standings"]["n1"] == ["online", "suspect", "offline", "online"]
    assert (found["n_done"], found["n_executions"]) == (1, 2)
