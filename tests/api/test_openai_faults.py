"""What OpenAI's client raises for each of our faults, when it tries again, and what becomes of the job it repeats."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from sdfleet.errors import EngineFailed, OutOfMemory
from sdfleet.jobs.desk import MAX_PICTURES
from tests.api.pixels import from_base64
from tests.api.serving import PATIENCE_S, Gate, Running, running


@pytest.fixture
def client(fake_server: Running) -> Iterator[openai.OpenAI]:
    with _client(fake_server) as client:
        yield client


def _client(here: Running, *, key: str = "none", max_retries: int = 0, timeout: float = 30) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{here.url}/v1", api_key=key, max_retries=max_retries, timeout=timeout)


def _error(response: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_missing_or_wrong_key_is_an_authentication_error(server: Callable[..., Running]) -> None:
    here = server(api_key="right")
    with _client(here, key="wrong") as client, pytest.raises(openai.AuthenticationError) as met:
        client.images.generate(prompt="a red fox")
    assert (met.value.code, met.value.type) == ("invalid_api_key", "authentication_error")
    assert met.value.response.headers["www-authenticate"] == "Bearer"
    for path in ("images/generations", "images/edits", "images/variations"):
        assert httpx2.post(f"{here.url}/v1/{path}", json={"prompt": "a"}).status_code == 401
    assert httpx2.get(f"{here.url}/v1/models").status_code == 401


def test_a_key_without_the_right_is_a_permission_error(server: Callable[..., Running]) -> None:
    here = server(api_key="admin")
    _, secret = here.call(here.house.keys.create("looker", scopes=frozenset({"read"})))
    with _client(here, key=secret) as client:
        assert [model.id for model in client.models.list()] == ["starter"]
        with pytest.raises(openai.PermissionDeniedError) as met:
            client.images.generate(prompt="a red fox")
    assert met.value.type == "permission_error"


def test_an_unknown_model_is_a_not_found_error_with_openais_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as met:
        client.images.generate(prompt="a red fox", model="starterr")
    assert (met.value.code, met.value.param) == ("model_not_found", "model")
    assert "'starter'" in str(met.value)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nowhere", 404), ("GET", "/v1/images/generations", 405), ("POST", "/v1/models", 405)],
)
def test_routes_that_are_not_there_answer_in_openais_shape(
    fake_server: Running, method: str, path: str, status: int
) -> None:
    response = httpx2.request(method, fake_server.url + path)
    assert (response.status_code, _error(response)["type"]) == (status, "invalid_request_error")


@pytest.mark.parametrize("content", [b"{", b"[]", b'"a"', b"", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_request_is_a_bad_request(fake_server: Running, content: bytes) -> None:
    response = httpx2.post(f"{fake_server.url}/v1/images/generations", content=content)
    assert (response.status_code, _error(response)["type"]) == (400, "invalid_request_error")


def test_a_body_too_large_is_told_in_openais_shape(server: Callable[..., Running]) -> None:
    here = server(max_body=4096)
    response = httpx2.post(f"{here.url}/v1/images/generations", json={"prompt": "a" * 5000})
    assert (response.status_code, _error(response)["code"]) == (413, "too_large")


def test_a_full_queue_is_a_rate_limit_error_that_says_when_to_come_back(server: Callable[..., Running]) -> None:
    here = server(max_queued=1)
    with here.holding() as gate, _client(here) as client:
        # As many pictures as are given to the backend at once; the job after them waits in line.
        assert httpx2.post(f"{here.url}/api/jobs", json={"prompt": "a red fox", "n": MAX_PICTURES}).status_code == 202
        gate.wait_for_job()
        assert httpx2.post(f"{here.url}/api/jobs", json={"prompt": "a red fox"}).status_code == 202
        with pytest.raises(openai.RateLimitError) as met:
            client.images.generate(prompt="a red fox")
    assert met.value.code == "queue_full"
    assert int(met.value.response.headers["retry-after"]) >= 1


def test_more_than_the_rate_is_a_rate_limit_error(server: Callable[..., Running]) -> None:
    here = server(rate_per_minute=1)
    with _client(here) as client:
        client.images.generate(prompt="a red fox")
        with pytest.raises(openai.RateLimitError) as met:
            client.images.generate(prompt="a red fox")
    assert met.value.code == "rate_limit_exceeded"
    assert 1 <= int(met.value.response.headers["retry-after"]) <= 60


def test_while_the_model_is_loaded_it_is_503_with_the_time_to_come_back(server: Callable[..., Running]) -> None:
    here = server()
    here.house.readiness.is_loading = True
    with _client(here) as client, pytest.raises(openai.InternalServerError) as met:
        client.images.generate(prompt="a red fox")
    assert (met.value.status_code, met.value.code) == (503, "not_ready")
    assert met.value.response.headers["retry-after"] == "2"
    assert "x-should-retry" not in met.value.response.headers
    with _client(here) as client, pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="a red fox", stream=True)


@pytest.mark.parametrize("fault", [OutOfMemory("no room"), EngineFailed("the picture is black")])
def test_what_will_fail_again_is_not_tried_again(fake_server: Running, fault: Exception) -> None:
    script = fake_server.house.runtime._backend._script  # type: ignore[attr-defined]
    script.append(fault)
    with _client(fake_server, max_retries=2) as client, pytest.raises(openai.InternalServerError) as met:
        client.images.generate(prompt="a red fox")
    assert met.value.type == "server_error"
    assert met.value.response.headers["x-should-retry"] == "false"
    assert script == []  # a second try would have drawn it


def test_a_retry_joins_the_living_job_of_the_first_try_and_nothing_else_does(fake_server: Running) -> None:
    def ask(**headers: str) -> str:
        body = {"prompt": "a fox that is slow"}
        url = f"{fake_server.url}/v1/images/generations"
        answer = httpx2.post(url, json=body, headers=headers, timeout=PATIENCE_S).json()
        return str(answer["job_id"])

    retry = {"x-stainless-retry-count": "1"}
    with fake_server.holding() as gate, ThreadPoolExecutor() as pool:
        first = pool.submit(ask)
        gate.wait_for_job()
        again = pool.submit(ask, **retry)
        gate.let()
        assert first.result() == again.result()
    assert ask(**{"x-stainless-retry-count": "0"}) != first.result()


def test_the_sdks_own_retry_after_a_timeout_gets_the_picture_of_the_first_try(fake_server: Running) -> None:
    made: list[str] = []
    with fake_server.holding() as gate:

        def release() -> None:
            gate.wait_for_job()
            retried.wait(PATIENCE_S)
            gate.let()

        retried = threading.Event()

        def see(request: httpx2.Request) -> None:
            made.append(request.headers["x-stainless-retry-count"])
            if len(made) > 1:
                retried.set()

        helper = threading.Thread(target=release)
        helper.start()
        http = httpx2.Client(event_hooks={"request": [see]}, timeout=httpx2.Timeout(30, read=1.0))
        with (
            http,
            openai.OpenAI(
                base_url=f"{fake_server.url}/v1", api_key="none", max_retries=2, http_client=http, timeout=http.timeout
            ) as client,
        ):
            answer = client.images.generate(prompt="a fox that is lost")
        helper.join()
    assert made[:2] == ["0", "1"]
    jobs, _ = fake_server.call(
        fake_server.house.desk.statuses(owner=None, states=None, before=None, limit=50, search="a fox that is lost")
    )
    assert answer.model_extra is not None
    assert [answer.model_extra["job_id"]] == [status.job.id for status in jobs]


def test_an_idempotency_key_gives_the_same_job_and_refuses_another_request(client: openai.OpenAI) -> None:
    headers = {"Idempotency-Key": "once"}
    first = client.images.generate(prompt="a red fox", extra_headers=headers)
    again = client.images.generate(prompt="a red fox", extra_headers=headers)
    assert first.data is not None
    assert again.data is not None
    assert from_base64(first.data[0].b64_json) == from_base64(again.data[0].b64_json)
    assert first.model_extra == again.model_extra
    with pytest.raises(openai.ConflictError) as met:
        client.images.generate(prompt="a blue fox", extra_headers=headers)
    assert met.value.response.headers["x-should-retry"] == "false"


def test_a_client_that_leaves_takes_its_job_along(fake_server: Running) -> None:
    with fake_server.holding() as gate, _client(fake_server, timeout=1.0) as client:
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(
                prompt="a fox nobody waits for", extra_headers={"x-stainless-retry-count": openai.omit}
            )
        gate.wait_for_job()
        (status,), _ = fake_server.call(
            fake_server.house.desk.statuses(
                owner=None, states=None, before=None, limit=5, search="a fox nobody waits for"
            )
        )
        job = fake_server.call(fake_server.house.desk.wait(status.job.id, deadline_s=PATIENCE_S))
    assert job.state == "cancelled"


@pytest.mark.parametrize("body", [{}, {"stream": True}], ids=["waiting", "streaming"])
def test_the_end_of_the_server_leaves_the_jobs_of_those_who_wait_for_its_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, body: dict[str, Any]
) -> None:
    def ask(url: str) -> None:
        with contextlib.suppress(httpx2.TransportError):
            httpx2.post(f"{url}/v1/images/generations", json={"prompt": "a red fox", **body}, timeout=PATIENCE_S)

    with ThreadPoolExecutor() as pool:
        with running(tmp_path) as here:
            gate = Gate(here.loop)
            here.house.runtime._backend._before_step = gate  # type: ignore[attr-defined]
            caller = pool.submit(ask, here.url)
            gate.wait_for_job()
        caller.result(PATIENCE_S)
    assert [record.message for record in caplog.records if "a fault of sdfleet itself" in record.message] == []
    with running(tmp_path) as here:
        ((status,), _) = here.call(here.house.desk.statuses())
        assert here.call(here.house.desk.wait(status.job.id, deadline_s=PATIENCE_S)).state == "done"
