from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import webuiapi
from PIL import Image, ImageDraw

from tests.api.serving import Running


def _api(here: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{here.url}/sdapi/v1", sampler="Euler a", steps=3)


def _base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _post(here: Running, path: str, **fields: object) -> httpx2.Response:
    return httpx2.post(f"{here.url}/sdapi/v1/{path}", json=fields, timeout=60)


def test_webuiapi_draws_pictures_with_following_seeds(fake_server: Running) -> None:
    result = _api(fake_server).txt2img(prompt="a cat", seed=5, width=128, height=64, batch_size=2, n_iter=2)
    assert [image.size for image in result.images] == [(128, 64)] * 4
    assert result.info["all_seeds"] == [5, 6, 7, 8]
    assert result.info["sampler_name"] == "Euler a"
    assert len(result.info["infotexts"]) == 4
    assert "Steps: 3, Sampler: Euler a" in result.info["infotexts"][0]


def test_webuiapi_redraws_a_picture_and_a_masked_part_of_one(fake_server: Running) -> None:
    api = _api(fake_server)
    image = Image.new("RGB", (128, 128), "red")
    redrawn = api.img2img(images=[image], prompt="a cat", seed=1, width=128, height=128, denoising_strength=0.5)
    assert redrawn.image.size == (128, 128)
    mask = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(mask).rectangle((32, 32, 63, 63), fill=255)
    for is_whole in (True, False):
        patched = api.img2img(
            images=[image], mask_image=mask, mask_blur=0, inpaint_full_res=not is_whole, prompt="a cat", seed=1,
            width=128, height=128,
        ).image.convert("RGB")  # fmt: skip
        outside = [patched.getpixel((x, y)) for x in range(0, 128, 9) for y in (0, 20, 80, 127)]
        assert set(outside) == {(255, 0, 0)}, "what the mask keeps is exactly as it was"
        inside = [patched.getpixel((x, y)) for x in range(33, 62, 3) for y in range(33, 62, 3)]
        assert set(inside) != {(255, 0, 0)}


def test_webuiapi_finds_every_list_it_asks_for(fake_server: Running) -> None:
    api = _api(fake_server)
    assert "Euler a" in [sampler["name"] for sampler in api.get_samplers()]
    assert "karras" in [schedule["name"] for schedule in api.get_schedulers()]
    assert api.get_sd_models()[0]["model_name"] == "starter"
    for ask in (api.get_sd_vae, api.get_upscalers, api.get_latent_upscale_modes, api.get_loras, api.get_hypernetworks,
                api.get_face_restorers, api.get_realesrgan_models, api.get_prompt_styles, api.get_memory,
                api.get_cmd_flags, api.get_embeddings, api.get_scripts, api.refresh_checkpoints):  # fmt: skip
        ask()


def test_webuiapi_sets_its_model_and_gives_the_whole_dict_back(fake_server: Running) -> None:
    api = _api(fake_server)
    api.util_set_model("starter")
    assert api.util_get_current_model().startswith("starter.safetensors [")
    options = api.get_options()
    api.set_options(options)
    assert api.get_options() == options
    api.util_wait_for_ready()


def test_an_unknown_checkpoint_is_told_and_changes_nothing(fake_server: Running) -> None:
    answer = _post(fake_server, "options", sd_model_checkpoint="nowhere.safetensors")
    assert answer.status_code == 404
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    assert _post(fake_server, "txt2img", prompt="x", steps=1).status_code == 200


def test_progress_is_the_callers_own_and_idle_is_zero(server: Callable[..., Running]) -> None:
    here = server()
    idle = httpx2.get(f"{here.url}/sdapi/v1/progress").json()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
    answers: list[Any] = []
    with here.holding() as gate:
        drawing = threading.Thread(target=lambda: answers.append(_post(here, "txt2img", prompt="x", steps=4)))
        drawing.start()
        gate.wait_for_job()
        httpx2.get(f"{here.url}/sdapi/v1/progress")
        gate.let(2)
        while (told := httpx2.get(f"{here.url}/sdapi/v1/progress").json())["state"]["sampling_step"] < 2:
            pass
        assert told["progress"] == 0.5
        assert told["state"]["sampling_steps"] == 4
        while (told := httpx2.get(f"{here.url}/sdapi/v1/progress").json())["current_image"] is None:
            gate.let(1)
        assert Image.open(io.BytesIO(base64.b64decode(told["current_image"]))).size
        gate.let()
        drawing.join()
    assert answers[0].status_code == 200


def test_an_interrupted_picture_is_answered_200_and_touches_no_other_dialect(server: Callable[..., Running]) -> None:
    here = server()
    answers: list[httpx2.Response] = []
    with here.holding() as gate:
        other = httpx2.post(f"{here.url}/api/jobs", json={"prompt": "y", "steps": 1}).json()["id"]
        drawing = threading.Thread(target=lambda: answers.append(_post(here, "txt2img", prompt="x", steps=4)))
        drawing.start()
        while httpx2.get(f"{here.url}/sdapi/v1/progress").json()["state"]["job_count"] == 0:
            pass
        gate.wait_for_job()
        assert httpx2.post(f"{here.url}/sdapi/v1/interrupt").status_code == 200
        drawing.join()
        assert answers[0].status_code == 200
        assert json.loads(answers[0].json()["info"])["interrupted"]
    httpx2.get(f"{here.url}/api/jobs/{other}/events")
    assert httpx2.get(f"{here.url}/api/jobs/{other}").json()["state"] == "done"


def test_the_notes_of_a_picture_are_read_back(fake_server: Running) -> None:
    made = _post(fake_server, "txt2img", prompt="a cat, red", negative_prompt="dog", steps=2, seed=9).json()
    told = _post(fake_server, "png-info", image=made["images"][0]).json()
    assert told["info"].startswith("a cat, red\nNegative prompt: dog\nSteps: 2")
    assert told["parameters"]["seed"] == 9
    assert told["info"] == json.loads(made["info"])["infotexts"][0]


def test_a_finished_picture_is_enlarged_alone_and_in_a_row(fake_server: Running) -> None:
    image = Image.new("RGB", (20, 10), "red")
    api = _api(fake_server)
    single = api.extra_single_image(image=image, upscaler_1="Lanczos", upscaling_resize=3)
    assert single.image.size == (60, 30)
    several = api.extra_batch_images(images=[image, image], upscaler_1="Nearest", upscaling_resize=2)
    assert [each.size for each in several.images] == [(40, 20)] * 2
    assert _post(fake_server, "extra-single-image", image=_base64(image), upscaler_1="ESRGAN").status_code == 422


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"sampler_name": "Nope"}, 404),
        ({"sampler_name": "Euler", "scheduler": "nope"}, 404),
        ({"script_name": "X/Y/Z plot"}, 422),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, 422),
        ({"steps": 0}, 422),
        ({"steps": "many"}, 422),
        ({"width": 65, "height": 65}, 422),
        ({"batch_size": 65}, 422),
        ({"enable_hr": True}, 422),
        ({"subseed_strength": 0.5}, 422),
        ({"override_settings": {"sd_model_checkpoint": "nowhere"}}, 404),
        ({"prompt": ""}, 422),
    ],
)
def test_what_cannot_be_drawn_is_a_clear_answer(fake_server: Running, fields: dict[str, Any], status: int) -> None:
    answer = _post(fake_server, "txt2img", **{"prompt": "x", **fields})
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]


