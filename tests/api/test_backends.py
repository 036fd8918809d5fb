"""Other engines behind the same doors: services that are not the real ones, and every route that can name them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from sdfleet.storage.pictures import read_metadata
from tests.api.serving import Running, running
from tests.backends.bfl_server import KEY, BflServer
from tests.backends.ollama_server import TEXT_MODEL, OllamaServer
from tests.backends.services import QUICK
from tests.backends.stand_in import serving

Server = Callable[..., Running]
ASKED = {"prompt": "a fox", "backend": "flux-api", "model": "flux-pro-1.1", "width": 512, "height": 256, "seed": 7}


@pytest.fixture(scope="module")
def bfl_served() -> Iterator[BflServer]:
    with serving(BflServer()) as server:
        yield server


@pytest.fixture
def bfl(bfl_served: BflServer) -> BflServer:
    bfl_served.renew()
    return bfl_served


@pytest.fixture(scope="module")
def ollama() -> Iterator[OllamaServer]:
    """It is looked at once; on a busy machine its answer may take longer than a person would wait for it."""
    with pytest.MonkeyPatch.context() as patch, serving(OllamaServer()) as server:
        patch.setattr("sdfleet.backends.ollama_images.LOOK_WITHIN_S", 60.0)
        yield server


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, bfl_served: BflServer, ollama: OllamaServer) -> Iterator[Running]:
    """One server with everything beside it."""
    home = tmp_path_factory.mktemp("with-services")
    with running(home, bfl_api_key=KEY, bfl_endpoint=bfl_served.url, ollama_url=ollama.url) as one:
        quick(one)
        yield one


def quick(here: Running) -> None:
    way = here.house.runtime.backends.way("flux-api")
    assert way is not None
    way.backend._pace = QUICK  # type: ignore[attr-defined]


def post(here: Running, path: str, body: dict[str, Any], **headers: str) -> httpx2.Response:
    return httpx2.post(f"{here.url}{path}", json=body, headers=headers, timeout=60)


def sdk(here: Running) -> openai.OpenAI:
    """To be used in a `with`: its connections are closed by nobody else."""
    return openai.OpenAI(base_url=f"{here.url}/v1", api_key="none")


# -------------------------------------------------------------------------------------------------- who draws, and says


@pytest.mark.usefixtures("bfl")
def test_a_service_draws_where_it_is_named_and_everything_says_so(here: Running) -> None:
    answer = post(here, "/api/txt2img", {**ASKED, "n": 2}).json()
    assert (answer["backend"], answer["model"], answer["cost_credits"]) == ("flux-api", "flux-pro-1.1", 8.0)
    assert "drawn by 127.0.0.1: what was asked for has left this machine" in answer["warnings"]
    job = httpx2.get(f"{here.url}/api/jobs/{answer['job_id']}").json()
    assert (job["backend"], job["cost_credits"], job["state"]) == ("flux-api", 8.0, "done")
    assert job["warnings"] == answer["warnings"]
    noted = read_metadata(base64.b64decode(answer["images"][0]["b64_json"]))
    assert noted is not None
    assert (noted.backend, noted.cost_credits, noted.device, noted.seed) == ("flux-api", 4.0, "127.0.0.1", 7)
    assert (noted.steps, noted.guidance, noted.sampler) == (None, None, None), "nobody knows these"


def test_every_dialect_that_can_name_a_backend_does(here: Running, bfl: BflServer) -> None:
    raw = post(here, "/api/txt2img", ASKED, Accept="image/png")
    assert (raw.headers["x-backend"], raw.headers["content-type"]) == ("flux-api", "image/png")
    herd = post(here, "/api/generate-image", ASKED)
    assert herd.headers["x-backend"] == "flux-api"
    size = {"width": 512, "height": 256}
    generate = post(here, "/generate", {"prompt": "a fox", "backend": "flux-api", "model": "flux-pro-1.1", **size})
    assert generate.json()["backend"] == "flux-api"
    extra = {"backend": "flux-api", "seed": 7}
    with sdk(here) as client:
        images = client.images.generate(prompt="a fox", model="flux-pro-1.1", size="512x256", extra_body=extra)
    assert images.model_extra is not None
    assert (images.model_extra["backend"], images.model_extra["cost_credits"]) == ("flux-api", 4.0)
    job = post(here, "/api/jobs", ASKED).json()
    assert job["backend"] == "flux-api"
    httpx2.get(f"{here.url}/api/jobs/{job['id']}/events", timeout=60)
    assert len(bfl.tasks) == 5
    assert {task["model"] for task in bfl.tasks.values()} == {"flux-pro-1.1"}


def test_our_own_engine_says_that_it_drew(here: Running) -> None:
    asked = {"prompt": "x", "steps": 1}
    assert post(here, "/api/txt2img", asked).json()["backend"] == "sd"
    assert post(here, "/api/txt2img", {**asked, "backend": "sd"}).json()["backend"] == "sd"
    assert post(here, "/api/generate-image", {**asked, "model": "starter"}).headers["x-backend"] == "sd"


# --------------------------------------------------------------------------------------------- what leaves this machine


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/txt2img", {"model": "flux-pro-1.1"}),
        ("/api/jobs", {"model": "flux-pro-1.1", "backend": "auto"}),
        ("/api/generate-image", {"model": "flux-pro-1.1"}),
        ("/v1/images/generations", {"model": "flux-pro-1.1"}),
        ("/api/generate", {"model": "flux-pro-1.1"}),
        ("/sdapi/v1/txt2img", {"override_settings": {"sd_model_checkpoint": "flux-pro-1.1"}}),
    ],
)
def test_the_name_of_a_model_alone_sends_nothing_away(
    here: Running, bfl: BflServer, path: str, body: dict[str, Any]
) -> None:
    answer = post(here, path, {"prompt": "a secret fox", **body})
    assert answer.status_code in {400, 422}, answer.text
    assert "flux-api" in answer.text
    assert bfl.n_asked.total() == 0


def test_paths_shaped_like_the_services_are_drawn_here(here: Running, bfl: BflServer) -> None:
    job = post(here, "/v1/flux-pro-1.1", {"prompt": "a fox", "width": 512, "height": 512}).json()
    httpx2.get(f"{here.url}/api/jobs/{job['id']}/events", timeout=60)
    result = httpx2.get(job["polling_url"]).json()
    assert (result["status"], result["result"]["model"]) == ("Ready", "starter")
    assert bfl.n_asked.total() == 0


def test_a_default_backend_draws_what_names_neither_it_nor_a_model_and_nothing_before_that(
    server: Server, bfl: BflServer
) -> None:
    one = server(bfl_api_key=KEY, bfl_endpoint=bfl.url, default_backend="flux-api")
    quick(one)
    assert bfl.n_asked.total() == 0, "nobody pays for a warm-up"
    answer = post(one, "/api/txt2img", {"prompt": "a fox"}).json()
    assert (answer["backend"], answer["model"]) == ("flux-api", "flux-pro-1.1")
    assert post(one, "/api/txt2img", {"prompt": "a fox", "model": "starter", "steps": 1}).json()["backend"] == "sd"
    with sdk(one) as client:
        assert client.images.generate(prompt="a fox").model_extra["backend"] == "flux-api"  # type: ignore[index]
    assert len(bfl.tasks) == 2
    backends = {each["id"]: each for each in httpx2.get(f"{one.url}/api/backends").json()}
    assert [name for name, each in backends.items() if each["default"]] == ["flux-api"]


# ------------------------------------------------------------------------------------------------------ how each stands


@pytest.mark.usefixtures("bfl")
def test_every_list_of_models_has_those_of_the_others_with_their_backend(here: Running) -> None:
    backends = {each["id"]: each for each in httpx2.get(f"{here.url}/api/backends").json()}
    assert backends["flux-api"]["available"]
    assert {"flux-pro-1.1", "flux-2-pro", "flux-dev"} <= set(backends["flux-api"]["models"])
    assert backends["ollama"]["models"] == ["z-image-turbo"]
    assert (backends["sd"]["engine"], backends["sd"]["models"]) == ("fake", ["starter"])
    assert {each["id"] for each in httpx2.get(f"{here.url}/health").json()["backends"]} == set(backends)
    models = {each["name"]: each["backend"] for each in httpx2.get(f"{here.url}/api/models").json()["models"]}
    assert (models["flux-pro-1.1"], models["z-image-turbo"], models["starter"]) == ("flux-api", "ollama", None)
    herds = {each["name"]: each["backend"] for each in httpx2.get(f"{here.url}/api/image-models").json()["models"]}
    assert (herds["flux-pro-1.1"], herds["z-image-turbo"], herds["starter"]) == ("bfl", "ollama", "local")
    cards = {each["name"]: each for each in httpx2.get(f"{here.url}/api/models/cards").json()["here"]}
    assert (cards["flux-dev"]["max_side"], cards["flux-dev"]["multiple"]) == (1440, 32)
    assert "negative_prompt" in cards["flux-pro-1.1"]["ignores"]
    with sdk(here) as client:
        assert "flux-pro-1.1" in {each.id for each in client.models.list()}
    assert "flux-pro-1.1" in {each["name"] for each in httpx2.get(f"{here.url}/api/tags").json()["models"]}
    shown = post(here, "/api/show", {"model": "flux-pro-1.1"}).json()
    assert shown["capabilities"] == ["image"]
    assert httpx2.get(f"{here.url}/sdapi/v1/sd-models").status_code == 200


def test_what_is_asked_about_a_model_without_weights_here_has_an_answer(here: Running) -> None:
    tokens = post(here, "/api/tokens", {"model": "flux-pro-1.1", "prompt": "a fox"})
    assert (tokens.status_code, tokens.json()["prompt"]) == (200, [])
    for path in ("/sdapi/v1/embeddings", "/sdapi/v1/options", "/fleet/status", "/fleet/queue", "/api/ps", "/info"):
        assert httpx2.get(f"{here.url}{path}").status_code == 200, path
    assert httpx2.get(f"{here.url}/v1/models/flux-pro-1.1").json()["root"] == "flux-pro-1.1"
    assert post(here, "/api/models/z-image-turbo/load", {}).status_code == 200
    assert post(here, "/api/models/z-image-turbo/unload", {}).status_code == 200
    assert post(here, "/api/generate", {"model": "z-image-turbo", "prompt": ""}).json()["done_reason"] == "load"


def test_no_answer_holds_the_key(here: Running) -> None:
    for path in ("/info", "/api/backends", "/health", "/api/models", "/metrics", "/status", "/dashboard/api/settings"):
        assert KEY not in httpx2.get(f"{here.url}{path}").text


def test_what_is_not_set_up_says_what_to_do_in_the_callers_dialect(fake_server: Running) -> None:
    for name, cure in (("flux-api", "SD_BFL_API_KEY"), ("ollama", "SD_OLLAMA_URL")):
        for path in ("/api/txt2img", "/generate", "/api/generate-image"):
            answer = post(fake_server, path, {"prompt": "x", "model": "starter", "backend": name})
            assert (answer.status_code, cure in answer.text) == (503, True), answer.text
        with sdk(fake_server) as client, pytest.raises(openai.InternalServerError, match=cure) as caught:
            client.images.generate(prompt="x", extra_body={"backend": name})
        assert caught.value.response.headers["x-should-retry"] == "false"
    unknown = post(fake_server, "/api/txt2img", {"prompt": "x", "backend": "dall-e"})
    assert (unknown.status_code, unknown.json()["field"]) == (400, "backend")


# ------------------------------------------------------------------------------------------------- refusals, by the SDK

REFUSALS: list[tuple[str, Any, type[openai.APIStatusError], str | None, str | None]] = [
    ("submit", 402, openai.RateLimitError, "insufficient_quota", "false"),
    ("submit", 403, openai.InternalServerError, "backend_unavailable", "false"),
    ("submit", 400, openai.BadRequestError, "bad_request", None),
    ("status", "Request Moderated", openai.BadRequestError, "moderation_blocked", None),
    ("status", "Content Moderated", openai.BadRequestError, "moderation_blocked", None),
    ("status", "Error", openai.InternalServerError, "backend_failed", "false"),
]


@pytest.mark.parametrize(("where", "what", "kind", "code", "retry"), REFUSALS)
def test_openais_sdk_raises_the_right_class_and_does_not_pay_again(
    here: Running,
    bfl: BflServer,
    where: str,
    what: Any,
    kind: type[openai.APIStatusError],
    code: str | None,
    retry: str | None,
) -> None:
    (bfl.submits if where == "submit" else bfl.statuses).append(what)
    extra = {"backend": "flux-api"}
    with sdk(here) as client, pytest.raises(kind) as caught:
        client.images.generate(prompt="a fox", model="flux-pro-1.1", size="512x256", extra_body=extra)
    assert (caught.value.code, caught.value.response.headers.get("x-should-retry")) == (code, retry)
    assert bfl.n_asked["submit"] == 1


def test_a_field_that_the_service_would_refuse_is_named_before_it_is_asked(here: Running, bfl: BflServer) -> None:
    answer = post(here, "/api/txt2img", {**ASKED, "width": 2048})
    assert (answer.status_code, answer.json()["field"]) == (400, "width")
    loras = post(here, "/api/txt2img", {**ASKED, "loras": [{"name": "ink"}]})
    assert loras.status_code == 400
    assert "takes no LoRAs" in loras.text
    assert bfl.n_asked.total() == 0


# ---------------------------------------------------------------------------------------------------- jobs that outlive


def test_a_job_keeps_its_backend_and_its_order_when_the_server_is_started_again(tmp_path: Path, bfl: BflServer) -> None:
    settings: dict[str, Any] = {"bfl_api_key": KEY, "bfl_endpoint": bfl.url}
    bfl.statuses += ["Pending"] * 1_000_000
    with running(tmp_path, **settings) as first:
        quick(first)
        job = post(first, "/api/jobs", ASKED).json()
        bfl.wait_until(lambda: bfl.n_asked["poll"] >= 2)
    bfl.statuses.clear()
    with running(tmp_path, **settings) as second:
        quick(second)
        httpx2.get(f"{second.url}/api/jobs/{job['id']}/events", timeout=60)
        done = httpx2.get(f"{second.url}/api/jobs/{job['id']}").json()
    assert (done["state"], done["backend"], done["seed"], done["cost_credits"]) == ("done", "flux-api", 7, 4.0)
    assert bfl.n_asked["submit"] == 1


def test_jobs_of_a_service_do_not_wait_for_the_device_nor_it_for_them(here: Running, bfl: BflServer) -> None:
    bfl.statuses += ["Pending"] * 1_000_000
    away = post(here, "/api/jobs", ASKED).json()
    bfl.wait_until(lambda: bfl.n_asked["poll"] >= 1)
    assert post(here, "/api/txt2img", {"prompt": "x", "steps": 1}).json()["backend"] == "sd"
    with here.holding() as gate:
        local = post(here, "/api/jobs", {"prompt": "x", "steps": 1}).json()
        gate.wait_for_job()
        bfl.statuses.clear()
        httpx2.get(f"{here.url}/api/jobs/{away['id']}/events", timeout=60)
        assert httpx2.get(f"{here.url}/api/jobs/{away['id']}").json()["state"] == "done"
        assert post(here, "/api/txt2img", ASKED).status_code == 200
        assert httpx2.get(f"{here.url}/api/jobs/{local['id']}").json()["state"] == "running"


# --------------------------------------------------------------------------------------------------------------- Ollama


def test_a_model_that_an_ollama_has_is_drawn_there_with_progress(here: Running, ollama: OllamaServer) -> None:
    ollama.drawn.clear()
    answer = post(here, "/api/txt2img", {"prompt": "a fox", "model": "z-image-turbo", "width": 64, "height": 48})
    assert (answer.json()["backend"], answer.json()["model"]) == ("ollama", "z-image-turbo")
    body = {"model": "x/z-image-turbo", "prompt": "a fox", "width": 64, "height": 48, "steps": 4}
    with httpx2.stream("POST", f"{here.url}/api/generate", json=body, timeout=60) as stream:
        lines = [json.loads(line) for line in stream.iter_lines()]
    assert [line["total"] for line in lines[:-1]] == [4] * (len(lines) - 1)
    assert lines[-1]["image"]
    assert [asked["steps"] for asked in ollama.drawn] == [8, 4]


def test_a_text_model_of_an_ollama_is_no_model_for_pictures(here: Running, ollama: OllamaServer) -> None:
    ollama.drawn.clear()
    for body in ({"model": TEXT_MODEL}, {"model": TEXT_MODEL, "backend": "ollama"}):
        assert post(here, "/api/txt2img", {"prompt": "x", **body}).status_code == 404
    assert ollama.drawn == []
