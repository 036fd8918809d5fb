"""Faults in every dialect's own words, and what the log never says."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from sdfleet.api.app import drain
from sdfleet.domain import JobId
from sdfleet.jobs.desk import JobDesk
from sdfleet.observe import JsonLine
from tests.api.serving import PATIENCE_S, Running
from tests.api.test_security_keys import check_shape

SECRET = "xyzzy-the-secret-prompt"
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/images/generations", {"prompt": SECRET}),
    ("/sdapi/v1/txt2img", {"prompt": SECRET, "steps": 1}),
    ("/api/generate", {"model": "starter", "prompt": SECRET, "steps": 1, "stream": False}),
    ("/api/generate-image", {"model": "starter", "prompt": SECRET, "steps": 1}),
    ("/v1/flux-pro-1.1", {"prompt": SECRET, "steps": 1}),
    ("/generate", {"prompt": SECRET, "num_inference_steps": 1}),
    ("/api/txt2img", {"prompt": SECRET, "steps": 1}),
    ("/api/jobs", {"prompt": SECRET, "steps": 1, "negative_prompt": SECRET, "user": SECRET}),
]


def test_a_fault_nobody_foresaw_is_told_in_every_dialect(
    server: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_desk: JobDesk, _submission: object) -> None:
        raise ZeroDivisionError

    here = server()
    monkeypatch.setattr(JobDesk, "submit", broken)
    for path, body in ASKED:
        answer = httpx2.post(here.url + path, json=body)
        # Herd's clients know 502 for a picture that cannot be drawn; this is no such case.
        check_shape(path, answer, status=500)
        assert answer.headers["X-Request-Id"] in answer.text
        assert "Traceback" not in answer.text


def test_too_many_requests_and_a_stopping_server_say_when_to_come_back(server: Callable[..., Running]) -> None:
    here = server(rate_per_minute=len(ASKED))
    for path, body in ASKED:
        assert httpx2.post(here.url + path, json=body).status_code in {200, 202}, path
    for status in (429, 503):
        for path, body in ASKED:
            answer = httpx2.post(here.url + path, json=body)
            check_shape(path, answer, status=status)
            assert int(answer.headers["Retry-After"]) >= 1, path
        here.app.state.rate_limit.per_minute = None
        here.call(drain(here.app))


def test_a_caller_out_of_time_does_not_cancel_what_another_waits_for(server: Callable[..., Running]) -> None:
    here = server(request_timeout_s=0.2)
    with here.holding() as gate, httpx2.Client(base_url=here.url, timeout=PATIENCE_S) as client:
        job_id = client.post("/api/jobs", json={"prompt": "a"}, headers={"Idempotency-Key": "k"}).json()["id"]
        gate.wait_for_job()
        here.app.state.waiting.n_waiting[JobId(job_id)] += 1  # somebody else
        late = client.post("/api/txt2img", json={"prompt": "a"}, headers={"Idempotency-Key": "k"})
        check_shape("/api/txt2img", late, status=504)
        assert client.get(f"/api/jobs/{job_id}").json()["state"] == "running"
        gate.let()
        assert here.call(here.house.desk.wait(JobId(job_id))).state == "done"


def test_a_fault_beside_any_request_does_not_end_the_server(
    server: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    here = server()

    async def broken() -> None:
        raise ZeroDivisionError

    async def begin() -> None:
        here.app.state.background(broken())

    here.call(begin())
    assert httpx2.get(f"{here.url}/health").status_code == 200
    assert httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "a", "steps": 1}).status_code == 200
    assert "a fault of sdfleet itself, beside any request" in caplog.text


def test_prompts_and_keys_are_never_logged_at_info(server: Callable[..., Running]) -> None:
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setFormatter(JsonLine())
    handler.addFilter(lambda record: record.name != "httpx2")  # what this test itself asks with
    root = logging.getLogger()
    level, root.level = root.level, logging.INFO
    ours = logging.getLogger("sdfleet")
    ours_level, ours.level = ours.level, logging.INFO
    root.addHandler(handler)
    try:
        here = server(api_key="the-master-key")
        _, key = here.call(here.house.keys.create("a key"))
        good = {"Authorization": f"Bearer {key}"}
        with httpx2.Client(base_url=here.url, headers=good, timeout=PATIENCE_S) as client:
            for path, body in ASKED:
                assert client.post(path, json=body).status_code in {200, 202}
                # Refused in several ways, each naming what was wrong.
                for change in ({"prompt": [SECRET]}, {"model": SECRET}, {"prompt": f"({SECRET}:"}, {"steps": SECRET}):
                    client.post(path, json={**body, **change})
                client.post(path, json=body, headers={"Authorization": f"Bearer {key[:-1]}"})
            client.get("/api/jobs", params={"search": SECRET})
            client.get(f"/api/jobs?x={key}%0d%0aforged")
        with httpx2.Client(base_url=here.url, headers={"X-API-Key": "the-master-key"}) as client:
            assert client.get("/info").status_code == 200
            assert "the-master-key" not in client.get("/info").text
    finally:
        root.removeHandler(handler)
        root.level, ours.level = level, ours_level
    text = said.getvalue()
    assert '"request"' in text
    assert '"job done"' in text
    assert SECRET not in text
    assert key not in text
    assert key.split("_", 2)[2] not in text
    assert "the-master-key" not in text
