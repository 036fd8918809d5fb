"""A flagged picture is withheld, named, and told in the shape of each dialect; never given out black or in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from sdfleet.domain import Scope
from tests.api.serving import Running


@pytest.fixture
def client(fake_server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=fake_server.url, timeout=60) as client:
        yield client


def _events(client: httpx2.Client, **body: Any) -> list[dict[str, Any]]:
    asked = {"prompt": "x", "stream": True, "seed": 7, **body}
    text = client.post("/v1/images/generations", json=asked).text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def _body(path: str, **asked: Any) -> dict[str, Any]:
    """A body that the route takes; Ollama streams unless it is told not to."""
    more = {"stream": False} if path == "/api/generate" else {}
    return {"prompt": "x", "model": "starter", **more, **asked}


def _polled(client: httpx2.Client) -> dict[str, Any]:
    """A picture asked for as BFL's clients do, once it has ended."""
    submitted = client.post("/v1/flux-dev", json={"prompt": "x", "seed": 7}).json()
    list(client.get(f"/api/jobs/{submitted['id']}/events").iter_lines())
    found: dict[str, Any] = client.get("/v1/get_result", params={"id": submitted["id"]}).json()
    return found


def test_a_mixed_job_gives_the_others_and_names_the_one_withheld(client: httpx2.Client, fake_server: Running) -> None:
    with fake_server.flagging(1):
        answer = client.post("/api/txt2img", json={"prompt": "x", "n": 4, "seed": 7}).json()

    assert [(image["seed"], image["safety"]) for image in answer["images"]] == [
        (7, "passed"),
        (9, "passed"),
        (10, "passed"),
    ]
    assert answer["withheld"] == [{"index": 1, "seed": 8, "reason": "flagged"}]
    (warning,) = [text for text in answer["warnings"] if "withheld" in text]
    assert warning.startswith("the picture with seed 8 was withheld: the safety checker of starter flagged it")
    assert "docs/safety.md" in warning


def test_a_job_remembers_what_was_withheld_and_the_files_keep_their_numbers(
    client: httpx2.Client, fake_server: Running
) -> None:
    with fake_server.flagging(0):
        job_id = client.post("/api/txt2img", json={"prompt": "x", "n": 2, "seed": 7}).json()["job_id"]
    job = client.get(f"/api/jobs/{job_id}").json()

    assert (job["state"], job["n"]) == ("done", 2)
    assert job["withheld"] == [{"index": 0, "seed": 7, "reason": "flagged"}]
    assert [(output["id"], output["seed"], output["safety"]) for output in job["outputs"]] == [
        (f"{job_id}-1", 8, "passed")
    ]
    assert client.get(f"/api/outputs/{job_id}-0").status_code == 404
    assert client.get(f"/api/outputs/{job_id}-1").headers["x-safety"] == "passed"


def test_openai_is_answered_moderation_blocked_when_nothing_is_left(fake_server: Running) -> None:
    with (
        openai.OpenAI(base_url=f"{fake_server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        fake_server.flagging(0),
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.images.generate(prompt="x")

    assert (caught.value.code, caught.value.type, caught.value.param) == (
        "moderation_blocked",
        "image_generation_user_error",
        None,
    )
    assert "withheld" in caught.value.message


def test_openai_is_given_the_rest_and_told(client: httpx2.Client, fake_server: Running) -> None:
    with fake_server.flagging(0):
        answer = client.post("/v1/images/generations", json={"prompt": "x", "n": 3, "seed": 7}).json()

    assert [(image["seed"], image["safety"]) for image in answer["data"]] == [(8, "passed"), (9, "passed")]
    assert answer["withheld"] == [{"index": 0, "seed": 7, "reason": "flagged"}]


def test_an_openai_answer_with_nothing_withheld_does_not_speak_of_it(client: httpx2.Client) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "x"}).json()

    assert "withheld" not in answer
    assert answer["data"][0]["safety"] == "none"


def test_a_stream_completes_the_others_and_warns(client: httpx2.Client, fake_server: Running) -> None:
    with fake_server.flagging(1):
        events = _events(client, n=3)

    assert [(event["image_index"], event["seed"], event["safety"]) for event in events] == [
        (0, 7, "passed"),
        (2, 9, "passed"),
    ]
    assert all(any("seed 8 was withheld" in text for text in event["warnings"]) for event in events)


def test_a_stream_of_which_nothing_is_left_ends_in_the_error(client: httpx2.Client, fake_server: Running) -> None:
    with fake_server.flagging(0):
        (event,) = _events(client)

    assert event["error"]["code"] == "moderation_blocked"


def test_a1111_is_given_the_rest_with_the_verdicts_in_info(client: httpx2.Client, fake_server: Running) -> None:
    with fake_server.flagging(0):
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": "x", "batch_size": 3, "seed": 7}).json()
    info = json.loads(answer["info"])

    assert len(answer["images"]) == len(info["infotexts"]) == len(info["all_prompts"]) == 2
    assert (info["all_seeds"], info["safety"]) == ([8, 9], ["passed", "passed"])
    assert info["withheld"] == [{"index": 0, "seed": 7, "reason": "flagged"}]


