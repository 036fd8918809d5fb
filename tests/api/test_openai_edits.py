"""`/v1/images/edits` and `/v1/images/variations`: forms as OpenAI's client sends them, and JSON as others do."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from sdfleet.domain import Job
from sdfleet.storage import pictures
from tests.api.pixels import from_base64, picture_file
from tests.api.serving import Running

LEFT_HALF = (0, 0, 32, 64)


@pytest.fixture
def client(fake_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fake_server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def _job(here: Running, answer: Any) -> Job:
    """The whole job of an answer, with its input pictures."""
    job = here.call(here.house.store.job(answer["job_id"] if isinstance(answer, dict) else answer.job_id))
    assert job is not None
    return job


def _data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_an_edit_keeps_the_size_of_its_picture(client: openai.OpenAI, fake_server: Running) -> None:
    answer = client.images.edit(image=picture_file(64), prompt="a red fox")
    assert answer.size == "64x64"
    job = _job(fake_server, answer)
    assert job.request.task == "img2img"
    assert job.request.image == pictures.decode(picture_file(64))
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens == 16


def test_the_clear_part_of_a_mask_is_drawn_anew(client: openai.OpenAI, fake_server: Running) -> None:
    mask = picture_file(64, clear=LEFT_HALF)
    answer = client.images.edit(image=("a.png", picture_file(64), "image/png"), mask=mask, prompt="a red fox")
    found = _job(fake_server, answer).request.mask
    assert found is not None
    assert (found.data[0], found.data[31], found.data[32], found.data[63]) == (255, 255, 0, 0)


def test_a_mask_without_transparency_is_taken_as_black_and_white(client: openai.OpenAI, fake_server: Running) -> None:
    answer = client.images.edit(image=picture_file(64), mask=picture_file(64, colour="white"), prompt="a red fox")
    found = _job(fake_server, answer).request.mask
    assert found is not None
    assert set(found.data) == {255}
    assert any("no transparency" in warning for warning in answer.warnings)  # type: ignore[attr-defined]


def test_a_list_of_one_picture_is_one_picture(client: openai.OpenAI, fake_server: Running) -> None:
    answer = client.images.edit(image=[io.BytesIO(picture_file(64, colour="blue"))], prompt="a red fox")
    assert _job(fake_server, answer).request.image == pictures.decode(picture_file(64, colour="blue"))


def test_two_pictures_are_refused_rather_than_one_of_them_ignored(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as met:
        client.images.edit(image=[picture_file(64), picture_file(64)], prompt="a red fox")
    assert (met.value.param, met.value.code) == ("image", "unsupported_parameter")


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]"])
def test_a_file_may_go_by_any_name_that_clients_use(fake_server: Running, name: str) -> None:
    response = httpx2.post(
        f"{fake_server.url}/v1/images/edits",
        data={"prompt": "a red fox", "n": "2", "stream": "false", "size": "auto", "seed": "7", "user": ""},
        files={name: ("a.png", picture_file(64), "application/octet-stream")},
        timeout=30,
    )
    assert response.status_code == 200, response.text
    assert [item["seed"] for item in response.json()["data"]] == [7, 8]


@pytest.mark.parametrize(
    "images",
    [
        {"image": "URL"},
        {"image": ["URL"]},
        {"images": [{"image_url": "URL"}]},
        {"images": [{"image_url": {"url": "URL"}}]},
    ],
)
def test_json_may_hold_the_picture_in_every_known_shape(fake_server: Running, images: dict[str, Any]) -> None:
    url = _data_url(picture_file(64))
    body = {"prompt": "a red fox", "mask": _data_url(picture_file(64, clear=LEFT_HALF)), **_with_url(images, url)}
    response = httpx2.post(f"{fake_server.url}/v1/images/edits", json=body, timeout=30)
    assert response.status_code == 200, response.text
    assert _job(fake_server, response.json()).request.task == "inpaint"


def _with_url(value: Any, url: str) -> Any:
    match value:
        case "URL":
            return url
        case list():
            return [_with_url(item, url) for item in value]
        case _:
            return {name: _with_url(item, url) for name, item in value.items()}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a"}, "image"),
        ({"prompt": "a", "image": "?"}, "image"),
        ({"prompt": "a", "image": base64.b64encode(b"no picture").decode()}, None),
        ({"prompt": "a", "image": 5}, "image"),
        ({"prompt": "a", "image": {"file_id": "f"}}, "image"),
        ({"prompt": "a", "image": "http://127.0.0.1/a.png"}, "image"),
        ({"image": _data_url(picture_file(64))}, "prompt"),
        ({"prompt": "a", "image": _data_url(picture_file(64)), "mask": _data_url(picture_file(32))}, "mask"),
        ({"prompt": "a", "image": _data_url(picture_file(64)), "markup": "x"}, "markup"),
    ],
)
def test_a_bad_edit_is_refused_by_field(fake_server: Running, body: dict[str, Any], param: str | None) -> None:
    response = httpx2.post(f"{fake_server.url}/v1/images/edits", json=body, timeout=30)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_form_that_is_none_is_a_bad_request(fake_server: Running) -> None:
    response = httpx2.post(
        f"{fake_server.url}/v1/images/edits",
        content=b"--x\r\nbroken",
        headers={"Content-Type": "multipart/form-data; boundary=y"},
    )
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_strength_and_fidelity_say_how_far_it_is_redrawn(client: openai.OpenAI, fake_server: Running) -> None:
    def strength(**extra: Any) -> float | None:
        answer = client.images.edit(image=picture_file(64), prompt="a red fox", **extra)
        return _job(fake_server, answer).request.strength

    assert strength() == 0.75
    assert strength(input_fidelity="low") == 0.75
    assert strength(input_fidelity="high") == 0.5
    assert strength(extra_body={"strength": 0.3}) == 0.3
    assert strength(input_fidelity="high", extra_body={"strength": 0.3}) == 0.3


def test_a_variation_takes_the_prompt_noted_in_the_picture(client: openai.OpenAI, fake_server: Running) -> None:
    drawn = client.images.generate(prompt="a green owl", extra_body={"seed": 7})
    assert drawn.data is not None
    file = base64.b64decode(drawn.data[0].b64_json or "")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        answer = client.images.create_variation(image=file, n=2)
    job = _job(fake_server, answer)
    assert (job.request.prompt, job.request.task, len(job.outputs)) == ("a green owl", "img2img", 2)
    assert answer.data is not None
    assert len({from_base64(image.b64_json).data for image in answer.data}) == 2


def test_a_variation_of_any_picture_is_drawn_after_a_neutral_prompt(client: openai.OpenAI) -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        answer = client.images.create_variation(image=picture_file(64), size="256x256")
    assert answer.size == "256x256"
    assert any("without a prompt" in warning for warning in answer.warnings)  # type: ignore[attr-defined]
