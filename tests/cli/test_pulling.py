"""`sdfleet models plan|pull|rm|verify|du` at a terminal and off one."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.catalog.conftest import online
from tests.catalog.hub_server import HubServer, gated, serving
from tests.catalog.hubs import LARGE, toy_hub
from tests.cli.conftest import Run, pictures_in

__all__ = ["online"]

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture
def hub(tmp_path: Path, home: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:  # noqa: ARG001 - sets the stage
    """A hub that has Stable Diffusion 1.5, at toy size; both of our hubs' addresses lead to it."""
    toy = toy_hub(tmp_path / "published")
    toy.repo_id = SD15
    with serving(toy) as running:
        monkeypatch.setenv("SD_HF_ENDPOINT", running.url)
        yield running


def test_a_plan_says_bytes_disk_licence_and_gate_and_downloads_nothing(run: Run, hub: HubServer, home: Path) -> None:
    before = pictures_in(home)
    answer = run("models", "plan", "runwayml/stable-diffusion-v1-5", "--no-memory")
    assert answer.code == 0, answer.err
    assert "sd15 from Hugging Face" in answer.out
    assert "12 files, 4.0 MB" in answer.out
    assert "free on the disk" in answer.out
    assert "CreativeML Open RAIL-M https://" in answer.out
    assert hub.asked_for("resolve") == []
    assert pictures_in(home) == before


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
def test_a_plan_says_the_memory_of_each_mode_and_format(run: Run) -> None:
    memory = run("models", "plan", "sd15", "--json").json["memory"]
    by_mode = {(need["mode"], need["dtype"]): need for need in reversed(memory)}  # the plain format comes first
    fast, eco = by_mode["fast", "bfloat16"], by_mode["eco", "bfloat16"]
    # 859.5 + 83.7 + 123.1 million parameters of denoiser, VAE and text encoder; the VAE may be in a wider format.
    assert 2 * 1_066_000_000 <= fast["weights_bytes"] <= 2 * 1_066_000_000 + 2 * 84_000_000
    assert fast["weights_bytes"] < fast["peak_bytes"]
    assert eco["peak_bytes"] < fast["peak_bytes"]
    assert by_mode["fast", "float32"]["peak_bytes"] > fast["peak_bytes"]


@pytest.mark.slow
@pytest.mark.usefixtures("online")
def test_without_a_hub_a_plan_still_says_what_a_picture_takes_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_HF_ENDPOINT", "http://127.0.0.1:9")
    answer = run("models", "plan", "sd15")
    assert answer.code == 1
    assert "one picture of 512x512 here takes" in answer.out
    assert "cannot be reached" in answer.err


def test_a_published_model_is_shown_before_it_is_here(run: Run) -> None:
    shown = run("models", "show", "x/z-image-turbo")
    assert "licence: Apache-2.0" in shown.out
    assert "pull: sdfleet models pull z-image-turbo" in shown.out
    facts = run("models", "show", "flux-dev", "--json").json
    assert (facts["is_here"], facts["is_gated"], facts["ignores"]) == (False, True, ["negative_prompt"])


def test_off_a_terminal_nothing_is_pulled_without_yes(run: Run, hub: HubServer, home: Path) -> None:
    answer = run("models", "pull", "sd15")
    assert answer.code == 1
    assert "sdfleet models pull sd15 --yes" in answer.err
    assert hub.asked_for("resolve") == []
    assert not (home / "models/weights").exists()


@pytest.mark.usefixtures("hub")
def test_pull_verify_use_and_remove(run: Run) -> None:
    assert "get them: sdfleet models pull sd15" in run("generate", "a dot", "--model", "sd15").err
    pulled = run("models", "pull", "sd15", "--yes")
    assert pulled.code == 0, pulled.err
    assert "pulled sd15: 4.0 MB" in pulled.out
    assert "all as announced" in run("models", "verify", "sd15").out
    assert [m["name"] for m in run("models", "list", "--json").json["models"] if not m["is_built_in"]] == [
        "sd15",
        "toy",
    ]
    drawn = run("generate", "a dot", "--model", "sd15:latest", "--steps", "2", "--size", "64x64")
    assert drawn.code == 0, drawn.err
    assert run("models", "du", "--json").json["models"][0]["n_bytes"] > 4_000_000
    assert "already here" in run("models", "pull", "sd15", "--yes").out
    assert run("models", "rm", "sd15").code == 1
    assert "4.0 MB freed" in run("models", "rm", "sd15", "--yes").out
    assert run("models", "list", "--json").json["models"][-1]["name"] == "toy"


