"""What is in memory: `/api/models`, Ollama's keep_alive, AUTOMATIC1111's switching, and the commands that ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from sdfleet import compose
from sdfleet.api.ollama import KEEP_ALIVE_IGNORED
from sdfleet.cli.main import app
from sdfleet.storage import doorplate
from tests.api.serving import PATIENCE_S, Running
from tests.catalog.folders import write_sd

Server = Callable[..., Running]


def with_toy(here: Running, *, name: str = "toy") -> Running:
    """The server, with a model that another process has imported."""
    folder = write_sd(here.house.settings.home / "elsewhere" / name, sample_size=8)
    compose.import_checkpoint(here.house.settings, folder, name=name, base=None, prediction=None)
    return here


def asked(here: Running, method: str, path: str, *, key: str = "", **body: Any) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.request(method, f"{here.url}{path}", json=body or None, headers=headers, timeout=PATIENCE_S)


def model(here: Running, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in asked(here, "GET", "/api/models").json()["models"] if m["name"] == name)
    return found


def generate(here: Running, **fields: Any) -> httpx2.Response:
    return asked(here, "POST", "/api/generate", model="toy", stream=False, **fields)


def until_gone(here: Running, name: str) -> None:
    """Return when a model has left; its leaving is not waited for by any request."""

    async def tasks() -> None:
        for task in tuple(here.house.runtime.residents._leaving):
            await task

    here.call(tasks())
    assert not model(here, name)["loaded"]


def drawn(here: Running) -> httpx2.Response:
    return asked(here, "POST", "/v1/images/generations", prompt="a fox", model="toy", size="64x64")


def test_a_model_is_loaded_pinned_unpinned_and_unloaded(server: Server) -> None:
    here = with_toy(server())
    assert model(here, "toy") == {
        "name": "toy", "family": "sd", "loaded": False, "pinned": False, "size_bytes": 0, "jobs": 0, "expires_at": None,
        "backend": None,
    }  # fmt: skip
    loaded = asked(here, "POST", "/api/models/toy/load").json()
    assert (loaded["loaded"], loaded["pinned"]) == (True, False)
    assert loaded["expires_at"] is not None
    pinned = asked(here, "POST", "/api/models/toy/pin").json()
    assert (pinned["loaded"], pinned["pinned"], pinned["expires_at"]) == (True, True, None)
    unpinned = asked(here, "POST", "/api/models/toy/unpin").json()
    assert (unpinned["loaded"], unpinned["pinned"]) == (True, False)
    assert asked(here, "POST", "/api/models/toy/unload").json()["loaded"] is False


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin"])
def test_an_unknown_model_is_told_and_a_key_must_be_allowed_to_manage(server: Server, verb: str) -> None:
    here = server(api_key="admin")
    answer = asked(here, "POST", f"/api/models/nobody/{verb}", key="admin")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_name")
    made = here.call(here.house.keys.create("reader", scopes=frozenset({"read", "generate"})))
    assert asked(here, "GET", "/api/models", key=made[1]).status_code == 200
    refused = asked(here, "POST", f"/api/models/starter/{verb}", key=made[1])
    assert (refused.status_code, refused.json()["code"]) == (403, "not_allowed")


def test_a_model_is_neither_unloaded_nor_removed_under_a_job(server: Server) -> None:
    here = with_toy(server())
    with here.holding() as gate, ThreadPoolExecutor(1) as threads:
        job = threads.submit(drawn, here)
        gate.wait_for_job()
        assert model(here, "toy")["jobs"] == 1
        refused = asked(here, "POST", "/api/models/toy/unload")
        assert (refused.status_code, refused.json()["code"]) == (409, "in_use")
        assert "toy is being drawn with by 1 job; wait" in refused.json()["error"]
        assert asked(here, "DELETE", "/api/delete", model="toy").status_code == 409
        gate.let()
        assert job.result(PATIENCE_S).status_code == 200
    assert model(here, "toy")["loaded"]
    assert asked(here, "DELETE", "/api/delete", model="toy").status_code == 200
    assert here.house.runtime.capabilities().facts["checkpoints"] == [str(here.house.catalog.resolve("starter").folder)]


def test_an_empty_prompt_loads_and_with_keep_alive_0_unloads(server: Server) -> None:
    here = with_toy(server())
    assert generate(here).json()["done_reason"] == "load"
    assert model(here, "toy")["loaded"]
    assert generate(here, keep_alive=0).json()["done_reason"] == "unload"
    assert not model(here, "toy")["loaded"]


def test_keep_alive_is_how_long_a_model_stays_after_its_picture(server: Server) -> None:
    here = with_toy(server())
    generate(here, prompt="a fox", keep_alive=-1, width=64, height=64)
    shown = {m["name"]: m for m in asked(here, "GET", "/api/ps").json()["models"]}
    assert shown["toy"]["expires_at"].startswith("9999")
    assert shown["starter"]["expires_at"].startswith("20")
    assert set(shown["toy"]) >= {"size", "size_vram", "digest", "details", "context_length"}
    generate(here, prompt="a fox", keep_alive="0s", width=64, height=64)
    until_gone(here, "toy")


def test_unloading_by_keep_alive_waits_for_the_picture_that_is_drawn(server: Server) -> None:
    here = with_toy(server())
    with here.holding() as gate, ThreadPoolExecutor(1) as threads:
        job = threads.submit(drawn, here)
        gate.wait_for_job()
        assert generate(here, keep_alive=0).json()["done_reason"] == "unload"
        assert model(here, "toy")["loaded"]
        gate.let()
        assert job.result(PATIENCE_S).status_code == 200
    until_gone(here, "toy")


def test_a_keep_alive_that_is_no_time_is_refused(server: Server) -> None:
    answer = generate(with_toy(server()), prompt="a fox", keep_alive="soon")
    assert (answer.status_code, "keep_alive: 'soon' is not a time, for example 5m" in answer.json()["error"]) == (
        400,
        True,
    )


def test_a_key_that_may_not_manage_cannot_unload_for_others(server: Server) -> None:
    here = with_toy(server(api_key="admin"))
    asked(here, "POST", "/api/models/toy/load", key="admin")
    _, key = here.call(here.house.keys.create("drawer", scopes=frozenset({"generate"})))
    refused = asked(here, "POST", "/api/generate", key=key, model="toy", keep_alive=0)
    assert refused.status_code == 403
    drawn = asked(here, "POST", "/api/generate", key=key, model="toy", prompt="a fox", keep_alive=0, stream=False)
    assert drawn.status_code == 200
    shown = asked(here, "GET", "/api/models", key="admin").json()["models"]
    assert {m["name"] for m in shown if m["loaded"]} == {"starter", "toy"}


def test_a_key_that_may_not_manage_is_told_that_its_keep_alive_was_ignored(server: Server) -> None:
    here = with_toy(server(api_key="admin"))
    _, key = here.call(here.house.keys.create("drawer", scopes=frozenset({"generate"})))

    def told(key: str, **fields: Any) -> list[str]:
        answer = asked(here, "POST", "/api/generate", key=key, model="toy", width=64, height=64, **fields)
        return [text for text in json.loads(answer.text.splitlines()[-1])["warnings"] if "keep_alive" in text]

    ways: list[dict[str, Any]] = [{"prompt": "a fox"}, {"prompt": "a fox", "stream": False}, {"prompt": ""}]
    for way in ways:
        assert told(key, keep_alive="5m", **way) == [KEEP_ALIVE_IGNORED]
        assert told(key, **way) == told("admin", keep_alive="5m", **way) == []


def test_the_setting_says_how_long_models_stay(server: Server) -> None:
    here = with_toy(server(keep_alive=0))
    until_gone(here, "starter")
    assert drawn(here).status_code == 200
    until_gone(here, "toy")


def test_automatic1111s_clients_choose_unload_and_reload_a_checkpoint(server: Server) -> None:
    here = with_toy(server())
    title = next(m["title"] for m in asked(here, "GET", "/sdapi/v1/sd-models").json() if m["model_name"] == "toy")
    assert asked(here, "POST", "/sdapi/v1/options", sd_model_checkpoint=title).status_code == 200
    assert asked(here, "POST", "/sdapi/v1/unload-checkpoint").status_code == 200
    assert not model(here, "toy")["loaded"]
    assert asked(here, "POST", "/sdapi/v1/reload-checkpoint").status_code == 200
    assert model(here, "toy")["loaded"]
    assert asked(here, "POST", "/sdapi/v1/refresh-checkpoints").status_code == 200


def test_what_another_process_imports_and_removes_is_seen_at_once(server: Server) -> None:
    here = server()
    assert [m["id"] for m in asked(here, "GET", "/v1/models").json()["data"]] == ["starter"]
    with_toy(here)
    assert [m["id"] for m in asked(here, "GET", "/v1/models").json()["data"]] == ["starter", "toy"]
    assert drawn(here).status_code == 200
    compose.catalog(here.house.settings).forget("toy")
    assert drawn(here).status_code == 404


def test_metrics_count_what_is_loaded_and_pinned(server: Server) -> None:
    here = with_toy(server())
    asked(here, "POST", "/api/models/toy/pin")
    lines = asked(here, "GET", "/metrics").text.splitlines()
    assert {"sdfleet_checkpoints_loaded 2.0", "sdfleet_checkpoints_pinned 1.0"} <= set(lines)


# --------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `sdfleet models ...` with a server's home, in a process that knows nothing else of it."""

    def run(home: Path, *arguments: str) -> Any:
        monkeypatch.setenv("SD_HOME", str(home))
        return CliRunner().invoke(app, ["models", *arguments])

    return run


