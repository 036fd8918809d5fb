"""Which backend is to draw can be said in every dialect, and every answer says which one did."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx2
import ollama as ollama_sdk
import pytest
import webuiapi

from sdfleet.storage.pictures import read_metadata
from tests.api.serving import Running
from tests.api.test_backends import bfl, bfl_served, here, ollama, post
from tests.backends.bfl_server import BflServer

__all__ = ["bfl", "bfl_served", "here", "ollama"]

SIZE = {"width": 512, "height": 256}


def native(model: str, backend: str) -> dict[str, Any]:
    return {"prompt": "a fox", "model": model, "backend": backend, **SIZE}


def openais(model: str, backend: str) -> dict[str, Any]:
    return {"prompt": "a fox", "model": model, "backend": backend, "size": "512x256"}


def a1111s(model: str, backend: str) -> dict[str, Any]:
    return {"prompt": "a fox", "backend": backend, "override_settings": {"sd_model_checkpoint": model}, **SIZE}


def a1111s_settings(model: str, backend: str) -> dict[str, Any]:
    settings = {"sd_model_checkpoint": model, "sd_backend": backend}
    return {"prompt": "a fox", "override_settings": settings, **SIZE}


def ollamas(model: str, backend: str) -> dict[str, Any]:
    return {"prompt": "a fox", "model": model, "options": {"backend": backend}, "stream": False, **SIZE}


def ollamas_beside(model: str, backend: str) -> dict[str, Any]:
    return {"prompt": "a fox", "model": model, "backend": backend, "stream": False, **SIZE}


Asked = Callable[[str, str], dict[str, Any]]
Said = Callable[[httpx2.Response], tuple[str | None, float | None]]


def in_header(answer: httpx2.Response) -> tuple[str | None, float | None]:
    return answer.headers["x-backend"], None


def in_json(answer: httpx2.Response) -> tuple[str | None, float | None]:
    return answer.json()["backend"], answer.json().get("cost_credits")


def in_info(answer: httpx2.Response) -> tuple[str | None, float | None]:
    info = json.loads(answer.json()["info"])
    assert answer.headers["x-backend"] == info["backend"]
    return info["backend"], info["cost_credits"]


def in_both(answer: httpx2.Response) -> tuple[str | None, float | None]:
    assert answer.headers["x-backend"] == answer.json()["backend"]
    return in_json(answer)


def refused_with(path: str) -> int:
    """The status of a wrong field, as each dialect has it."""
    return 422 if path in {"/sdapi/v1/txt2img", "/generate"} else 400


DIALECTS: list[tuple[str, Asked, Said]] = [
    ("/api/txt2img", native, in_json),
    ("/generate", native, in_json),
    ("/api/generate-image", native, in_header),
    ("/v1/images/generations", openais, in_json),
    ("/sdapi/v1/txt2img", a1111s, in_info),
    ("/sdapi/v1/txt2img", a1111s_settings, in_info),
    ("/api/generate", ollamas, in_both),
    ("/api/generate", ollamas_beside, in_both),
]
NAMES = [f"{path} {asked.__name__}" for path, asked, _ in DIALECTS]
every_dialect = pytest.mark.parametrize(("path", "asked", "said"), DIALECTS, ids=NAMES)


@every_dialect
def test_the_one_that_is_named_draws_and_the_answer_says_so(
    here: Running, bfl: BflServer, path: str, asked: Asked, said: Said
) -> None:
    answer = post(here, path, asked("flux-pro-1.1", "flux-api"))
    assert answer.status_code == 200, answer.text
    backend, cost_credits = said(answer)
    assert backend == "flux-api"
    assert cost_credits in {None, 4.0}
    assert [task["model"] for task in bfl.tasks.values()] == ["flux-pro-1.1"]


@every_dialect
def test_our_own_engine_can_be_named_too_and_says_that_it_drew(
    here: Running, path: str, asked: Asked, said: Said
) -> None:
    for name in ("sd", "auto"):
        answer = post(here, path, asked("starter", name))
        assert (answer.status_code, said(answer)[0]) == (200, "sd"), answer.text


@every_dialect
def test_one_that_there_is_not_is_refused_with_those_that_there_are(
    here: Running,
    path: str,
    asked: Asked,
    said: Said,  # noqa: ARG001 - of the table
) -> None:
    answer = post(here, path, asked("starter", "dall-e"))
    assert answer.status_code == refused_with(path), answer.text
    assert "dall-e" in answer.text
    assert "flux-api" in answer.text


@every_dialect
def test_one_that_cannot_draw_the_model_is_refused(
    here: Running,
    bfl: BflServer,
    path: str,
    asked: Asked,
    said: Said,  # noqa: ARG001 - of the table
) -> None:
    answer = post(here, path, asked("starter", "flux-api"))
    told = post(here, "/api/txt2img", native("starter", "flux-api")).json()["error"]
    assert (answer.status_code, told[:40] in answer.text) == (refused_with(path), True), answer.text
    assert bfl.n_asked.total() == 0


@every_dialect
@pytest.mark.parametrize(("name", "cure"), [("flux-api", "SD_BFL_API_KEY"), ("ollama", "SD_OLLAMA_URL")])
def test_one_that_is_not_set_up_is_503_and_says_what_to_do(
    fake_server: Running,
    path: str,
    asked: Asked,
    said: Said,  # noqa: ARG001 - of the table
    name: str,
    cure: str,
) -> None:
    answer = post(fake_server, path, asked("starter", name))
    assert (answer.status_code, cure in answer.text) == (503, True), answer.text


# ------------------------------------------------------------------------------------------------ clients as they are


@pytest.mark.parametrize("settings", [{"sd_backend": "diffusers"}, {"sd_backend": "original"}, {"sd_backend": None}])
def test_sd_nexts_own_ways_to_run_a_model_are_no_choice(here: Running, settings: dict[str, Any]) -> None:
    answer = post(here, "/sdapi/v1/txt2img", {"prompt": "x", "steps": 1, "override_settings": settings})
    assert (answer.status_code, in_info(answer)[0]) == (200, "sd"), answer.text


@pytest.mark.parametrize("path", ["/sdapi/v1/txt2img", "/api/generate"])
def test_what_is_no_name_is_refused(here: Running, path: str) -> None:
    odd = {"override_settings": {"sd_backend": 5}, "options": {"backend": ["sd"]}}
    answer = post(here, path, {"prompt": "x", "model": "starter", **odd})
    assert answer.status_code in {400, 422}
    assert "backend" in answer.text


@pytest.mark.usefixtures("bfl")
def test_webuiapi_names_it_in_override_settings(here: Running) -> None:
    address = httpx2.URL(here.url)
    client = webuiapi.WebUIApi(host=address.host, port=address.port)
    settings = {"sd_model_checkpoint": "flux-pro-1.1", "sd_backend": "flux-api"}
    result = client.txt2img(prompt="a fox", width=512, height=256, override_settings=settings)
    assert (result.info["backend"], result.image.size) == ("flux-api", (512, 256))


@pytest.mark.usefixtures("bfl")
def test_ollamas_client_names_it_in_options_and_the_last_line_says_so(here: Running) -> None:
    client = ollama_sdk.Client(here.url)
    options = {"backend": "flux-api"}
    lines = list(client.generate("flux-pro-1.1", "a fox", width=512, height=256, stream=True, options=options))
    client._client.close()
    last = lines[-1].model_dump()
    noted = read_metadata(base64.b64decode(last["image"]))
    assert noted is not None
    assert noted.backend == "flux-api"
    with httpx2.stream(
        "POST", f"{here.url}/api/generate", json={**ollamas("flux-pro-1.1", "flux-api"), "stream": True}, timeout=60
    ) as answer:
        assert answer.headers["x-backend"] == "flux-api"
        told = [json.loads(line) for line in answer.iter_lines()]
    assert (told[-1]["backend"], told[-1]["cost_credits"]) == ("flux-api", 4.0)


def test_a_picture_to_be_changed_goes_to_the_one_that_is_named(here: Running, bfl: BflServer) -> None:
    (drawn,) = post(here, "/sdapi/v1/txt2img", {"prompt": "x", "steps": 1, "width": 64, "height": 64}).json()["images"]
    asked = a1111s("flux-kontext-pro", "flux-api") | {"init_images": [drawn]}
    answer = post(here, "/sdapi/v1/img2img", asked)
    assert (answer.status_code, in_info(answer)[0]) == (200, "flux-api"), answer.text
    assert len(bfl.tasks) == 1
