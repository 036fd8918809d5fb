"""What the page asks beside jobs: lengths of prompts, samplers, cards, favourites, and how a picture was made."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from sdfleet.engine.sampler_names import known_samplers
from tests.api.serving import Running

# A busy machine is slow now and then; that is no failure.
ask = functools.partial(httpx2.request, timeout=60)


def _draw(here: Running, prompt: str, **more: Any) -> dict[str, Any]:
    answer = ask("POST", f"{here.url}/api/txt2img", json={"prompt": prompt, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def _outputs(here: Running, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask("GET", f"{here.url}/api/outputs?{query}").json()["outputs"]
    return found


@pytest.mark.parametrize(
    "prompt", ["a red circle", "a (red:1.3) circle, [blue]", "", "one BREAK two", "word, " * 90, "<lora:x:1> a cat"]
)
def test_tokens_are_counted_as_the_engine_counts_them(starter_server: Running, prompt: str) -> None:
    from sdfleet.engine.networks.tokenizer import ClipTokenizer
    from sdfleet.engine.prompt import parse_prompt
    from sdfleet.engine.prompt_tags import read_tags
    from sdfleet.engine.text_encoders import clip_chunks

    answer = ask("POST", f"{starter_server.url}/api/tokens", json={"prompt": prompt, "negative_prompt": "a red circle"})
    folder = starter_server.house.catalog.resolve("starter").folder
    tokenizer = ClipTokenizer.read(folder / "tokenizer")
    chunks = clip_chunks(tokenizer, parse_prompt(read_tags(prompt)[0]), window=75)
    n_tokens = sum(len(chunk.ids) for chunk in chunks)
    assert answer.json()["prompt"] == [{"encoder": "clip", "tokens": n_tokens, "window": 75, "chunks": len(chunks)}]
    assert answer.json()["negative_prompt"][0]["tokens"] == 3


def test_a_prompt_that_makes_no_sense_is_told_by_its_field(fake_server: Running) -> None:
    answer = ask("POST", f"{fake_server.url}/api/tokens", json={"negative_prompt": "(a:99)"})
    assert (answer.status_code, answer.json()["field"]) == (400, "negative_prompt")


def test_samplers_have_their_names_and_labels(fake_server: Running) -> None:
    found = ask("GET", f"{fake_server.url}/api/samplers").json()["samplers"]
    assert [one["name"] for one in found] == list(known_samplers())
    assert {"name": "dpm++_2m karras", "label": "DPM++ 2M Karras"} in found


def test_cards_say_what_is_here_and_what_could_be(fake_server: Running) -> None:
    found = ask("GET", f"{fake_server.url}/api/models/cards").json()
    assert found["default"] == "starter"
    assert [card["name"] for card in found["here"]] == ["starter"]
    schnell = next(card for card in found["absent"] if card["name"] == "flux-schnell")
    assert (schnell["ignores"], schnell["gated"], schnell["multiple"]) == (["negative_prompt", "guidance"], True, 16)


def test_pictures_are_found_by_their_prompt_whatever_its_case(server: Callable[..., Running]) -> None:
    here = server()
    for prompt in ("Eine ÄHRE im Wind", "a red fox", "a grey mouse"):
        _draw(here, prompt)
    assert [one["prompt"] for one in _outputs(here, "search=ähre")] == ["Eine ÄHRE im Wind"]
    assert [one["prompt"] for one in _outputs(here, "search=A%20")] == ["a grey mouse", "a red fox"]
    assert _outputs(here, "search=%25") == []
    assert {one["model"] for one in _outputs(here)} == {"starter"}


def test_a_favourite_is_one_until_it_is_not(server: Callable[..., Running]) -> None:
    here = server()
    for prompt in ("first", "second"):
        _draw(here, prompt)
    first = _outputs(here)[1]
    assert ask("PUT", f"{here.url}/api/outputs/{first['id']}/favourite").status_code == 204
    assert [one["id"] for one in _outputs(here, "favourites=true")] == [first["id"]]
    assert [one["favourite"] for one in _outputs(here)] == [False, True]
    assert ask("DELETE", f"{here.url}/api/outputs/{first['id']}/favourite").status_code == 204
    assert _outputs(here, "favourites=true") == []
    assert ask("PUT", f"{here.url}/api/outputs/nobody-0/favourite").status_code == 404


def test_a_favourite_is_not_removed_for_its_age(server: Callable[..., Running]) -> None:
    here = server()
    for prompt in ("kept", "old"):
        _draw(here, prompt)
    kept = _outputs(here)[1]
    ask("PUT", f"{here.url}/api/outputs/{kept['id']}/favourite")
    expired = here.call(here.house.store.expired(outputs_before_s=1e12))
    assert [output.prompt for output in expired.outputs] == ["old"]


def test_how_a_picture_was_made_is_read_from_it_also_after_its_job_is_forgotten(server: Callable[..., Running]) -> None:
    here = server()
    asked = {"negative_prompt": "blur", "steps": 7, "guidance": 2.5, "seed": 2**64 - 1, "sampler": "heun"}
    drawn = _draw(here, "made with care", **asked)
    here.call(here.house.store.forget_jobs([drawn["job_id"]]))
    (output,) = _outputs(here)
    assert output["prompt"] == "made with care"
    found = ask("GET", f"{here.url}/api/outputs/{output['id']}/metadata").json()
    assert {name: found[name] for name in asked} == asked | {"seed": str(2**64 - 1)}
    again = ask("POST", f"{here.url}/api/metadata", json={"image": drawn["images"][0]["b64_json"]}).json()
    assert again == found


def test_a_picture_that_says_nothing_and_a_file_that_is_none_are_told_apart(fake_server: Running) -> None:
    from sdfleet.domain import Picture
    from sdfleet.storage.pictures import encode

    plain = encode(Picture(width_px=1, height_px=1, mode="RGB", data=b"\0\0\0"), "png")
    for data, expected in ((plain, (200, "none")), (b"no picture", (400, None))):
        body = {"image": base64.b64encode(data).decode()}
        answer = ask("POST", f"{fake_server.url}/api/metadata", json=body)
        assert (answer.status_code, answer.json().get("source")) == expected