def test_commands_ask_the_running_server_also_where_it_wants_a_key(server: Server, run: Callable[..., Any]) -> None:
    here = with_toy(server(api_key="admin"))
    home = here.house.settings.home
    assert run(home, "load", "toy").stdout.startswith("toy is in memory: ")
    assert "pinned" in run(home, "pin", "toy").stdout
    assert [line.split()[0] for line in run(home, "ps").stdout.splitlines()] == ["starter", "toy"]
    assert json.loads(run(home, "unpin", "toy", "--json").stdout)["pinned"] is False
    assert run(home, "unload", "toy").stdout == "toy is not in memory\n"
    refused = run(home, "load", "nobody")
    assert (refused.exit_code, "there is no model named 'nobody'" in refused.stderr) == (2, True)


def test_commands_say_where_no_server_runs(tmp_path: Path, run: Callable[..., Any]) -> None:
    refused = run(tmp_path, "ps")
    assert refused.exit_code == 1
    assert refused.stderr == f"error: no server runs with {tmp_path}; start one: sdfleet serve\n"
    plate = {"host": "127.0.0.1", "port": 1, "key": "of a server that was killed"}
    (tmp_path / "server.json").write_text(json.dumps(plate))
    assert run(tmp_path, "load", "starter").stderr == refused.stderr


