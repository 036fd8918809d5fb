"""LoRAs and embeddings through every dialect, drawn by the built-in model: the same files give the same pixels."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from sdfleet.starter import weights_path
from sdfleet.storage import pictures
from tests import loras
from tests.api.serving import Running

PROMPT = "a red fox"
TAGGED = "a red fox <lora:ink:0.8>"
SHARED = {"steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def server(starter_server: Running) -> Iterator[Running]:
    """The built-in model's server with a LoRA `ink` and an embedding `zmood`."""
    adapters = starter_server.house.catalog.adapters
    generator = torch.Generator().manual_seed(1)
    changes: loras.Changes = {}
    for name, shape in _attention_of_starter().items():
        changes["unet", name] = loras.drawn(shape, generator, gain=0.4)
    ink = loras.save(
        adapters.folder("lora") / "ink.safetensors", loras.as_kohya(changes), metadata={"ss_output_name": "Ink Wash"}
    )
    mood = loras.save(adapters.folder("embedding") / "zmood.safetensors", {"emb_params": torch.randn(2, 192) * 2})
    loras.save(adapters.folder("embedding") / "other.safetensors", {"emb_params": torch.zeros(1, 768)})
    yield starter_server
    for path in (ink, mood, mood.with_name("other.safetensors")):
        path.unlink()


def _attention_of_starter() -> dict[str, tuple[int, ...]]:
    from sdfleet.catalog.headers import read_header

    file = Path(weights_path()) / "unet" / "diffusion_pytorch_model.safetensors"
    shapes = read_header(file).shapes.items()
    return {name.removesuffix(".weight"): shape for name, shape in shapes if ".attn" in name and len(shape) == 2}


def _post(here: Running, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{here.url}{path}", json=body, timeout=120)


def _a1111(here: Running, prompt: str) -> dict[str, Any]:
    answer = _post(here, "/sdapi/v1/txt2img", prompt=prompt, sampler_name="Euler", **SHARED)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def _pixels(picture: str) -> bytes:
    return pictures.decode(base64.b64decode(picture)).data


def test_every_dialect_draws_the_same_picture_with_a_lora(server: Running) -> None:
    told = _a1111(server, TAGGED)
    first = _pixels(told["images"][0])
    asked = {"prompt": PROMPT, "sampler": "euler", **SHARED}

    openai = _post(server, "/v1/images/generations", **asked, loras=[{"name": "ink", "scale": 0.8}])
    native = _post(server, "/api/txt2img", **asked, loras=["ink:0.8"])
    tagged = _post(server, "/v1/images/generations", **asked | {"prompt": TAGGED})

    assert openai.status_code == native.status_code == 200, openai.text + native.text
    assert _pixels(openai.json()["data"][0]["b64_json"]) == first
    assert _pixels(tagged.json()["data"][0]["b64_json"]) == first
    assert first != _pixels(_a1111(server, PROMPT)["images"][0])
    assert _pixels(_a1111(server, f"{PROMPT} <lora:ink:0>")["images"][0]) == _pixels(
        _a1111(server, PROMPT)["images"][0]
    )


def test_the_tag_is_out_of_the_prompt_and_in_the_notes_with_the_files_hash(server: Running) -> None:
    told = _a1111(server, TAGGED)
    content = server.house.catalog.adapters.content(server.house.catalog.adapters.folder("lora") / "ink.safetensors")
    metadata = pictures.read_metadata(base64.b64decode(told["images"][0]))
    assert metadata is not None
    assert metadata.prompt.strip() == PROMPT
    assert [(lora.name, lora.scale, lora.hash) for lora in metadata.loras] == [("ink", 0.8, content)]
    infotext = pictures.read_infotext(base64.b64decode(told["images"][0]))
    assert "<lora:ink:0.8>" in infotext.splitlines()[0]
    assert f'Lora hashes: "ink: {content}"' in infotext


def test_a_job_keeps_its_loras_and_what_was_in_the_file(server: Running) -> None:
    accepted = _post(
        server, "/api/jobs", prompt=TAGGED, loras=[{"name": "INK", "scale": -0.5, "text_scale": 0}], steps=2, seed=1
    )
    assert accepted.status_code == 202, accepted.text
    assert accepted.json()["loras"] == [
        {"name": "ink", "scale": -0.5, "text_scale": 0.0},
        {"name": "ink", "scale": 0.8, "text_scale": None},
    ]
    job = server.call(server.house.store.job(accepted.json()["id"]))
    assert job is not None
    assert {use.content for use in job.request.loras} == {
        server.house.catalog.adapters.content(server.house.catalog.adapters.folder("lora") / "ink.safetensors")
    }


@pytest.mark.parametrize(
    ("path", "status"), [("/sdapi/v1/txt2img", 404), ("/v1/images/generations", 400), ("/api/txt2img", 404)]
)
def test_an_unknown_lora_is_refused_with_what_to_do(path: str, status: int, server: Running) -> None:
    answer = _post(server, path, prompt="x <lora:inc:1>", steps=1)
    assert answer.status_code == status
    assert "there is no LoRA named 'inc'; did you mean 'ink'?" in answer.text
    assert "sdfleet models import FILE" in answer.text


@pytest.mark.parametrize("tag", ["<lora:ink:much>", "<lora:ink:1:2:3>"])
def test_a_tag_that_makes_no_sense_is_refused(tag: str, server: Running) -> None:
    answer = _post(server, "/api/txt2img", prompt=f"x {tag}", steps=1)
    assert answer.status_code == 400
    assert "write name:0.8" in answer.text


def test_a_scale_past_all_sense_is_refused(server: Running) -> None:
    assert _post(server, "/api/jobs", prompt="x", loras=[{"name": "ink", "scale": 11}]).status_code == 400
    assert _post(server, "/api/jobs", prompt="x <lora:ink:11>").status_code == 400


def test_the_webuis_lists_have_both(server: Running) -> None:
    found = httpx2.get(f"{server.url}/sdapi/v1/loras", timeout=30).json()
    assert [(lora["name"], lora["alias"], lora["path"]) for lora in found] == [
        ("ink", "Ink Wash", "loras/ink.safetensors")
    ]
    told = httpx2.get(f"{server.url}/sdapi/v1/embeddings", timeout=30).json()
    assert told["loaded"]["zmood"] == {
        "step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 192, "vectors": 2
    }  # fmt: skip
    assert list(told["skipped"]) == ["other"]


def test_an_embedding_is_read_where_it_is_named_and_told_where_it_does_not_fit(server: Running) -> None:
    with_mood = _a1111(server, "a red fox, zmood")
    assert _pixels(with_mood["images"][0]) != _pixels(_a1111(server, "a red fox, zmoot")["images"][0])
    metadata = pictures.read_metadata(base64.b64decode(with_mood["images"][0]))
    assert metadata is not None
    assert metadata.embeddings == ("zmood",)

    answer = _post(server, "/api/jobs", prompt="an other fox", steps=1)
    assert answer.status_code == 202
    assert any("the embedding 'other' is for Stable Diffusion and not for this" in w for w in answer.json()["warnings"])