def test_bfl_ends_in_error_since_its_clients_wait_for_ever_on_moderated(
    client: httpx2.Client, fake_server: Running
) -> None:
    with fake_server.flagging(0):
        result = _polled(client)

    assert result["status"] == "Error"
    assert result["details"]["code"] == "content_withheld"


@pytest.mark.parametrize(
    ("path", "status", "where"),
    [
        ("/sdapi/v1/txt2img", 400, "detail"),
        ("/api/txt2img", 400, "error"),
        ("/generate", 400, "detail"),
        ("/api/generate", 400, "error"),
        ("/api/generate-image", 400, "error"),
    ],
)
def test_every_dialect_says_in_its_own_shape_that_nothing_is_left(
    client: httpx2.Client, fake_server: Running, path: str, status: int, where: str
) -> None:
    with fake_server.flagging(0):
        answer = client.post(path, json=_body(path))

    assert answer.status_code == status
    assert "was withheld: the safety checker of starter flagged it" in json.dumps(answer.json()[where])


@pytest.mark.parametrize(
    ("path", "asked", "verdict_of"),
    [
        ("/api/txt2img", {"safety_checker": "flag"}, lambda answer: answer.json()["images"][0]["safety"]),
        ("/generate", {"safety_checker": "flag"}, lambda answer: answer.json()["safety"]),
        ("/v1/images/generations", {"safety_checker": "flag"}, lambda answer: answer.json()["data"][0]["safety"]),
        (
            "/sdapi/v1/txt2img",
            {"safety_checker": "flag"},
            lambda answer: json.loads(answer.json()["info"])["safety"][0],
        ),
        ("/api/generate", {"options": {"safety_checker": "flag"}}, lambda answer: answer.json()["safety"]),
    ],
)
def test_flag_gives_the_picture_out_with_its_verdict(
    client: httpx2.Client,
    fake_server: Running,
    path: str,
    asked: dict[str, Any],
    verdict_of: Callable[[httpx2.Response], str],
) -> None:
    with fake_server.flagging(0):
        answer = client.post(path, json=_body(path, **asked))

    assert answer.status_code == 200, answer.text
    assert verdict_of(answer) == "flagged"


@pytest.mark.parametrize("said", [False, "off"])
def test_false_and_off_switch_the_check_off(client: httpx2.Client, fake_server: Running, said: object) -> None:
    with fake_server.flagging(0):
        answer = client.post("/api/txt2img", json={"prompt": "x", "safety_checker": said}).json()

    assert [image["safety"] for image in answer["images"]] == ["off"]


@pytest.mark.parametrize("path", ["/api/txt2img", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_switch_that_is_none_is_refused(client: httpx2.Client, path: str) -> None:
    answer = client.post(path, json={"prompt": "x", "safety_checker": "sometimes"})

    assert answer.status_code in {400, 422}
    assert "safety_checker" in answer.text


def _ask(here: Running, scopes: tuple[Scope, ...], **asked: Any) -> httpx2.Response:
    _, secret = here.call(
        here.house.keys.create(f"key-{len(scopes)}-{asked.get('safety_checker', 'silent')}", scopes=scopes)
    )
    headers = {"X-API-Key": secret}
    return httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "x", **asked}, headers=headers, timeout=60)


def test_less_than_the_servers_check_needs_the_scope(server: Callable[..., Running]) -> None:
    here = server(api_key="admin")

    assert _ask(here, ("generate",)).status_code == 200
    refused = _ask(here, ("generate", "manage", "read"), safety_checker="flag")
    assert refused.status_code == 403
    assert "--scope unfiltered" in refused.json()["hint"]
    assert _ask(here, ("generate", "unfiltered"), safety_checker="off").status_code == 200


def test_more_than_the_servers_check_needs_none(server: Callable[..., Running]) -> None:
    here = server(api_key="admin", safety_checker="off")
    with here.flagging(0):
        assert _ask(here, ("generate",), safety_checker="off").status_code == 200
        assert _ask(here, ("generate",), safety_checker="on").status_code == 400


def test_the_setting_holds_where_a_request_says_nothing(server: Callable[..., Running]) -> None:
    here = server(safety_checker="flag")
    with here.flagging(0):
        answer = httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "x"}, timeout=60).json()

    assert [image["safety"] for image in answer["images"]] == ["flagged"]


def test_verdicts_are_counted(server: Callable[..., Running]) -> None:
    here = server()
    with here.flagging(1):
        httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "x", "n": 3}, timeout=60)
    with here.flagging(0, 1):
        httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "x", "n": 2}, timeout=60)
    told = httpx2.get(f"{here.url}/metrics", timeout=60).text

    assert 'sdfleet_safety_verdicts_total{model="starter",verdict="passed"} 2.0' in told
    assert 'sdfleet_safety_verdicts_total{model="starter",verdict="withheld"} 3.0' in told
