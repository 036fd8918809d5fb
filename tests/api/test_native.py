from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable

import httpx2
import pytest
from PIL import Image

from tests.api.serving import Running


def _png(side_px: int = 64, colour: str = "red") -> str:
    file = io.BytesIO()
    Image.new("RGB", (side_px, side_px), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _pixels(data: bytes) -> str:
    return hashlib.sha256(Image.open(io.BytesIO(data)).convert("RGB").tobytes()).hexdigest()


def test_the_same_request_gives_the_same_pixels_through_every_dialect(fake_server: Running) -> None:
    asked = {"prompt": "a red circle", "seed": 7, "steps": 4, "width": 128, "height": 96, "negative_prompt": "blue"}
    with httpx2.Client(base_url=fake_server.url, timeout=60) as client:
        simple = client.post("/generate", json={**asked, "num_inference_steps": 4, "guidance_scale": 2}).json()
        txt2img = client.post("/api/txt2img", json={**asked, "guidance_scale": 2}).json()
        herd = client.post("/api/generate-image", json={**asked, "model": "starter", "guidance": 2})
        options = {"seed": 7, "guidance": 2, "negative_prompt": "blue"}
        ollama = client.post(
            "/api/generate", json={**asked, "model": "starter", "options": options, "stream": False}
        ).json()
        openai = client.post(
            "/v1/images/generations",
            json={"prompt": "a red circle", "size": "128x96", "seed": 7, "steps": 4, "guidance": 2,
                  "negative_prompt": "blue"},
        ).json()  # fmt: skip
        a1111 = client.post("/sdapi/v1/txt2img", json={**asked, "cfg_scale": 2})
        job = client.post("/api/jobs", json={**asked, "guidance": 2}).json()
        client.get(f"/api/jobs/{job['id']}/events")  # ends with the job
        job = client.get(f"/api/jobs/{job['id']}").json()
        native = client.get(job["outputs"][0]["url"]).content
    found = {
        "simple": base64.b64decode(simple["image_base64"]),
        "txt2img": base64.b64decode(txt2img["images"][0]["b64_json"]),
        "herd": herd.content,
        "ollama": base64.b64decode(ollama["image"]),
        "openai": base64.b64decode(openai["data"][0]["b64_json"]),
        "a1111": base64.b64decode(a1111.json()["images"][0]),
        "jobs": native,
    }
    assert len({_pixels(data) for data in found.values()}) == 1, {name: _pixels(d) for name, d in found.items()}


def test_json_is_read_whatever_the_content_type_says(fake_server: Running) -> None:
    body = json.dumps({"prompt": "a red circle", "steps": 1})
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        answer = httpx2.post(f"{fake_server.url}/api/txt2img", content=body, headers={"Content-Type": kind}, timeout=60)
        assert answer.status_code == 200, answer.text


def test_an_accept_header_of_a_picture_is_answered_with_the_picture(fake_server: Running) -> None:
    for kind, format in (("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")):
        answer = httpx2.post(
            f"{fake_server.url}/api/txt2img", json={"prompt": "x", "steps": 1, "seed": 5}, headers={"Accept": kind}
        )
        assert answer.headers["content-type"] == kind
        assert answer.headers["x-seed"] == "5"
        assert Image.open(io.BytesIO(answer.content)).format == format


def test_the_seed_that_was_used_is_answered_and_draws_the_same_picture(fake_server: Running) -> None:
    first = httpx2.post(f"{fake_server.url}/generate", json={"prompt": "x", "num_inference_steps": 2}).json()
    again = httpx2.post(
        f"{fake_server.url}/generate", json={"prompt": "x", "num_inference_steps": 2, "seed": first["seed"]}
    ).json()
    assert _pixels(base64.b64decode(first["image_base64"])) == _pixels(base64.b64decode(again["image_base64"]))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "num_inference_steps": 151}, "num_inference_steps"),
        ({"prompt": "x", "guidance_scale": 0.5}, "guidance_scale"),
        ({"prompt": "x", "width": 65, "height": 64}, "width"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
        ({"prompt": 3}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_a_bad_field_is_answered_422_with_its_name(fake_server: Running, body: dict[str, object], field: str) -> None:
    answer = httpx2.post(f"{fake_server.url}/generate", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", field]


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '"x"', "\xff", "[" * 100_000, '{"prompt":' + "9" * 5000 + "}"])
def test_a_body_that_is_no_json_object_is_a_clear_fault(fake_server: Running, body: str) -> None:
    answer = httpx2.post(f"{fake_server.url}/api/txt2img", content=body.encode("latin-1"))
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_a_lone_surrogate_is_told_and_not_a_fault_of_ours(fake_server: Running) -> None:
    for field in ("prompt", "model", "sampler", "backend"):
        body = '{"prompt": "x", "' + field + '": "\\ud800"}'
        answer = httpx2.post(f"{fake_server.url}/api/txt2img", content=body)
        assert answer.status_code in {400, 404}, answer.text


def test_an_unknown_field_is_told_with_its_name(fake_server: Running) -> None:
    answer = httpx2.post(f"{fake_server.url}/api/txt2img", json={"prompt": "x", "stepz": 3})
    assert answer.status_code == 400
    assert "stepz" in answer.json()["error"]


def test_img2img_needs_a_picture_and_takes_it_as_base64_or_data_url(fake_server: Running) -> None:
    url = f"{fake_server.url}/api/img2img"
    assert httpx2.post(url, json={"prompt": "x"}).status_code == 400
    plain = httpx2.post(url, json={"prompt": "x", "steps": 2, "seed": 1, "image": _png()}).json()
    data = httpx2.post(
        url, json={"prompt": "x", "steps": 2, "seed": 1, "image": f"data:image/png;base64,{_png()}"}
    ).json()
    drawn = [_pixels(base64.b64decode(answer["images"][0]["b64_json"])) for answer in (plain, data)]
    assert drawn[0] == drawn[1]


def test_a_picture_by_url_is_refused_unless_the_server_allows_it(fake_server: Running) -> None:
    answer = httpx2.post(
        f"{fake_server.url}/api/img2img", json={"prompt": "x", "image": "http://169.254.169.254/latest/meta-data"}
    )
    assert answer.status_code == 400
    assert "SD_ALLOW_IMAGE_URLS" in answer.json()["error"]


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/x.png", "http://localhost/x", "http://[::1]/", "http://10.0.0.1/", "http://169.254.169.254/",
     "http://2130706433/", "http://0x7f.1/", "http://[::ffff:127.0.0.1]/"],
)  # fmt: skip
def test_a_picture_is_never_fetched_from_a_private_network(server: Callable[..., Running], url: str) -> None:
    here = server(allow_image_urls=True)
    answer = httpx2.post(f"{here.url}/api/img2img", json={"prompt": "x", "image": url}, timeout=30)
    assert answer.status_code == 400


