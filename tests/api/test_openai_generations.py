"""`/v1/images/generations` and `/v1/models` through OpenAI's own client, against a real server."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from sdfleet.storage import pictures
from tests.api.pixels import format_of, from_base64
from tests.api.serving import Running

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def client(fake_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fake_server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def _post(here: Running, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{here.url}/v1/images/generations", json={"prompt": "a red fox", **body}, timeout=30)


def _error(response: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_prompt_alone_gives_one_picture_of_the_cards_own_size(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red fox")
    assert answer.data is not None
    (image,) = answer.data
    picture = from_base64(image.b64_json)
    assert (picture.width_px, picture.height_px) == (128, 128)
    assert image.url is None
    assert image.revised_prompt == "a red fox"
    assert (answer.size, answer.output_format, answer.background, answer.quality) == (
        "128x128",
        "png",
        "opaque",
        "medium",
    )
    assert answer.created > 1_700_000_000


def test_what_is_ours_comes_as_extra_fields(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red fox", extra_body={"seed": 7})
    assert answer.data is not None
    extra = answer.model_extra
    assert extra is not None
    assert extra["model"] == "starter"
    assert extra["job_id"] == answer.data[0].id.removesuffix("-0")  # type: ignore[attr-defined]
    assert "this picture was made up by the fake backend" in extra["warnings"]
    assert answer.data[0].seed == 7  # type: ignore[attr-defined]


def test_three_pictures_count_their_seeds_up(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red fox", n=3, extra_body={"seed": 7})
    assert answer.data is not None
    assert [image.seed for image in answer.data] == [7, 8, 9]  # type: ignore[attr-defined]
    assert len({image.b64_json for image in answer.data}) == 3


def test_the_async_client_gets_the_same_picture(client: openai.OpenAI, fake_server: Running) -> None:
    async def ask() -> str | None:
        async with openai.AsyncOpenAI(base_url=f"{fake_server.url}/v1", api_key="none", timeout=30) as there:
            answer = await there.images.generate(prompt="a red fox", extra_body={"seed": 7})
            assert answer.data is not None
            return answer.data[0].b64_json

    answer = client.images.generate(prompt="a red fox", extra_body={"seed": 7})
    assert answer.data is not None
    assert from_base64(asyncio.run(ask())) == from_base64(answer.data[0].b64_json)


@pytest.mark.parametrize("size", ["256x256", "512x512", "1024x1024", "1792x1024", "1024x1536"])
def test_the_sizes_of_openai_simply_work_on_the_built_in_model(client: openai.OpenAI, size: str) -> None:
    answer = client.images.generate(prompt="a red fox", size=size, model="dall-e-3")
    assert answer.data is not None
    picture = from_base64(answer.data[0].b64_json)
    assert f"{picture.width_px}x{picture.height_px}" == answer.size == size
    assert any(f"to {size}" in warning for warning in answer.model_extra["warnings"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("size", "nearest"),
    [("1000x1001", "1000x1000 and 1000x1008"), ("99999x64", "is 4096x64"), ("0x0", "is 16x16")],
)
def test_a_size_that_cannot_be_drawn_names_the_nearest(fake_server: Running, size: str, nearest: str) -> None:
    response = _post(fake_server, size=size)
    assert response.status_code == 400
    error = _error(response)
    assert (error["param"], error["code"], error["type"]) == ("size", "invalid_value", "invalid_request_error")
    assert nearest in error["message"]


@pytest.mark.parametrize("name", ["dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-2.5-flare", "chatgpt-image-latest"])
def test_openais_names_mean_the_default_model(client: openai.OpenAI, name: str) -> None:
    answer = client.images.generate(prompt="a red fox", model=name)
    assert answer.model_extra is not None
    assert answer.model_extra["model"] == "starter"


@pytest.mark.parametrize(
    ("quality", "steps", "told"),
    [
        ("low", 10, "low"),
        ("medium", 20, "medium"),
        ("standard", 20, "medium"),
        ("auto", 20, "medium"),
        ("high", 30, "high"),
        ("hd", 30, "high"),
        ("xhigh", 40, "xhigh"),
        ("max", 60, "max"),
    ],
)
def test_quality_is_a_share_of_the_cards_steps(
    client: openai.OpenAI, fake_server: Running, quality: Any, steps: int, told: str
) -> None:
    answer = client.images.generate(prompt="a red fox", quality=quality)
    assert answer.quality == told
    job = fake_server.call(fake_server.house.desk.status(answer.model_extra["job_id"])).job  # type: ignore[index]
    assert job.request.steps == steps
    has_note = any("quality" in warning for warning in answer.model_extra["warnings"])  # type: ignore[index]
    assert has_note == (steps != 20)


def test_every_field_of_ours_reaches_the_job(fake_server: Running) -> None:
    body = {
        "negative_prompt": "blurry",
        "num_inference_steps": 5,
        "guidance_scale": 4.5,
        "sampler": "DPM++ 2M",
        "scheduler": "karras",
        "seed": 11,
        "reproducible": True,
        "priority": 3,
        "user": "ada",
        "n": "2",
    }
    response = _post(fake_server, **body)
    assert response.status_code == 200, response.text
    job = fake_server.call(fake_server.house.desk.status(response.json()["job_id"])).job
    asked = job.request
    assert (asked.negative_prompt, asked.steps, asked.guidance, asked.sampler) == ("blurry", 5, 4.5, "dpm++_2m karras")
    assert (asked.seed, asked.reproducible, asked.n_images) == (11, True, 2)
    assert (job.submission.priority, job.submission.label, job.submission.dialect) == (3, "ada", "openai")
    assert response.json()["safety_identifier"] == "ada"


def test_two_names_of_one_field_may_not_disagree(fake_server: Running) -> None:
    response = _post(fake_server, steps=5, num_inference_steps=6)
    assert (response.status_code, _error(response)["param"]) == (400, "num_inference_steps")


def test_nulls_and_empty_texts_count_as_left_out(fake_server: Running) -> None:
    nothing = {"n": None, "size": None, "quality": None, "seed": None, "style": "", "user": None, "model": ""}
    response = _post(fake_server, **nothing)
    assert response.status_code == 200, response.text
    assert not any("style" in warning for warning in response.json()["warnings"])


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"style": "vivid"}, "style"),
        ({"moderation": "low"}, "moderation"),
        ({"wibble": 1}, "wibble"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 2}, "partial_images"),
        ({"complexity": "high"}, "complexity"),
        ({"negative_prompt": "rain", "guidance": 1}, "negative prompt"),
    ],
)
def test_what_has_no_effect_is_said(fake_server: Running, body: dict[str, Any], word: str) -> None:
    response = _post(fake_server, **body)
    assert response.status_code == 200, response.text
    assert any(word in warning for warning in response.json()["warnings"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": "transparent"}, "background"),
        ({"lora": "x"}, "lora"),
        ({"frame_count": 9}, "frame_count"),
        ({"image": "aGVsbG8="}, "image"),
        ({"strength": 0.5}, "strength"),
    ],
)
def test_what_would_change_the_picture_and_cannot_is_refused(
    fake_server: Running, body: dict[str, Any], param: str
) -> None:
    response = _post(fake_server, **body)
    assert response.status_code == 400
    error = _error(response)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"n": 11}, 400, "n", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"prompt": ""}, 400, "prompt", "invalid_value"),
        ({"prompt": 5}, 400, "prompt", "invalid_value"),
        ({"output_format": "gif"}, 400, "output_format", "invalid_value"),
        ({"quality": "best"}, 400, "quality", "invalid_value"),
        ({"partial_images": 4}, 400, "partial_images", "invalid_value"),
        ({"sampler": "nope"}, 400, "sampler", "invalid_value"),
        ({"seed": -2}, 400, "seed", "invalid_value"),
        ({"width": 128}, 400, "size", "invalid_value"),
        ({"model": "nope"}, 404, "model", "model_not_found"),
    ],
)
def test_a_bad_field_is_named(fake_server: Running, body: dict[str, Any], status: int, param: str, code: str) -> None:
    response = _post(fake_server, **body)
    error = _error(response)
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("output_format", "kind"), [("png", "png"), ("jpeg", "jpeg"), ("webp", "webp")])
def test_the_file_is_of_the_format_asked_for(client: openai.OpenAI, output_format: Any, kind: str) -> None:
    answer = client.images.generate(prompt="a red fox", output_format=output_format)
    assert answer.data is not None
    assert format_of(base64.b64decode(answer.data[0].b64_json or "")) == kind
    assert answer.output_format == kind


def test_compression_makes_the_file_smaller(client: openai.OpenAI) -> None:
    def n_chars(compression: int) -> int:
        answer = client.images.generate(
            prompt="a red fox",
            size="512x512",
            output_format="jpeg",
            output_compression=compression,
            extra_body={"seed": 7},
        )
        assert answer.data is not None
        return len(answer.data[0].b64_json or "")

    assert n_chars(10) < n_chars(100)


def test_a_url_is_good_for_one_who_has_no_key(server: Callable[..., Running]) -> None:
    here = server(api_key="secret")
    with openai.OpenAI(base_url=f"{here.url}/v1", api_key="secret", max_retries=0, timeout=30) as client:
        answer = client.images.generate(prompt="a red fox", response_format="url")
    assert answer.data is not None
    (image,) = answer.data
    assert image.b64_json is None
    assert image.url is not None
    assert image.url.startswith(here.url)
    assert "secret" not in image.url
    got = httpx2.get(image.url, timeout=30)
    assert (got.status_code, got.headers["content-type"]) == (200, "image/png")
    assert pictures.decode(got.content).width_px == 128


@pytest.mark.parametrize(("accept", "kind"), [("image/png", "png"), ("image/jpeg", "jpeg"), ("image/webp", "webp")])
def test_a_client_that_accepts_pictures_gets_the_bytes(fake_server: Running, accept: str, kind: str) -> None:
    response = httpx2.post(
        f"{fake_server.url}/v1/images/generations", json={"prompt": "a fox", "seed": 7}, headers={"Accept": accept}
    )
    assert (response.status_code, response.headers["content-type"]) == (200, accept)
    assert format_of(response.content) == kind
    assert response.headers["x-seed"] == "7"


def test_bytes_are_for_one_picture_only(fake_server: Running) -> None:
    response = httpx2.post(
        f"{fake_server.url}/v1/images/generations", json={"prompt": "a fox", "n": 2}, headers={"Accept": "image/png"}
    )
    assert len(response.json()["data"]) == 2


def test_usage_counts_words_and_squares(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red fox, sitting", n=2, size="256x128")
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.text_tokens == 5
    assert answer.usage.output_tokens == 2 * (256 // 16) * (128 // 16)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_models_are_those_that_are_here(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["starter"]
    assert client.models.retrieve("starter").object == "model"
    alias = client.models.retrieve("gpt-image-1")
    assert (alias.id, alias.model_extra["root"]) == ("gpt-image-1", "starter")  # type: ignore[index]
    with pytest.raises(openai.NotFoundError) as met:
        client.models.retrieve("nope")
    assert met.value.code == "model_not_found"


def test_json_is_read_whatever_its_label(fake_server: Running) -> None:
    response = httpx2.post(
        f"{fake_server.url}/v1/images/generations",
        content=b'{"prompt": "a red fox"}',
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert response.status_code == 200


@pytest.mark.slow
def test_the_picture_is_the_one_that_the_command_line_draws(starter_server: Running, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    command = ["generate", "a red fox", "--seed", "7", "--steps", "4", "--device", "cpu", "--dtype", "float32"]
    subprocess.run([sys.executable, "-m", "sdfleet", *command, "-o", str(file)], check=True, cwd=ROOT)
    with openai.OpenAI(base_url=f"{starter_server.url}/v1", api_key="none", timeout=120) as client:
        answer = client.images.generate(prompt="a red fox", extra_body={"seed": 7, "steps": 4})
    assert answer.data is not None
    assert from_base64(answer.data[0].b64_json) == pictures.decode(file.read_bytes())
