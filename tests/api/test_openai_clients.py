"""The requests of programs that speak OpenAI's Images API, as they put them on the wire."""

from __future__ import annotations

import base64
from typing import Any

import httpx2
import pytest

from sdfleet.storage import pictures
from tests.api.pixels import picture_file
from tests.api.serving import Running


def _bytes_of(response: httpx2.Response) -> bytes:
    assert response.status_code == 200, response.text
    return base64.b64decode(response.json()["data"][0]["b64_json"], validate=True)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            {"model": "dall-e-2", "prompt": "a fox", "n": 1, "size": "512x512", "response_format": "b64_json"},
            id="open-webui",
        ),
        pytest.param(
            {"model": "gpt-image-1", "prompt": "a fox", "n": 1, "size": "1024x1024"}, id="open-webui-gpt-image"
        ),
        pytest.param(
            {
                "model": "gpt-image-1",
                "prompt": "a fox",
                "n": 1,
                "size": "auto",
                "quality": "auto",
                "background": "auto",
                "output_format": "png",
            },
            id="librechat",
        ),
        pytest.param({"prompt": "a fox", "model": "dall-e-3", "response_format": "b64_json"}, id="n8n-dall-e"),
        pytest.param({"prompt": "a fox", "model": "gpt-image-1-mini", "size": "1024x1024"}, id="n8n-gpt-image"),
        pytest.param(
            {
                "model": "dall-e-3",
                "prompt": "a fox",
                "n": 1,
                "quality": "hd",
                "size": "1024x1792",
                "style": "natural",
                "response_format": "b64_json",
                "user": "ada",
                "metadata": {"team": "x"},
                "num_retries": 2,
                "api_version": None,
            },
            id="litellm",
        ),
    ],
)
def test_a_generation_as_programs_ask_for_it_gives_base64(fake_server: Running, body: dict[str, Any]) -> None:
    # Open WebUI sends an empty Authorization where no key is set.
    response = httpx2.post(
        f"{fake_server.url}/v1/images/generations", json=body, headers={"Authorization": ""}, timeout=30
    )
    picture = pictures.decode(_bytes_of(response))
    asked = body.get("size", "auto")
    assert asked in {"auto", f"{picture.width_px}x{picture.height_px}"}
    assert response.json()["model"] == "starter"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        pytest.param({"model": "dall-e-2", "n": "1", "response_format": "b64_json"}, "image", id="open-webui"),
        pytest.param({"model": "gpt-image-1", "n": "1", "size": "1024x1024"}, "image[]", id="open-webui-list"),
        pytest.param({"model": "gpt-image-1", "quality": "auto", "size": "auto"}, "image[]", id="librechat"),
        pytest.param({"model": "gpt-image-1", "stream": "false"}, "image[]", id="n8n"),
        pytest.param({"model": "dall-e-2", "user": ""}, "image", id="n8n-dall-e"),
    ],
)
def test_an_edit_as_programs_ask_for_it_gives_base64(fake_server: Running, fields: dict[str, str], name: str) -> None:
    response = httpx2.post(
        f"{fake_server.url}/v1/images/edits",
        data={"prompt": "a fox", **fields},
        files=[(name, ("image_0.png", picture_file(64), "image/png"))],
        timeout=30,
    )
    picture = pictures.decode(_bytes_of(response))
    assert fields.get("size", "auto") in {"auto", f"{picture.width_px}x{picture.height_px}"}


def test_litellms_edit_in_json_gives_base64(fake_server: Running) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture_file(64)).decode()
    body = {"model": "gpt-image-1", "prompt": "a fox", "image": [url], "n": 1, "stream": False}
    _bytes_of(httpx2.post(f"{fake_server.url}/v1/images/edits", json=body, timeout=30))


def test_n8ns_http_node_reads_json_by_default_and_a_picture_where_it_asks_for_one(fake_server: Running) -> None:
    default = "application/json,text/html,application/xhtml+xml,application/xml,text/*;q=0.9, image/*;q=0.8, */*;q=0.7"
    here = f"{fake_server.url}/v1/images/generations"
    as_json = httpx2.post(here, json={"prompt": "a fox"}, headers={"Accept": default}, timeout=30)
    assert as_json.headers["content-type"] == "application/json"
    as_picture = httpx2.post(here, json={"prompt": "a fox"}, headers={"Accept": "image/png"}, timeout=30)
    assert as_picture.headers["content-type"] == "image/png"
    assert pictures.decode(as_picture.content).width_px == 128


def test_n8ns_test_of_its_credential_passes(fake_server: Running) -> None:
    response = httpx2.get(f"{fake_server.url}/v1/models", headers={"Authorization": "Bearer anything"})
    assert response.status_code == 200
    assert {"id", "object", "created", "owned_by"} <= set(response.json()["data"][0])
