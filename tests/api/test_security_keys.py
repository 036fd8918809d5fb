"""Every route of the app asks for a key and for the right to do what it does, in the words of its dialect."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from sdfleet.api.app import dialect_of
from tests.api.serving import Running

Right = str | None

# Needs no key: what a browser or a load balancer reads before anybody signs in. Links carry a signature instead.
# The pages know nothing: what they show they ask for, with the key that somebody signs in with.
PUBLIC = {
    ("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("GET", "/api/version"), ("GET", "/files/{output_id}"),
    ("GET", "/studio"), ("GET", "/dashboard"), ("GET", "/static/{version}/{name:path}"),
    ("GET", "/session"), ("POST", "/session"), ("DELETE", "/session"),
}  # fmt: skip
# Any key will do: lists of names, and what a program asks before it shows anything.
ANY = {
    *(("GET", path) for path in ("/openapi.json", "/status", "/v1/models", "/v1/models/{name:path}", "/v1/get_result")),
    ("HEAD", "/openapi.json"),
    *(
        ("GET", f"/sdapi/v1/{name}")
        for name in (
            "progress", "options", "sd-models", "samplers", "schedulers", "upscalers", "latent-upscale-modes", "loras",
            "sd-vae", "sd-modules", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles",
            "script-info", "extensions", "embeddings", "scripts", "cmd-flags",
        )
    ),
    *(
        ("POST", f"/sdapi/v1/{name}")
        for name in (
            "options", "png-info", "interrogate", "refresh-checkpoints", "refresh-loras", "refresh-vae",
            "refresh-embeddings",
        )
    ),
    # One's own jobs and pictures.
    ("GET", "/api/jobs"), ("GET", "/api/jobs/{job_id}"), ("GET", "/api/jobs/{job_id}/events"), ("GET", "/api/outputs"),
    ("GET", "/api/outputs/{output_id}"), ("GET", "/api/outputs/{output_id}/thumbnail"),
    ("GET", "/api/outputs/{output_id}/metadata"), ("POST", "/api/metadata"),
}  # fmt: skip
READ = {
    ("GET", "/info"), ("GET", "/metrics"), ("GET", "/api/tags"), ("GET", "/api/ps"), ("POST", "/api/show"),
    ("GET", "/api/image-models"), ("GET", "/dashboard/api/image-stats"), ("GET", "/fleet/status"),
    ("GET", "/fleet/queue"), ("GET", "/v1/credits"), ("GET", "/api/backends"), ("GET", "/sdapi/v1/memory"),
    ("GET", "/api/models"), ("GET", "/api/models/cards"), ("GET", "/api/samplers"), ("POST", "/api/tokens"),
    *(("GET", f"/dashboard/api/{name}") for name in ("health", "series", "settings", "traces")),
    ("GET", "/dashboard/events"), ("GET", "/fleet/jobs/{job_id}/why"),
}  # fmt: skip
GENERATE = {
    *(("POST", f"/v1/images/{name}") for name in ("generations", "edits", "variations")),
    *(
        ("POST", f"/sdapi/v1/{name}")
        for name in ("txt2img", "img2img", "interrupt", "skip", "extra-single-image", "extra-batch-images")
    ),
    ("POST", "/api/generate"), ("POST", "/api/generate-image"), ("POST", "/v1/flux-{kind}"), ("POST", "/generate"),
    ("POST", "/api/txt2img"), ("POST", "/api/img2img"), ("POST", "/api/jobs"), ("POST", "/api/jobs/{job_id}/retry"),
    ("DELETE", "/api/jobs/{job_id}"), ("DELETE", "/api/outputs/{output_id}"),
    ("PUT", "/api/outputs/{output_id}/favourite"), ("DELETE", "/api/outputs/{output_id}/favourite"),
    *(("POST", f"/api/{name}") for name in ("chat", "embed", "embeddings", "transcribe")),
    *(("POST", f"/v1/{name}") for name in ("chat/completions", "completions", "embeddings", "audio/transcriptions")),
    ("POST", "/v1/audio/translations"),
}  # fmt: skip

MANAGE = {
    ("POST", "/api/pull"), ("DELETE", "/api/delete"),
    ("POST", "/sdapi/v1/reload-checkpoint"), ("POST", "/sdapi/v1/unload-checkpoint"),
    *(("POST", f"/api/models/{{name:path}}/{verb}") for verb in ("load", "unload", "pin", "unpin")),
    ("POST", "/dashboard/api/settings"), ("POST", "/fleet/code"), ("GET", "/fleet/pending"),
    *(
        ("POST", f"/fleet/nodes/{{node}}/{verb}")
        for verb in (
            "approve", "revoke", "drain", "undrain", "limit", "pin", "unpin", "load", "unload", "pull", "forget",
        )
    ),
}  # fmt: skip


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    def walk(routes: list[BaseRoute]) -> Iterator[Route]:
        for route in routes:
            inner = getattr(route, "original_router", None)
            if inner is not None:
                yield from walk(inner.routes)
            else:
                assert isinstance(route, Route)
                yield route

    return {(method, route.path) for route in walk(app.routes) for method in route.methods or ()}


def ask(client: httpx2.Client, method: str, path: str, **headers: str) -> httpx2.Response:
    filled = path.replace("{kind}", "dev").replace("{name:path}", "starter")
    filled = filled.replace("{job_id}", "0" * 12).replace("{output_id}", f"{'0' * 12}-0")
    for name in ("node", "version"):
        filled = filled.replace(f"{{{name}}}", "n1")
    with client.stream(method, filled, headers=headers) as answer:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):  # which has no end
            answer.read()
        return answer


def check_shape(path: str, answer: httpx2.Response, *, status: int) -> None:
    """The answer to a fault is of the path's dialect."""
    dialect = dialect_of(path).name
    # Theirs is 403 for no key too.
    assert answer.status_code == (403 if dialect == "bfl" and status == 401 else status), f"{path}: {answer.text}"
    if answer.request.method == "HEAD":
        return
    body: dict[str, Any] = answer.json()
    match dialect:
        case "openai":
            assert set(body["error"]) == {"message", "type", "param", "code"}
        case "a1111" | "bfl" | "simple":
            assert body["detail"]
        case "ollama" | "native":
            assert isinstance(body["error"], str)
        case _:
            raise AssertionError(f"no shape is known of {dialect}")
    if status == 401 and dialect != "bfl":
        scheme = "Basic" if dialect == "a1111" else "Bearer"
        assert answer.headers["WWW-Authenticate"] == scheme


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from tests.api.serving import running

    with running(tmp_path_factory.mktemp("guarded"), api_key="the-master-key") as here:
        yield here


