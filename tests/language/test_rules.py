"""The rules of all routes hold for language too: keys, rates, limits; and nobody reads along in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import httpx2
import pytest

from tests.api.serving import Running, running
from tests.language.conftest import Llamas

HELLO = [{"role": "user", "content": "a secret of mine"}]


@pytest.fixture
def server(llamas: Llamas, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    def start(**settings: object) -> object:
        return running(tmp_path_factory.mktemp("home"), language_urls=llamas.first.url, **settings)  # type: ignore[arg-type]

    return start


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/embeddings", "/api/transcribe"])
def test_a_key_is_asked_for_before_anything_is_read(server: Callable[..., object], path: str) -> None:
    with server(api_key="k") as here:  # type: ignore[attr-defined]
        answer = httpx2.post(f"{here.url}{path}", json={"model": "tiny", "messages": HELLO})
        assert answer.status_code == 401
        is_openai = path.startswith("/v1/")
        assert isinstance(answer.json()["error"], dict if is_openai else str)


def test_requests_a_minute_are_counted(server: Callable[..., object]) -> None:
    with server(rate_per_minute=2) as here:  # type: ignore[attr-defined]
        asked = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
        found = [httpx2.post(f"{here.url}/v1/chat/completions", json=asked) for _ in range(3)]
        assert [one.status_code for one in found] == [200, 200, 429]
        assert found[-1].json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": 3}'])
def test_a_body_that_is_no_request_is_refused_in_the_callers_shape(house: Running, body: bytes) -> None:
    assert isinstance(httpx2.post(f"{house.url}/api/chat", content=body).json()["error"], str)
    answer = httpx2.post(f"{house.url}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_no_word_of_a_prompt_or_an_answer_is_in_the_log(house: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="sdfleet")
    asked: dict[str, dict[str, object]] = {
        "/api/chat": {"options": {"num_predict": 3}},
        "/v1/chat/completions": {"top_p": "bad"},
        "/api/embed": {"input": "secret"},
    }
    for path, more in asked.items():
        body = {"model": "tiny", "messages": HELLO, **more, "stream": False}
        httpx2.post(f"{house.url}{path}", json=body, timeout=60)
    told = json.dumps([{**record.__dict__, "text": record.getMessage()} for record in caplog.records], default=str)
    assert "sdfleet.api.limits" in told
    assert "secret" not in told