def test_backends_tell_what_is_here_and_why_the_rest_is_not(fake_server: Running) -> None:
    backends = {entry["id"]: entry for entry in httpx2.get(f"{fake_server.url}/api/backends").json()}
    assert backends["sd"]["available"]
    assert backends["sd"]["default"]
    assert backends["sd"]["models"] == ["starter"]
    assert not backends["flux-api"]["available"]
    assert backends["flux-api"]["reason"]
    answer = httpx2.post(f"{fake_server.url}/api/txt2img", json={"prompt": "x", "backend": "flux-api"})
    assert (answer.status_code, answer.json()["code"]) == (503, "backend_unavailable")


def test_health_status_and_info_tell_how_the_server_stands_without_secrets(server: Callable[..., Running]) -> None:
    here = server(api_key="geheim")
    assert httpx2.get(f"{here.url}/health").json()["model_loaded"]
    assert httpx2.get(f"{here.url}/status").status_code == 401
    headers = {"Authorization": "Bearer geheim"}
    assert httpx2.get(f"{here.url}/status", headers=headers).json()["loaded"]
    info = httpx2.get(f"{here.url}/info", headers=headers)
    assert info.json()["models"] == ["starter"]
    assert "geheim" not in info.text


def test_prometheus_finds_the_counts_of_jobs(server: Callable[..., Running]) -> None:
    here = server()
    httpx2.post(f"{here.url}/generate", json={"prompt": "x", "num_inference_steps": 1})
    text = httpx2.get(f"{here.url}/metrics").text
    assert 'sdfleet_jobs_done_total{dialect="simple",model="starter"} 1.0' in text
    assert "sdfleet_jobs_queued 0.0" in text