def test_img2img_without_a_picture_is_the_answer_clients_know(fake_server: Running) -> None:
    answer = _post(fake_server, "img2img", prompt="x")
    assert answer.status_code == 404
    assert answer.json()["detail"].startswith("Init image not found")


def test_every_choice_that_means_nothing_is_taken_as_none(fake_server: Running) -> None:
    for schedule in ("automatic", "Automatic", "", None):
        answer = _post(fake_server, "txt2img", prompt="x", steps=1, sampler_name="Euler a", scheduler=schedule)
        assert answer.status_code == 200, answer.text
    karras = _post(fake_server, "txt2img", prompt="x", steps=1, sampler_name="DPM++ 2M", scheduler="Karras").json()
    assert json.loads(karras["info"])["sampler_name"] == "DPM++ 2M Karras"


def test_a_key_comes_as_the_password_of_basic(server: Callable[..., Running]) -> None:
    here = server(api_key="geheim")
    refused = httpx2.get(f"{here.url}/sdapi/v1/options")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Basic"
    assert refused.json() == {"detail": "Incorrect username or password"}
    api = webuiapi.WebUIApi(baseurl=f"{here.url}/sdapi/v1", username="me", password="geheim")
    assert api.get_options()


def test_one_callers_choice_of_a_model_is_not_anothers(server: Callable[..., Running]) -> None:
    here = server(api_key="master")
    _, mine = here.call(here.house.keys.create("mine"))
    headers = {"X-API-Key": mine}
    httpx2.post(f"{here.url}/sdapi/v1/options", json={"samples_format": "jpg"}, headers=headers)
    theirs = httpx2.get(f"{here.url}/sdapi/v1/options", headers={"X-API-Key": "master"}).json()
    assert theirs["samples_format"] == "png"
