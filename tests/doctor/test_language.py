"""Language models and speech: each reason for which a server that is set up does not answer, with what mends it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sdfleet.doctor.language import ENTRIES
from tests.api.conftest import server
from tests.api.serving import running
from tests.cli.conftest import Run, home, run
from tests.doctor.stage import cure, look, machine, write
from tests.doctor.test_health import Start
from tests.language.conftest import gguf
from tests.language.fixed_answers import answering
from tests.language.llama_server import llama_server

__all__ = ["gguf", "home", "run", "server"]

CHECKS = [entry.id for entry in ENTRIES if entry.id != "speech"]


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody listens, and nobody can begin to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def verdicts(folder: Path, **settings: Any) -> dict[str, str]:
    """What each check of the servers finds."""
    there = machine(folder, **settings)
    return {name: look(name, there).verdict for name in CHECKS}


def test_where_nothing_is_set_up_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    assert set(verdicts(tmp_path).values()) == {"not_applicable"}
    assert look("speech", machine(tmp_path)).verdict == "not_applicable"


def test_real_servers_with_models_are_well(tmp_path: Path, gguf: Path) -> None:
    with llama_server(gguf) as llama:
        found = verdicts(tmp_path, language_urls=f"{llama.url}/v1")
        assert set(found.values()) == {"ok"}
        assert "1 models" in look("language-models", machine(tmp_path, language_urls=llama.url)).what


def test_a_server_that_is_not_there_is_a_fault_that_says_how_to_start_it(tmp_path: Path, nobody: str) -> None:
    assert verdicts(tmp_path, ollama_url=nobody) == {
        "language-server": "fault", "language-key": "not_applicable",
        "language-protocol": "not_applicable", "language-models": "not_applicable",
    }  # fmt: skip
    assert cure("language-server", machine(tmp_path, ollama_url=nobody)).startswith("ollama serve; ")
    other = machine(tmp_path, language_urls=nobody)
    assert nobody in look("language-server", other).what
    assert f"curl {nobody}/v1/models" in cure("language-server", other)


def test_one_of_several_that_is_gone_is_named_and_the_others_are_looked_at(tmp_path: Path, nobody: str) -> None:
    with answering(200, {"data": [{"id": "m"}]}) as well:
        there = machine(tmp_path, language_urls=f"{well}, {nobody}")
        told = look("language-server", there)
        assert (told.verdict, nobody in told.what, well in told.what) == ("fault", True, False)
        assert look("language-models", there).verdict == "ok"


def test_a_server_that_takes_the_connection_and_says_nothing_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdfleet.doctor.upstreams.ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert verdicts(tmp_path, language_urls=url)["language-server"] == "warning"


def test_a_real_server_that_wants_a_key_is_told_apart_from_one_that_is_gone(tmp_path: Path) -> None:
    """An OpenAI-compatible server with a key: one of ours."""
    with running(tmp_path / "there", api_key="secret") as there:
        found = verdicts(tmp_path, language_urls=there.url)
        assert (found["language-server"], found["language-key"]) == ("ok", "fault")
        without = machine(tmp_path, language_urls=there.url)
        assert "without a key" in look("language-key", without).what
        assert cure("language-key", without).startswith("SD_LANGUAGE_KEY=KEY")
        wrong = machine(tmp_path, language_urls=there.url, language_key="other")
        assert "with the key of SD_LANGUAGE_KEY" in look("language-key", wrong).what
        assert "other" not in look("language-key", wrong).what
        assert set(verdicts(tmp_path, language_urls=there.url, language_key="secret").values()) == {"ok"}


def test_the_key_goes_to_no_ollama(tmp_path: Path) -> None:
    with running(tmp_path / "there", api_key="secret") as there:
        guarded = machine(tmp_path, ollama_url=there.url, language_key="secret")
        assert look("language-key", guarded).verdict == "fault"
        assert f"SD_LANGUAGE_URLS={there.url}" in cure("language-key", guarded)


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>It works!</html>"), (404, b"no such page"), (200, {"models": "none"}), (200, [])],
    ids=["a page", "not found", "another object", "a list"],
)
def test_what_is_no_list_of_models_is_a_fault(tmp_path: Path, status: int, body: object) -> None:
    with answering(status, body) as url:
        for setting, told in (("ollama_url", "/api/tags"), ("language_urls", "/v1/models")):
            given: dict[str, Any] = {setting: url}
            found = verdicts(tmp_path, **given)
            assert (found["language-server"], found["language-protocol"]) == ("ok", "fault")
            assert found["language-models"] == "not_applicable"
            assert told in look("language-protocol", machine(tmp_path, **given)).what


def test_a_server_of_openais_routes_in_the_place_of_an_ollama_is_told_where_it_belongs(tmp_path: Path) -> None:
    with answering(200, {"data": [{"id": "m"}]}) as url:
        assert f"set SD_LANGUAGE_URLS={url}" in cure("language-protocol", machine(tmp_path, ollama_url=url))


def test_servers_without_models_are_a_warning_that_says_how_one_comes(tmp_path: Path) -> None:
    with answering(200, {"models": [], "data": []}) as url:
        assert cure("language-models", machine(tmp_path, ollama_url=url)) == "ollama pull llama3.2"
        found = verdicts(tmp_path, language_urls=url)
        assert found == dict.fromkeys(CHECKS, "ok") | {"language-models": "warning"}


def test_a_server_that_fails_is_a_fault(tmp_path: Path) -> None:
    with answering(500, {"error": "no"}) as url:
        found = verdicts(tmp_path, language_urls=url)
        assert (found["language-server"], found["language-key"]) == ("fault", "not_applicable")


def test_all_checks_together_ask_a_server_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url, asked = f"http://127.0.0.1:{listening.getsockname()[1]}", []

        def answer() -> None:
            while True:
                connection, _ = listening.accept()
                with connection:
                    if not connection.recv(65536):
                        return
                    asked.append(1)
                    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":[]}')

        thread = threading.Thread(target=answer)
        thread.start()
        verdicts(tmp_path, language_urls=url)
        socket.create_connection(listening.getsockname()).close()
        thread.join()
    assert asked == [1]


# -------------------------------------------------------------------------------------------------------------- speech


def test_speech_without_its_extra_is_a_fault_with_the_command_that_installs_it(tmp_path: Path) -> None:
    write(tmp_path / "speech/tiny/model.bin")
    without = machine(tmp_path, speech_models=tmp_path / "speech", search_path=(str(tmp_path),))
    assert look("speech", without).verdict == "fault"
    assert cure("speech", without) == "python -m pip install 'sdfleet[speech]'"


def test_a_folder_of_speech_models_is_looked_into(tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    there = machine(tmp_path, speech_models=folder)
    assert "no such folder" in look("speech", there).what
    write(folder / "notes.txt")
    assert "there is no speech model" in look("speech", there).what
    write(folder / "tiny/model.bin")
    assert look("speech", there).verdict == "warning"
    write(folder / "tiny/tokenizer.json")
    assert look("speech", there).what == "speech models: tiny"


# ------------------------------------------------------------------------------------------------- where they are told


def test_the_command_tells_a_gone_server_as_json(run: Run, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_OLLAMA_URL", nobody)
    answer = run("doctor", *CHECKS, "--json")
    assert answer.code == 1
    told = {one["id"]: one for one in answer.json["checks"]}
    assert (told["language-server"]["verdict"], told["language-key"]["verdict"]) == ("fault", "not_applicable")
    assert told["language-server"]["cure"].startswith("ollama serve")
    assert "SD_OLLAMA_URL" in told["language-server"]["cause"]


def test_the_health_of_a_server_names_an_upstream_that_is_gone(server: Start, nobody: str) -> None:
    here = server(ollama_url=nobody)
    told = httpx2.get(f"{here.url}/dashboard/api/health", timeout=60.0).json()["recommendations"]
    (found,) = [one for one in told if one["check_id"] == "language-server"]
    assert (found["severity"], nobody in found["description"]) == ("critical", True)
    assert found["fix"].startswith("ollama serve")
