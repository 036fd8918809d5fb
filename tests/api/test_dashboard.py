"""What the dashboard asks for: live events, series, traces and switches, over a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from sdfleet.errors import OutOfMemory
from tests.api.serving import Running

Start = Callable[..., Running]


def _draw(here: Running, **asked: Any) -> httpx2.Response:
    body = {"model": "starter", "prompt": "a secret fox", "steps": 2, **asked}
    return httpx2.post(f"{here.url}/api/generate-image", json=body, timeout=60.0)


def _events(response: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and contents of the events, as they come."""
    number = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "id":
            number = value
        elif field == "data":
            yield number, json.loads(value)


def _first_event(here: Running, **headers: str) -> tuple[str, dict[str, Any]]:
    with httpx2.stream("GET", f"{here.url}/dashboard/events", headers=headers, timeout=60.0) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return next(_events(response))


def test_events_hold_nodes_queues_and_the_time_as_herds_clients_know_them(server: Start) -> None:
    here = server()
    _draw(here)
    _, told = _first_event(here)
    status = httpx2.get(f"{here.url}/fleet/status").json()
    assert told.keys() >= {"nodes", "queues", "timestamp"}
    assert [node["node_id"] for node in told["nodes"]] == [node["node_id"] for node in status["nodes"]]
    assert told["queues"].keys() == status["queues"].keys()
    assert told["load"] == {"queued": 0, "running": 0, "wait_ms": 0}


def test_events_show_the_steps_of_what_is_drawn_and_no_prompt(server: Start) -> None:
    here = server()
    with here.holding() as gate:
        body = {"prompt": "a secret fox", "steps": 4, "n": 2}
        job = httpx2.post(f"{here.url}/api/jobs", json=body).json()
        gate.wait_for_job()
        gate.let(3)
        with httpx2.stream("GET", f"{here.url}/dashboard/events", timeout=60.0) as response:
            running = (told["jobs"] for _, told in _events(response) if told["jobs"] and told["jobs"][0]["step"] == 3)
            (shown,) = next(running)
    assert (shown["id"], shown["model"], shown["steps"], shown["n"]) == (job["id"], "starter", 8, 2)
    assert shown["node_id"]
    assert "secret" not in json.dumps(shown)


def test_after_a_lost_connection_the_newest_event_comes_and_no_event_twice(server: Start) -> None:
    here = server()
    number, told = _first_event(here)
    again, later = _first_event(here, **{"Last-Event-ID": number})
    assert int(again) > int(number)
    assert later["timestamp"] > told["timestamp"]


def test_the_server_ends_at_once_while_somebody_reads_events(server: Start) -> None:
    here = server()
    with httpx2.stream("GET", f"{here.url}/dashboard/events", timeout=60.0) as response:
        events = _events(response)
        next(events)
        here.app.state.snapshots.close()
        assert list(events) == []


def test_series_count_what_ended_and_say_why_jobs_failed(server: Start) -> None:
    here = server()
    _draw(here)
    backend: Any = here.house.runtime._backend
    backend._script = [OutOfMemory("there is no room", hint="ask for less")]
    assert _draw(here).status_code == 502
    told = httpx2.get(f"{here.url}/dashboard/api/series", params={"window": "15m"}).json()
    assert len(told["spans"]) == 30
    assert (told["whole"]["done"], told["whole"]["failed"]) == (1, 1)
    assert told["whole"]["total_p50_ms"] > 0
    assert sum(span["done"] for span in told["spans"][-2:]) == 1
    (reason,) = told["failures"]
    assert (reason["code"], reason["count"], reason["hint"]) == ("out_of_memory", 1, "ask for less")


def test_a_window_that_is_not_offered_is_refused(fake_server: Running) -> None:
    answer = httpx2.get(f"{fake_server.url}/dashboard/api/series", params={"window": "1y"})
    assert answer.status_code == 400
    assert "window" in answer.json()["error"]