def test_each_route_is_in_one_list(guarded: Running) -> None:
    lists = (PUBLIC, ANY, READ, GENERATE, MANAGE)
    assert set().union(*lists) == routes_of(guarded.app)
    assert sum(map(len, lists)) == len(routes_of(guarded.app))


def test_every_route_but_the_public_ones_refuses_who_has_no_good_key(guarded: Running) -> None:
    _, revoked = guarded.call(guarded.house.keys.create("revoked"))
    guarded.call(guarded.house.keys.revoke("revoked"))
    wrong = "sdf_000000000000_" + "A" * 43
    bad: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer the-master-kez"},
        {"Authorization": f"Bearer {wrong}"},
        {"X-API-Key": revoked},
        {"x-key": ""},
        {"Authorization": "Basic OnRoZS1tYXN0ZXIta2V"},
    ]
    with httpx2.Client(base_url=guarded.url) as client:
        for method, path in sorted(routes_of(guarded.app) - PUBLIC):
            for headers in bad:
                check_shape(path, ask(client, method, path, **headers), status=401)


def test_public_routes_answer_without_a_key(guarded: Running) -> None:
    with httpx2.Client(base_url=guarded.url) as client:
        nothing_asked = {("GET", "/files/{output_id}"), ("GET", "/static/{version}/{name:path}"), ("POST", "/session")}
        for method, path in sorted(PUBLIC - nothing_asked):
            assert ask(client, method, path).is_success, path
        check_shape("/static", ask(client, "GET", "/static/{version}/{name:path}"), status=404)
        check_shape("/session", ask(client, "POST", "/session"), status=400)
        check_shape("/files/x", client.get("/files/x-0?expires=99999999999&signature=0"), status=403)


