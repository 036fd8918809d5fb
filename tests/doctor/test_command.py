"""`sdfleet doctor` at the command line."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from sdfleet.doctor.table import ENTRIES
from tests.catalog.hub_server import HubServer, gated
from tests.cli.conftest import Run, home, run
from tests.doctor.test_hubs import hub, online

__all__ = ["home", "hub", "online", "run"]

QUICK = [entry.id for entry in ENTRIES if entry.check is not None and entry.effort == "quick"]


@pytest.fixture(autouse=True)
def _free_port(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - after the stage is set
    monkeypatch.setenv("SD_PORT", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)


def test_a_healthy_machine_ends_with_0_and_every_check_answers(run: Run) -> None:
    answer = run("doctor", *QUICK, "--json")
    assert answer.code == 0, answer.out
    assert [one["id"] for one in answer.json["checks"]] == QUICK
    assert answer.json["verdict"] in {"ok", "warning"}


def test_a_fault_ends_with_1_and_shows_its_cause_and_its_cure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        monkeypatch.setenv("SD_PORT", str(port))
        answer = run("doctor", "port-in-use")
    assert answer.code == 1
    assert "FAULT" in answer.out
    assert f"127.0.0.1:{port} is in use by" in answer.out
    assert "Another program" in answer.out
    assert f"-> SD_PORT={port + 1}" in answer.out
    assert "1 faults, 0 warnings, 0 ok" in answer.err


def test_a_warning_ends_with_0(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer = run("doctor", "hub-offline", "--json")
    assert (answer.code, answer.json["verdict"]) == (0, "warning")
    assert answer.json["checks"][0]["cure"] == "unset HF_HUB_OFFLINE"


def test_a_symptom_without_a_check_of_its_own_runs_the_one_that_meets_it(run: Run, home: Path) -> None:
    (home.parent / "weights/tokenizer/vocab.json").unlink()
    answer = run("doctor", "tokenizer-missing", "--json")
    assert answer.code == 1
    assert "toy: " in answer.json["checks"][0]["found"]


def test_a_check_that_there_is_not_is_refused_with_the_nearest(run: Run) -> None:
    answer = run("doctor", "port-in-us")
    assert answer.code == 2
    assert "did you mean 'port-in-use'" in answer.err


def test_looking_changes_nothing(run: Run, home: Path) -> None:
    before = sorted(home.rglob("*"))
    run("doctor", *QUICK)
    assert sorted(home.rglob("*")) == before


def test_the_hub_is_asked_only_after_a_yes_and_the_person_is_told(
    run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_HF_ENDPOINT", hub.url)
    silent = run("doctor", *QUICK)
    assert "contacts" not in silent.err
    assert hub.asked == []
    asked = run("doctor", "hub-reachable")
    assert asked.code == 0, asked.out
    assert f"contacts {hub.url}" in asked.err
    assert len(hub.asked) == 1


def test_a_model_is_asked_for_by_name(run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_HF_ENDPOINT", hub.url)
    hub.decide = lambda _asked: gated(403)
    monkeypatch.setenv("HF_TOKEN", "t")
    monkeypatch.setenv("SD_TOKEN_TO_MIRROR", "true")
    answer = run("doctor", "--model", "sd15", "--json")
    assert answer.code == 1
    (one,) = answer.json["checks"]
    assert one["id"] == "hub-access"
    assert "accept it at https://huggingface.co/stable-diffusion-v1-5" in one["cure"]


def test_a_pasted_message_is_explained_without_looking_at_anything(run: Run) -> None:
    answer = run("doctor", "--explain", "AssertionError: Torch not compiled with CUDA enabled")
    assert answer.code == 0
    assert answer.out.startswith("The GPU is not used: torch is a build for CPUs  [torch-without-cuda]")
    assert "  do:    take the command for your CUDA" in answer.out
    assert "  check: sdfleet doctor torch-without-cuda" in answer.out


def test_a_traceback_comes_through_a_pipe(home: Path) -> None:  # noqa: ARG001 - sets the stage
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "sdfleet", "doctor", "--explain", "-", "--json"],
        input="Traceback:\n  ...\nOSError: [Errno 28] No space left on device\n",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert '"id": "disk-full"' in done.stdout


def test_a_message_that_nobody_knows_is_no_success(run: Run) -> None:
    answer = run("doctor", "--explain", "the weather is fine")
    assert answer.code == 1
    assert "nothing in the table fits" in answer.err
