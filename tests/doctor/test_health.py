"""GET /dashboard/api/health: what the doctor finds, in the shape that Herd's clients know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from tests.api.conftest import server
from tests.api.serving import Running
from tests.catalog.folders import write_sd

__all__ = ["server"]

Start = Callable[..., Running]


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def _health(here: Running, **headers: str) -> httpx2.Response:
    return httpx2.get(f"{here.url}/dashboard/api/health", headers=headers, timeout=60.0)


def test_the_answer_has_vitals_and_recommendations(server: Start) -> None:
    here = server()
    httpx2.post(f"{here.url}/api/generate-image", json={"model": "starter", "prompt": "x", "steps": 1}, timeout=60.0)
    told = _health(here).json()
    assert set(told) == {"vitals", "recommendations", "checked_at"}
    vitals = told["vitals"]
    assert (vitals["nodes_total"], vitals["nodes_online"], vitals["image_generations_24h"]) == (1, 1, 1)
    assert vitals["overall_error_rate_pct"] == 0.0
    bad = [one for one in told["recommendations"] if one["severity"] != "info"]
    assert [one for one in bad if one["check_id"] not in {"disk-full", "swap", "out-of-memory"}] == []


def test_a_fault_is_critical_comes_first_and_says_what_mends_it(server: Start, tmp_path: Path) -> None:
    weights = write_sd(tmp_path / "weights")
    here = server()
    here.house.catalog.add(weights, name="toy")
    (weights / "tokenizer/vocab.json").unlink()
    told = _health(here).json()
    first = told["recommendations"][0]
    assert set(first) == {"check_id", "severity", "title", "description", "fix", "node_id"}
    assert (first["check_id"], first["severity"]) == ("broken-model", "critical")
    assert "tokenizer/vocab.json is missing" in first["description"]
    assert first["fix"]
    assert told["vitals"]["health_score"] <= 75


def test_asking_again_at_once_gives_the_kept_answer(server: Start, tmp_path: Path) -> None:
    weights = write_sd(tmp_path / "weights")
    here = server()
    first = _health(here).json()
    here.house.catalog.add(weights, name="toy")
    (weights / "tokenizer/vocab.json").unlink()
    again = _health(here).json()
    assert again["checked_at"] == first["checked_at"]
    assert again["recommendations"] == first["recommendations"]


def test_the_right_to_read_is_needed(server: Start) -> None:
    here = server(api_key="secret")
    assert _health(here).status_code == 401
    record, text = here.call(here.house.keys.create("draws", scopes=("generate",)))
    assert record.name == "draws"
    assert _health(here, authorization=f"Bearer {text}").status_code == 403
    assert _health(here, authorization="Bearer secret").status_code == 200


def test_the_server_itself_is_no_fault_to_its_own_doctor(server: Start) -> None:
    ids = {one["check_id"] for one in _health(server()).json()["recommendations"]}
    assert ids & {"port-in-use", "other-server", "hung-engine", "database"} == set()


def test_the_route_is_described(server: Start) -> None:
    paths = httpx2.get(f"{server().url}/openapi.json", timeout=60.0).json()["paths"]
    answer = paths["/dashboard/api/health"]["get"]["responses"]["200"]
    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Health")