def test_what_is_no_route_and_every_other_method_wants_a_key_too(guarded: Running) -> None:
    with httpx2.Client(base_url=guarded.url) as client:
        for path in ("/v1/nothing", "/sdapi/v1/nothing", "/api/nothing", "/api/jobs/x/y", "/nothing", "/v1/flux-/x"):
            check_shape(path, client.get(path), status=401)
            check_shape(path, client.get(path, headers={"x-api-key": "the-master-key"}), status=404)
        for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/api/generate", "/generate", "/v1/flux-dev"):
            check_shape(path, client.put(path), status=401)
            check_shape(path, client.put(path, headers={"x-api-key": "the-master-key"}), status=405)


@pytest.mark.parametrize(
    ("has", "lists"), [("read", (GENERATE, MANAGE)), ("generate", (READ, MANAGE)), ("manage", (READ, GENERATE))]
)
def test_a_key_without_the_right_is_refused_before_the_body_is_read(
    guarded: Running, has: Any, lists: tuple[set[tuple[str, str]], ...]
) -> None:
    _, secret = guarded.call(guarded.house.keys.create(f"only {has}", scopes=[has]))
    with httpx2.Client(base_url=guarded.url, headers={"X-API-Key": secret}) as client:
        for method, path in sorted(set().union(*lists)):
            check_shape(path, ask(client, method, path), status=403)
        for method, path in sorted(ANY - {("GET", "/v1/get_result")}):
            assert ask(client, method, path).status_code not in {401, 403}, path


def test_nobody_sees_or_stops_the_jobs_of_another_key(guarded: Running) -> None:
    _, mine = guarded.call(guarded.house.keys.create("mine"))
    _, other = guarded.call(guarded.house.keys.create("other"))
    with httpx2.Client(base_url=guarded.url, headers={"X-API-Key": mine}) as client:
        made = client.post("/api/txt2img", json={"prompt": "a", "steps": 1}).json()
    output = made["images"][0]["url"]
    with httpx2.Client(base_url=guarded.url, headers={"X-API-Key": other}) as client:
        job = f"/api/jobs/{made['job_id']}"
        for method, path in (
            ("GET", job), ("GET", f"{job}/events"), ("DELETE", job), ("POST", f"{job}/retry"),
            ("GET", output), ("GET", f"{output}/thumbnail"), ("DELETE", output),
            ("GET", f"/v1/get_result?id={made['job_id']}"),
        ):  # fmt: skip
            assert client.request(method, path).status_code == 404, path
        assert client.get("/api/jobs").json()["jobs"] == []
        assert client.get("/api/outputs").json()["outputs"] == []
    with httpx2.Client(base_url=guarded.url, headers={"X-API-Key": mine}) as client:
        assert client.get(output).status_code == 200


def test_keys_and_signatures_are_compared_in_constant_time(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = guarded.call(guarded.house.keys.create("timed"))
    compared: list[tuple[bytes, bytes]] = []
    real: Callable[[Any, Any], bool] = hmac.compare_digest

    def counting(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    unknown = "sdf_000000000000_" + "A" * 43
    with httpx2.Client(base_url=guarded.url) as client:
        for key in (secret, secret[:-1] + "~", unknown, "x"):
            compared.clear()
            client.get("/v1/models", headers={"X-API-Key": key})
            # With the master key, with that of this machine's commands, and with a hash: also where no key has that id,
            # so that ids cannot be found.
            assert len(compared) == 3, key
        compared.clear()
        client.get("/files/x-0?expires=99999999999&signature=00")
        assert len(compared) == 1
