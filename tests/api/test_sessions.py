"""Sign-in for browsers: the cookie that stands for a key, and what it is not good for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import httpx2
import pytest

from sdfleet.api.sessions import SESSION_S, Sessions
from tests.api.serving import Running

# A busy machine is slow now and then; that is no failure.
ask = functools.partial(httpx2.request, timeout=60)
KEY = "a secret of many words"
PROOF = {"x-requested-by": "test"}


@contextlib.contextmanager
def _signed_in(here: Running, key: str = KEY) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=here.url, timeout=60) as client:
        answer = client.post("/session", json={"key": key})
        assert answer.status_code == 200, answer.text
        yield client


def test_a_session_stands_for_its_key(server: Callable[..., Running]) -> None:
    here = server(api_key=KEY)
    assert ask("GET", f"{here.url}/api/outputs").status_code == 401
    assert ask("GET", f"{here.url}/session").json() == {
        "needs_key": True, "signed_in": False, "name": "nobody", "scopes": [],
    }  # fmt: skip
    with _signed_in(here) as client:
        assert client.get("/api/outputs").status_code == 200
        assert client.get("/session").json()["signed_in"]
        assert client.post("/api/txt2img", json={"prompt": "x"}, headers=PROOF).status_code == 200
        assert client.delete("/session", headers=PROOF).status_code == 204
        assert client.get("/api/outputs").status_code == 401


def test_no_script_and_no_other_site_gets_the_cookie_and_it_does_not_hold_the_key(
    server: Callable[..., Running],
) -> None:
    here = server(api_key=KEY)
    answer = ask("POST", f"{here.url}/session", json={"key": KEY})
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={SESSION_S}"} <= set(cookie.split("; "))
    assert KEY not in cookie + answer.text


@pytest.mark.parametrize("key", ["wrong", "", KEY + "x"])
def test_a_wrong_key_signs_nobody_in(server: Callable[..., Running], key: str) -> None:
    answer = ask("POST", f"{server(api_key=KEY).url}/session", json={"key": key})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


def test_a_session_changes_nothing_without_the_header_that_other_sites_cannot_send(
    server: Callable[..., Running],
) -> None:
    with _signed_in(server(api_key=KEY)) as client:
        refused = client.post("/api/txt2img", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["code"]) == (403, "not_allowed")
        elsewhere = {**PROOF, "origin": "https://elsewhere.example"}
        assert client.post("/api/txt2img", json={"prompt": "x"}, headers=elsewhere).status_code == 403


def test_a_revoked_key_ends_its_sessions(server: Callable[..., Running]) -> None:
    here = server(api_key=KEY)
    record, secret = here.call(here.house.keys.create("guest", scopes=("read",)))
    with _signed_in(here, secret) as client:
        assert client.get("/session").json() == {
            "needs_key": True, "signed_in": True, "name": "guest", "scopes": ["read"],
        }  # fmt: skip
        assert client.get("/api/outputs").status_code == 200
        assert client.post("/api/txt2img", json={"prompt": "x"}, headers=PROOF).status_code == 403
        here.call(here.house.keys.revoke(record.name))
        assert client.get("/api/outputs").status_code == 401


def test_without_any_key_nobody_has_to_sign_in(fake_server: Running) -> None:
    who = ask("GET", f"{fake_server.url}/session").json()
    assert (who["needs_key"], who["signed_in"]) == (False, False)
    assert "manage" in who["scopes"]
    assert "set-cookie" not in ask("POST", f"{fake_server.url}/session", json={"key": "any"}).headers


def test_a_token_ends_by_itself_and_cannot_be_made_up() -> None:
    now_s = 1000.0
    sessions = Sessions(b"k" * 32, clock=lambda: now_s)
    token = sessions.issue("key_0123456789ab")
    assert sessions.subject(token) == "key_0123456789ab"
    until, _, rest = token.partition(".")
    for forged in ("", ".", "..", f"{int(until) + 1}.{rest}", token.replace("key_0", "key_1"), token[:-1], "²" + token):
        assert sessions.subject(forged) is None
    assert Sessions(b"j" * 32, clock=lambda: now_s).subject(token) is None
    now_s += SESSION_S + 1
    assert sessions.subject(token) is None


def test_another_key_of_the_settings_ends_the_sessions_of_the_first(server: Callable[..., Running]) -> None:
    first = server(api_key=KEY)
    with _signed_in(first) as client:
        (token,) = client.cookies.values()
    sessions = Sessions(first.house.signing_key)
    subject = sessions.subject(token)
    assert subject == f"admin-{sessions.print_of(KEY)}"
    assert subject != f"admin-{sessions.print_of('another')}"
