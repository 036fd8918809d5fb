from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.api.serving import Running


def _client(here: Running, key: str | None = None) -> httpx2.Client:
    headers = {} if key is None else {"X-API-Key": key}
    return httpx2.Client(base_url=here.url, headers=headers, timeout=60)


def _events(client: httpx2.Client, job_id: str, **headers: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(event, id, data) of each event until the stream ends."""
    with client.stream("GET", f"/api/jobs/{job_id}/events", headers=headers) as stream:
        event = number = ""
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            match name:
                case "event":
                    event = value
                case "id":
                    number = value
                case "data":
                    yield event, number, json.loads(value)


def _ended(client: httpx2.Client, job_id: str) -> dict[str, Any]:
    """The job after its last event."""
    return list(_events(client, job_id))[-1][2]


def test_a_job_is_accepted_and_done_and_its_picture_lies_under_its_id(fake_server: Running) -> None:
    with _client(fake_server) as client:
        answer = client.post("/api/jobs", json={"prompt": "x", "steps": 2, "n": 2, "seed": 5, "priority": 3})
        assert answer.status_code == 202
        job = answer.json()
        assert answer.headers["location"] == f"/api/jobs/{job['id']}"
        done = _ended(client, job["id"])
        assert done["state"] == "done"
        assert [output["seed"] for output in done["outputs"]] == [5, 6]
        assert done["progress"] == {"step": 4, "steps": 4}
        for output in done["outputs"]:
            content = client.get(output["url"]).content
            assert Image.open(io.BytesIO(content)).size == (output["width"], output["height"])
            thumbnail = client.get(output["thumbnail_url"])
            assert Image.open(io.BytesIO(thumbnail.content)).format == "WEBP"


def test_events_tell_of_steps_previews_and_the_end(fake_server: Running) -> None:
    with _client(fake_server) as client, fake_server.holding() as gate:
        job = client.post("/api/jobs", json={"prompt": "x", "steps": 3}).json()
        gate.wait_for_job()
        told = []
        for event, _, data in _events(client, job["id"]):
            told.append(event)
            if len(told) == 1:
                gate.let(1)
            if event == "preview":
                assert data["b64_png"]
                gate.let()
        assert {"step", "preview"} <= set(told)
        assert told[-1] == "done"


def test_a_reader_who_comes_back_goes_on_after_the_last_event_it_saw(fake_server: Running) -> None:
    with _client(fake_server) as client, fake_server.holding() as gate:
        job = client.post("/api/jobs", json={"prompt": "x", "steps": 3}).json()
        gate.wait_for_job()
        _, number, _ = next(_events(client, job["id"]))
        gate.let()
        _ended(client, job["id"])
        numbers = [int(n) for _, n, _ in _events(client, job["id"], **{"Last-Event-ID": number})]
        assert all(n > int(number) for n in numbers)


def test_a_waiting_and_a_running_job_are_cancelled_by_their_id(server: Callable[..., Running]) -> None:
    here = server(max_pictures=1)
    with _client(here) as client, here.holding() as gate:
        running = client.post("/api/jobs", json={"prompt": "x"}).json()["id"]
        gate.wait_for_job()
        waiting = client.post("/api/jobs", json={"prompt": "y"}).json()
        assert waiting["state"] == "queued"
        assert waiting["queue_position"] == 1
        assert client.delete(f"/api/jobs/{waiting['id']}").json()["state"] == "cancelled"
        client.delete(f"/api/jobs/{running}")
        assert _ended(client, running)["state"] == "cancelled"
        assert client.get("/api/jobs", params={"state": "cancelled"}).json()["jobs"][0]["error"]["code"] == "cancelled"


def test_a_cancelled_job_is_tried_again_with_the_same_seed_and_a_done_one_is_not(fake_server: Running) -> None:
    with _client(fake_server) as client:
        with fake_server.holding() as gate:
            job = client.post("/api/jobs", json={"prompt": "x", "steps": 2}).json()
            gate.wait_for_job()
            client.delete(f"/api/jobs/{job['id']}")
            _ended(client, job["id"])
        again = client.post(f"/api/jobs/{job['id']}/retry")
        assert again.status_code == 202
        done = _ended(client, job["id"])
        assert (done["state"], done["seed"]) == ("done", job["seed"])
        assert client.post(f"/api/jobs/{job['id']}/retry").status_code == 409


def test_a_repeat_with_the_same_idempotency_key_is_the_same_job(fake_server: Running) -> None:
    with _client(fake_server) as client:
        headers = {"Idempotency-Key": "order-17"}
        first = client.post("/api/jobs", json={"prompt": "x", "steps": 1}, headers=headers).json()
        again = client.post("/api/jobs", json={"prompt": "x", "steps": 1}, headers=headers).json()
        assert first["id"] == again["id"]
        other = client.post("/api/jobs", json={"prompt": "y", "steps": 1}, headers=headers)
        assert other.status_code == 409
        for bad in ("", "x" * 256):
            refused = client.post("/api/jobs", json={"prompt": "x"}, headers={"Idempotency-Key": bad})
            assert refused.status_code == 400


def test_jobs_are_listed_newest_first_in_pages_and_searched(server: Callable[..., Running]) -> None:
    with _client(server()) as client:
        ids = [client.post("/api/jobs", json={"prompt": f"cat {i}", "steps": 1}).json()["id"] for i in range(5)]
        seen: list[str] = []
        before = None
        while True:
            page = client.get("/api/jobs", params={"limit": 2} | ({} if before is None else {"before": before})).json()
            seen += [job["id"] for job in page["jobs"]]
            before = page["next"]
            if before is None:
                break
        assert seen == ids[::-1]
        assert [job["id"] for job in client.get("/api/jobs", params={"search": "cat 3"}).json()["jobs"]] == [ids[3]]


def test_a_key_sees_and_touches_its_own_jobs_alone(server: Callable[..., Running]) -> None:
    here = server(api_key="master")
    _, mine = here.call(here.house.keys.create("mine"))
    _, other = here.call(here.house.keys.create("other"))
    with _client(here, mine) as me, _client(here, other) as somebody, _client(here, "master") as master:
        job = me.post("/api/jobs", json={"prompt": "x", "steps": 1}).json()
        done = _ended(me, job["id"])
        for path in (f"/api/jobs/{job['id']}", f"/api/jobs/{job['id']}/events", done["outputs"][0]["url"],
                     done["outputs"][0]["thumbnail_url"]):  # fmt: skip
            assert somebody.get(path).status_code == 404
            assert me.get(path).status_code == 200
            assert master.get(path).status_code == 200
        assert somebody.delete(f"/api/jobs/{job['id']}").status_code == 404
        assert somebody.post(f"/api/jobs/{job['id']}/retry").status_code == 404
        assert somebody.get("/api/jobs").json()["jobs"] == []
        assert somebody.get("/api/outputs").json()["outputs"] == []


def test_a_key_that_may_only_read_makes_and_cancels_nothing(server: Callable[..., Running]) -> None:
    here = server(api_key="master")
    _, reader = here.call(here.house.keys.create("reader", scopes=("read",)))
    with _client(here, reader) as client:
        assert client.post("/api/jobs", json={"prompt": "x"}).status_code == 403
        assert client.post("/api/txt2img", json={"prompt": "x"}).status_code == 403
        assert client.get("/api/jobs").status_code == 200


def test_a_full_queue_is_429_with_the_time_to_come_back(server: Callable[..., Running]) -> None:
    here = server(max_pictures=1, max_queued=1)
    with _client(here) as client, here.holding() as gate:
        client.post("/api/jobs", json={"prompt": "x"})
        gate.wait_for_job()
        assert client.post("/api/jobs", json={"prompt": "y"}).status_code == 202
        full = client.post("/api/jobs", json={"prompt": "z"})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1


def test_a_deleted_picture_is_gone_and_its_job_stays(fake_server: Running) -> None:
    with _client(fake_server) as client:
        job = client.post("/api/jobs", json={"prompt": "x", "steps": 1}).json()
        output = _ended(client, job["id"])["outputs"][0]
        assert client.delete(output["url"]).status_code == 204
        assert client.get(output["url"]).status_code == 404
        assert client.get(f"/api/jobs/{job['id']}").status_code == 200


@pytest.mark.parametrize("name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "a" * 5000, "x-0", "C:\\x"])
def test_no_name_of_a_picture_leads_anywhere_but_to_a_picture(fake_server: Running, name: str) -> None:
    with _client(fake_server) as client:
        for path in (f"/api/outputs/{name}", f"/api/outputs/{name}/thumbnail", f"/api/jobs/{name}"):
            assert client.get(path).status_code in {404, 400}


def test_a_signed_link_needs_no_key_and_cannot_be_changed(server: Callable[..., Running]) -> None:
    here = server(api_key="master")
    with _client(here, "master") as client:
        submitted = client.post("/v1/flux-dev", json={"prompt": "x", "steps": 1}).json()
        _ended(client, submitted["id"])
        ready = client.get(submitted["polling_url"]).json()
    assert ready["status"] == "Ready"
    link = ready["result"]["sample"]
    assert httpx2.get(link).headers["content-type"] == "image/jpeg"
    assert httpx2.get(link.replace("expires=1", "expires=2")).status_code == 403
    assert httpx2.get(link.replace(submitted["id"], "0" * 12)).status_code == 403


def test_sync_routes_answer_503_with_retry_after_until_the_model_is_loaded(server: Callable[..., Running]) -> None:
    here = server()
    here.house.readiness.is_loading = True
    with _client(here) as client:
        answer = client.post("/generate", json={"prompt": "x"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert client.post("/api/jobs", json={"prompt": "x"}).status_code == 202