@pytest.mark.usefixtures("hub")
def test_the_setting_says_yes_for_machines_without_a_person(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PULL_WITHOUT_ASKING", "true")
    assert run("models", "pull", "sd15").code == 0


@pytest.mark.usefixtures("hub")
def test_a_damaged_file_fails_verify_with_the_way_out(run: Run, home: Path) -> None:
    run("models", "pull", "sd15", "--yes")
    with (home / "models/weights/sd15" / LARGE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    answer = run("models", "verify", "sd15")
    assert answer.code == 2
    assert "unet/diffusion_pytorch_model.safetensors has changed" in answer.err
    assert "sdfleet models pull sd15" in answer.err


def test_a_gated_model_shows_its_plan_and_then_the_next_action(run: Run, hub: HubServer) -> None:
    hub.is_gated = True
    hub.decide = lambda asked: gated(401) if "auth-check" in asked.path else None
    answer = run("models", "pull", "sd15", "--yes")
    assert answer.code == 1
    assert "licence: CreativeML" in answer.out
    assert f"accept the licence at https://huggingface.co/{SD15}" in answer.err
    assert hub.asked_for("resolve") == []


def test_a_token_of_the_settings_is_kept_from_a_mirror_and_from_the_output(
    run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_HUGGINGFACE_TOKEN", "hf_secret")
    answer = run("models", "plan", "sd15", "--no-memory", "--json")
    assert {asked.token for asked in hub.asked} == {None}
    assert "hf_secret" not in answer.out + answer.err
    monkeypatch.setenv("SD_TOKEN_TO_MIRROR", "true")
    run("models", "plan", "sd15", "--no-memory")
    assert hub.asked[-1].token == "hf_secret"


def test_from_names_the_other_hub(run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repo_id = "AI-ModelScope/stable-diffusion-v1-5"
    monkeypatch.setenv("SD_MODELSCOPE_ENDPOINT", hub.url)
    assert "sd15 from ModelScope" in run("models", "plan", "sd15", "--no-memory", "--from", "modelscope").out


def test_an_import_is_forgotten_and_its_folder_stays(run: Run, tmp_path: Path) -> None:
    before = pictures_in(tmp_path / "weights")
    assert run("models", "rm", "toy", "--yes").code == 0
    assert pictures_in(tmp_path / "weights") == before
    assert "there is no model named 'toy'" in run("models", "show", "toy").err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("typed", "is_kept"), [(b"n\n", True), (b"\n", True), (b"y\n", False)])
def test_at_a_terminal_the_person_is_asked_and_no_is_the_default(home: Path, typed: bytes, *, is_kept: bool) -> None:
    keyboard, terminal = os.openpty()
    command = [sys.executable, "-m", "sdfleet", "models", "rm", "toy"]
    with subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.write(keyboard, typed)
        _, told = process.communicate(timeout=60)
    os.close(keyboard)
    os.close(terminal)
    assert b"stays as it is" in told
    assert (home / "models/toy.toml").exists() == is_kept


def test_a_model_that_a_queued_job_needs_is_not_removed(run: Run, home: Path) -> None:
    run("jobs", "list")
    database = next(home.glob("*.db"), None) or next(home.glob("*.sqlite*"))
    with sqlite3.connect(database) as connection:
        columns = {row[1]: row for row in connection.execute("PRAGMA table_info(jobs)")}
        values = {
            name: "toy" if name == "model" else "queued" if name == "state" else "{}" if "TEXT" in row[2].upper() else 1
            for name, row in columns.items()
            if row[3] or name in {"id", "model", "state"}
        }
        marks = ", ".join("?" for _ in values)
        connection.execute(f"INSERT INTO jobs ({', '.join(values)}) VALUES ({marks})", list(values.values()))  # noqa: S608 - names of our own table
    connection.close()
    answer = run("models", "rm", "toy", "--yes")
    assert answer.code == 1
    assert "sdfleet jobs cancel" in answer.err
    assert (home / "models/toy.toml").exists()