def test_removing_a_model_at_the_command_line_lets_it_leave_the_server_first(
    server: Server, run: Callable[..., Any]
) -> None:
    here = with_toy(server())
    home, facts = here.house.settings.home, here.house.runtime.capabilities
    assert drawn(here).status_code == 200
    assert len(facts().facts["checkpoints"]) == 2  # type: ignore[arg-type]
    with here.holding() as gate, ThreadPoolExecutor(1) as threads:
        job = threads.submit(drawn, here)
        gate.wait_for_job()
        refused = run(home, "rm", "toy", "--yes")
        assert (refused.exit_code, "toy is needed by 1 job" in refused.stderr) == (1, True)
        gate.let()
        job.result(PATIENCE_S)
    assert run(home, "rm", "toy", "--yes").exit_code == 0
    assert len(facts().facts["checkpoints"]) == 1  # type: ignore[arg-type]
    assert (home / "elsewhere/toy/model_index.json").exists()


def test_the_key_of_a_home_is_for_its_owner_and_ends_with_the_server(server: Server, tmp_path: Path) -> None:
    here = server(api_key="admin")
    home = here.house.settings.home
    plate = doorplate.read(home)
    assert plate is not None
    assert (home / "server.json").stat().st_mode & 0o777 == 0o600
    assert asked(here, "GET", "/api/models", key=plate.key).status_code == 200
    assert asked(here, "GET", "/api/models", key=plate.key[:-1]).status_code == 401
    with doorplate.hung(tmp_path, host="0.0.0.0", port=7) as hung:  # noqa: S104
        assert doorplate.read(tmp_path) == hung
        assert (hung.host, hung.key == plate.key) == ("127.0.0.1", False)
    assert doorplate.read(tmp_path) is None