def test_traces_tell_each_request_newest_first_without_its_prompt(server: Start) -> None:
    here = server()
    _draw(here, metadata={"tags": ["app"]})
    backend: Any = here.house.runtime._backend
    backend._script = [OutOfMemory("there is no room", hint="ask for less")]
    _draw(here)
    told = httpx2.get(f"{here.url}/dashboard/api/traces", params={"limit": 2}).json()["traces"]
    failed, done = told
    assert (failed["status"], failed["error_message"], failed["error_code"]) == (
        "failed", "there is no room", "out_of_memory",
    )  # fmt: skip
    assert (done["status"], done["error_message"], done["tags"], done["retry_count"]) == ("completed", None, ["app"], 0)
    assert done["latency_ms"] >= done["wait_ms"] >= 0
    assert done["node_id"]
    assert "secret" not in json.dumps(told)


def test_a_key_that_may_not_manage_sees_its_own_traces_alone(server: Start) -> None:
    here = server(api_key="secret")
    _, text = here.call(here.house.keys.create("reader", scopes=("read", "generate")))
    body = {"model": "starter", "prompt": "x", "steps": 1}
    for key in ("secret", text):
        httpx2.post(f"{here.url}/api/generate-image", json=body, headers={"X-API-Key": key}, timeout=60.0)
    seen = {
        key: len(httpx2.get(f"{here.url}/dashboard/api/traces", headers={"X-API-Key": key}).json()["traces"])
        for key in ("secret", text)
    }
    assert seen == {"secret": 2, text: 1}


@pytest.mark.parametrize("path", ["events", "api/series", "api/traces", "api/settings", "api/health"])
def test_the_right_to_read_is_needed(server: Start, path: str) -> None:
    here = server(api_key="secret")
    _, text = here.call(here.house.keys.create("draws", scopes=("generate",)))
    url = f"{here.url}/dashboard/{path}"
    assert httpx2.get(url).status_code == 401
    assert httpx2.get(url, headers={"X-API-Key": text}).status_code == 403


def test_drawing_that_is_switched_off_answers_503_disabled_in_every_dialect_until_it_is_on(server: Start) -> None:
    here = server()
    settings = f"{here.url}/dashboard/api/settings"
    assert httpx2.get(settings).json()["config"]["toggles"] == {"image_generation": True}
    answer = httpx2.post(settings, json={"image_generation": False, "vram_guard": True})
    assert answer.json() == {"status": "updated", "updated": {"image_generation": False}}
    refused = _draw(here)
    assert refused.status_code == 503
    assert "disabled" in refused.json()["error"]
    assert refused.headers["x-should-retry"] == "false"
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/api/jobs", "/api/txt2img"):
        assert httpx2.post(f"{here.url}{path}", json={"prompt": "x"}).status_code == 503, path
    assert httpx2.get(settings).json()["config"]["toggles"] == {"image_generation": False}
    httpx2.post(settings, json={"image_generation": True})
    assert _draw(here).status_code == 200


def test_only_who_may_manage_switches(server: Start) -> None:
    here = server(api_key="secret")
    _, text = here.call(here.house.keys.create("reader", scopes=("read",)))
    url = f"{here.url}/dashboard/api/settings"
    refused = httpx2.post(url, json={"image_generation": False}, headers={"X-API-Key": text})
    assert refused.status_code == 403
    told = httpx2.get(url, headers={"X-API-Key": text}).json()
    assert told["config"]["toggles"] == {"image_generation": True}
    assert told["may"] == ["read"]


@pytest.mark.parametrize("body", [{}, {"vram_guard": True}])
def test_a_change_that_changes_nothing_we_know_is_refused(fake_server: Running, body: dict[str, object]) -> None:
    answer = httpx2.post(f"{fake_server.url}/dashboard/api/settings", json=body)
    assert answer.status_code == 400
    assert "switch" in answer.json()["error"]
