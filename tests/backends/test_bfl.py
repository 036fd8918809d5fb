"""Black Forest Labs' service, as a server of our own answers in its stead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse

from sdfleet.backends.bfl import MOST_ACTIVE, BflBackend, Pace
from sdfleet.backends.bfl_models import MODELS
from sdfleet.domain import ImageResult, Progress
from sdfleet.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    Busy,
    CreditsNeeded,
    InvalidValue,
    JobCancelled,
    Moderated,
    SdfleetError,
)
from tests.backends.bfl_server import KEY, BflServer
from tests.backends.drawings import GREY, WHITE, drawing
from tests.backends.services import QUICK, bfl_backend
from tests.backends.stand_in import ENDLESS, serving


@pytest.fixture(scope="module")
def served() -> Iterator[BflServer]:
    with serving(BflServer()) as server:
        yield server


@pytest.fixture
def bfl(served: BflServer) -> BflServer:
    served.renew()
    return served


def tell(backend: BflBackend, story: Callable[[BflBackend], Awaitable[None]]) -> None:
    """Run one story; nothing may be left when the backend is closed."""

    async def told() -> None:
        try:
            async with asyncio.timeout(60):
                await story(backend)
        finally:
            await backend.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(told())


def drawn(bfl: BflServer, folder: Path, *, pace: Pace = QUICK, **fields: Any) -> ImageResult:
    """What comes of one drawing. Raises what its caller would meet."""
    found: list[ImageResult] = []

    async def story(backend: BflBackend) -> None:
        found.append(await backend.generate(drawing(**fields)))

    tell(bfl_backend(bfl, folder, pace=pace), story)
    return found[0]


# ----------------------------------------------------------------------------------------------- what is sent and comes


def test_a_picture_is_ordered_waited_for_and_fetched_with_its_cost(bfl: BflServer, tmp_path: Path) -> None:
    bfl.statuses += ["Pending", "Queued", "Processing"]
    result = drawn(bfl, tmp_path, prompt="a fox", seed=5, checkpoint="elsewhere/flux-api/flux-pro-1.1", steps=1)
    (image,) = result.images
    assert (image.seed, image.cost_credits, result.device) == (5, 4.0, "127.0.0.1")
    assert (image.picture.width_px, image.picture.height_px) == (32, 16)
    assert set(result.unsaid) == {"steps", "guidance", "sampler", "strength"}
    assert dict(bfl.n_asked) == {"submit": 1, "poll": 4, "sample": 1}


def test_each_picture_of_a_job_is_one_order_with_its_own_seed(bfl: BflServer, tmp_path: Path) -> None:
    result = drawn(bfl, tmp_path, seed=7, n_images=3)
    assert [image.seed for image in result.images] == [7, 8, 9]
    assert sorted(task["seed"] for task in bfl.tasks.values()) == [7, 8, 9]
    assert sum(image.cost_credits or 0 for image in result.images) == 12.0


@pytest.mark.parametrize(
    ("model", "sent", "left_out"),
    [
        ("flux-dev", {"width": 32, "height": 16, "steps": 4, "guidance": 5.0, "prompt_upsampling": False}, "mask"),
        ("flux-pro-1.1", {"width": 32, "height": 16, "prompt_upsampling": False}, "steps"),
        ("flux-pro-1.1-ultra", {"aspect_ratio": "16:9", "image_prompt_strength": 0.25}, "width"),
        ("flux-kontext-pro", {"aspect_ratio": "16:9", "prompt_upsampling": False}, "guidance"),
        ("flux-2-pro", {"width": 32, "height": 16}, "steps"),
        ("flux-2-flex", {"steps": 4, "guidance": 5.0, "prompt_upsampling": False}, "aspect_ratio"),
        ("flux-pro-1.0-fill", {"steps": 4, "guidance": 5.0}, "width"),
    ],
)
def test_a_model_is_sent_what_it_takes_and_nothing_else(
    bfl: BflServer, tmp_path: Path, model: str, sent: dict[str, object], left_out: str
) -> None:
    mask = WHITE if MODELS[model].takes_mask else None
    drawn(bfl, tmp_path, checkpoint=f"elsewhere/flux-api/{model}", image=GREY, mask=mask, strength=0.75)
    (task,) = bfl.tasks.values()
    assert sent.items() <= task.items()
    assert left_out not in task
    assert "negative_prompt" not in task
    assert (task["model"], task["output_format"]) == (model, "png")
    assert task[MODELS[model].picture]
    assert ("mask" in task) == MODELS[model].takes_mask


def test_the_size_that_came_is_told_where_it_is_another(bfl: BflServer, tmp_path: Path) -> None:
    bfl.size = (96, 64)
    result = drawn(bfl, tmp_path)
    assert (result.drawing.width_px, result.drawing.height_px) == (96, 64)
    assert result.warnings == ("127.0.0.1 drew 96x64 where 32x16 was asked for",)


def test_progress_is_told_as_the_service_tells_it(bfl: BflServer, tmp_path: Path) -> None:
    bfl.statuses += ["Pending"] * 3
    seen: list[Progress] = []

    async def story(backend: BflBackend) -> None:
        await backend.generate(drawing(steps=10), seen.append)

    tell(bfl_backend(bfl, tmp_path), story)
    assert [each.step for each in seen] == [1, 10]


def test_the_key_is_sent_to_the_service_and_not_to_where_the_pictures_are(bfl: BflServer, tmp_path: Path) -> None:
    drawn(bfl, tmp_path)
    assert set(bfl.keys_seen) == {("submit", KEY), ("poll", KEY), ("sample", None)}


# ------------------------------------------------------------------------------------------------------ what it refuses

REFUSED: list[tuple[int, type[SdfleetError], str, int]] = [
    (400, BadRequest, "refused the request", 1),
    (402, CreditsNeeded, "no credits left", 1),
    (403, BackendUnavailable, "refused this server's key", 1),
    (404, BackendFailed, "answered 404", 1),
    (500, BackendFailed, "answered 500: scripted 500", 5),
    (503, BackendFailed, "answered 503", 5),
]


@pytest.mark.parametrize(("status", "kind", "text", "n_asked"), REFUSED)
def test_every_refusal_has_its_error_and_only_faults_are_asked_again(
    bfl: BflServer, tmp_path: Path, status: int, kind: type[SdfleetError], text: str, n_asked: int
) -> None:
    bfl.submits += [status] * 9
    with pytest.raises(kind, match=text):
        drawn(bfl, tmp_path)
    assert bfl.n_asked["submit"] == n_asked
    assert not list(tmp_path.iterdir()), "a refused order is remembered"


def test_a_refused_field_is_named(bfl: BflServer, tmp_path: Path) -> None:
    detail = [{"loc": ["body", "width"], "msg": "Input should be less than or equal to 1440", "type": "less_than"}]
    bfl.submits.append(JSONResponse({"detail": detail}, status_code=422))
    with pytest.raises(InvalidValue, match=r"width: 127\.0\.0\.1 refused it: Input should be less") as caught:
        drawn(bfl, tmp_path)
    assert caught.value.field == "width"


@pytest.mark.parametrize("detail", ["not a list", [], [{}], [1], {"a": 1}, None])
def test_a_422_of_any_shape_is_an_error_of_the_request(bfl: BflServer, tmp_path: Path, detail: object) -> None:
    bfl.submits.append(JSONResponse({"detail": detail}, status_code=422))
    with pytest.raises(InvalidValue, match="refused it"):
        drawn(bfl, tmp_path)


@pytest.mark.parametrize("fault", [429, 500, 503])
def test_a_passing_fault_is_waited_out(bfl: BflServer, tmp_path: Path, fault: int) -> None:
    bfl.submits += [fault, fault]
    assert drawn(bfl, tmp_path).images
    assert bfl.n_asked["submit"] == 3


def test_too_many_requests_are_met_with_the_patience_that_the_service_asks_for(bfl: BflServer, tmp_path: Path) -> None:
    wait = JSONResponse({"detail": "busy"}, status_code=429, headers={"Retry-After": "0.2"})
    bfl.submits += [wait] * 3  # more than a fault's tries would take with pauses of their own
    begun_s = asyncio.run(_now_s())
    assert drawn(bfl, tmp_path).images
    assert asyncio.run(_now_s()) - begun_s >= 0.6


async def _now_s() -> float:
    return asyncio.get_running_loop().time()


def test_patience_with_too_many_requests_has_an_end(bfl: BflServer, tmp_path: Path) -> None:
    bfl.submits += [JSONResponse({"detail": "busy"}, status_code=429, headers={"Retry-After": "60"})] * 3
    with pytest.raises(Busy, match="as many pictures") as caught:
        drawn(bfl, tmp_path)
    assert caught.value.retry_after_s == 60.0
    assert bfl.n_asked["submit"] == 1


def test_no_more_are_under_way_than_the_service_takes(bfl: BflServer, tmp_path: Path) -> None:
    async def story(backend: BflBackend) -> None:
        jobs = [asyncio.create_task(backend.generate(drawing(prompt=ENDLESS))) for _ in range(MOST_ACTIVE + 6)]
        await asyncio.to_thread(bfl.wait_until, lambda: len(bfl.tasks) >= MOST_ACTIVE)
        enough = bfl.n_asked["poll"] + 2 * MOST_ACTIVE
        await asyncio.to_thread(bfl.wait_until, lambda: bfl.n_asked["poll"] >= enough)
        now = backend.capabilities()
        assert (len(bfl.tasks), now.n_running, now.n_waiting) == (MOST_ACTIVE, MOST_ACTIVE, 6)
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)

    tell(bfl_backend(bfl, tmp_path), story)


@pytest.mark.parametrize("status", ["Request Moderated", "Content Moderated"])
def test_what_is_moderated_is_told_as_that_and_not_asked_for_again(bfl: BflServer, tmp_path: Path, status: str) -> None:
    bfl.statuses += ["Pending", status]
    with pytest.raises(Moderated, match=status):
        drawn(bfl, tmp_path)
    assert (bfl.n_asked["submit"], bfl.n_asked["poll"]) == (1, 2)


def test_an_error_of_the_task_ends_the_job(bfl: BflServer, tmp_path: Path) -> None:
    bfl.statuses += ["Pending", "Error"]
    with pytest.raises(BackendFailed, match="met a fault"):
        drawn(bfl, tmp_path)


def test_a_task_that_is_not_known_yet_is_waited_for_and_one_that_is_known_no_more_is_an_end(
    bfl: BflServer, tmp_path: Path
) -> None:
    bfl.statuses += ["Task not found"]
    assert drawn(bfl, tmp_path).images
    bfl.statuses += ["Task not found"]
    late = iter([0.0, *[60.0] * 50])

    async def story(backend: BflBackend) -> None:
        with pytest.raises(BackendFailed, match="does not know the order any more"):
            await backend.generate(drawing())

    tell(bfl_backend(bfl, tmp_path / "other", clock=lambda: next(late)), story)


def test_a_picture_that_is_never_ready_is_given_up_and_not_ordered_twice(bfl: BflServer, tmp_path: Path) -> None:
    asked = drawing()
    bfl.statuses += ["Something New"] * 10_000

    async def give_up(backend: BflBackend) -> None:
        with pytest.raises(BackendFailed, match=r"was not ready .*\(it says 'Something New'\)"):
            await backend.generate(asked)

    async def look_again(backend: BflBackend) -> None:
        bfl.statuses.clear()
        assert (await backend.generate(asked)).images

    tell(bfl_backend(bfl, tmp_path, pace=Pace(poll_s=0.005, patience_s=0.1)), give_up)
    tell(bfl_backend(bfl, tmp_path), look_again)
    assert bfl.n_asked["submit"] == 1


# ----------------------------------------------------------------------------------- connections and money that is lost


def test_questions_that_are_lost_are_asked_again(bfl: BflServer, tmp_path: Path) -> None:
    bfl.polls += ["lost", 500, 429, "lost"]
    bfl.samples += ["lost", 503]
    assert drawn(bfl, tmp_path).images
    assert bfl.n_asked["submit"] == 1


def test_an_order_whose_answer_is_lost_is_not_repeated_without_a_word(bfl: BflServer, tmp_path: Path) -> None:
    bfl.submits.append("lost")
    asked = drawing()

    async def story(backend: BflBackend) -> None:
        with pytest.raises(BackendFailed, match="whether it was charged is not known") as caught:
            await backend.generate(asked)
        assert "retry the job" in caught.value.hint
        assert bfl.n_asked["submit"] == 1
        assert (await backend.generate(asked)).images  # somebody has tried it again

    tell(bfl_backend(bfl, tmp_path), story)


def test_a_service_that_is_not_reached_is_told_and_asked_again_by_the_next_job(bfl: BflServer, tmp_path: Path) -> None:
    async def story(backend: BflBackend) -> None:
        there, backend._endpoint = backend._endpoint, "http://127.0.0.1:1"
        with pytest.raises(BackendUnavailable, match="is not reached"):
            await backend.generate(drawing())
        assert backend.capabilities().state == "unavailable"
        assert "not reached" in backend.capabilities().reason
        backend._endpoint = there
        assert (await backend.generate(drawing())).images
        assert backend.capabilities().state == "ready"

    tell(bfl_backend(bfl, tmp_path), story)


def test_a_server_that_was_killed_goes_on_with_what_it_had_ordered(bfl: BflServer, tmp_path: Path) -> None:
    bfl.statuses += ["Pending"] * 100_000
    asked = drawing()

    async def killed(backend: BflBackend) -> None:
        job = asyncio.create_task(backend.generate(asked))
        await asyncio.to_thread(bfl.wait_until, lambda: bfl.n_asked["poll"] >= 2)
        job.cancel()
        await asyncio.wait({job})

    async def started_again(backend: BflBackend) -> None:
        bfl.statuses.clear()
        first = await backend.generate(asked)
        again = await backend.generate(asked)  # killed once more, before the job was written down as done
        assert first.images[0].picture.data == again.images[0].picture.data
        assert first.images[0].cost_credits == again.images[0].cost_credits == 4.0

    tell(bfl_backend(bfl, tmp_path), killed)
    tell(bfl_backend(bfl, tmp_path), started_again)
    assert (bfl.n_asked["submit"], bfl.n_asked["sample"]) == (1, 1)


def test_a_server_that_was_killed_while_it_ordered_asks_for_a_word_first(bfl: BflServer, tmp_path: Path) -> None:
    asked = drawing()

    async def killed(backend: BflBackend) -> None:
        with pytest.raises(ZeroDivisionError):
            await backend.generate(asked)

    async def started_again(backend: BflBackend) -> None:
        with pytest.raises(BackendFailed, match="the server ended while it ordered"):
            await backend.generate(asked)
        assert bfl.n_asked["submit"] == 0
        assert (await backend.generate(asked)).images

    backend = bfl_backend(bfl, tmp_path)

    async def die(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    backend._orderer.ask = die  # type: ignore[method-assign,assignment]
    tell(backend, killed)
    tell(bfl_backend(bfl, tmp_path), started_again)


def test_another_request_under_the_same_job_is_an_order_of_its_own(bfl: BflServer, tmp_path: Path) -> None:
    asked = drawing(seed=1)
    drawn(bfl, tmp_path, job_id=asked.job_id, seed=1)
    drawn(bfl, tmp_path, job_id=asked.job_id, seed=2)
    assert bfl.n_asked["submit"] == 2


def test_what_is_noted_of_an_order_neither_shows_it_nor_the_key_and_is_for_its_owner_alone(
    bfl: BflServer, tmp_path: Path
) -> None:
    drawn(bfl, tmp_path, prompt="a secret fox")
    notes = [path for path in tmp_path.iterdir() if path.suffix == ".json"]
    assert len(notes) == 1
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    text = notes[0].read_text(encoding="utf-8")
    assert "secret" not in text
    assert KEY not in text


def test_a_cancelled_job_says_that_it_may_be_charged(bfl: BflServer, tmp_path: Path) -> None:
    asked = drawing(prompt=ENDLESS)

    async def story(backend: BflBackend) -> None:
        job = asyncio.create_task(backend.generate(asked))
        await asyncio.to_thread(bfl.wait_until, lambda: bool(bfl.tasks))
        await backend.cancel(asked.job_id)
        with pytest.raises(JobCancelled, match="may still be charged"):
            await job

    tell(bfl_backend(bfl, tmp_path), story)


# ---------------------------------------------------------------------------------------- addresses that are handed out


def test_an_address_whose_time_has_run_out_is_asked_for_anew_once(bfl: BflServer, tmp_path: Path) -> None:
    bfl.signatures += ["expired"]
    assert drawn(bfl, tmp_path).images
    bfl.signatures += ["bad", "bad"]
    with pytest.raises(BackendFailed, match="has run out"):
        drawn(bfl, tmp_path)
    assert bfl.n_asked["submit"] == 2


@pytest.mark.parametrize(("sample", "text"), [("words", "no picture"), ("redirect", "leads elsewhere")])
def test_what_is_no_picture_is_not_taken(bfl: BflServer, tmp_path: Path, sample: str, text: str) -> None:
    bfl.samples.append(sample)
    with pytest.raises(BackendFailed, match=text):
        drawn(bfl, tmp_path)


def test_a_picture_without_an_end_is_not_taken(bfl: BflServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfleet.storage.pictures.MAX_FILE_BYTES", 50)
    with pytest.raises(BackendFailed, match="longer than 50 bytes"):
        drawn(bfl, tmp_path)


@pytest.mark.parametrize("sample", ["", "ftp://bfl.ai/x", "http://user:word@127.0.0.1/x", "not a url"])
def test_an_address_that_is_none_is_not_fetched(bfl: BflServer, tmp_path: Path, sample: str) -> None:
    bfl.sample_url = sample or "  "
    with pytest.raises(BackendFailed, match="named no address"):
        drawn(bfl, tmp_path)


def test_the_key_does_not_follow_an_address_to_another_host(bfl: BflServer, tmp_path: Path) -> None:
    with serving(BflServer()) as other:
        bfl.polling_url = f"{other.url}/v1/get_result?id=task-1"
        with pytest.raises(BackendFailed, match="which is not its own"):
            drawn(bfl, tmp_path)
        assert not other.keys_seen


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("https://api.bfl.ai/v1/get_result?id=1", True),
        ("https://api.eu2.bfl.ai/v1/get_result?id=1", True),
        ("http://api.bfl.ai/v1/get_result?id=1", False),
        ("https://bfl.ai.example.org/v1", False),
        ("https://evilbfl.ai/v1", False),
        ("https://key@api.bfl.ai/v1", False),
        ("https://127.0.0.1/v1", False),
        ("file:///etc/passwd", False),
    ],
)
def test_only_the_services_own_hosts_are_asked_with_the_key(
    bfl: BflServer, tmp_path: Path, url: str, *, may: bool
) -> None:
    backend = bfl_backend(bfl, tmp_path, endpoint="https://api.bfl.ai")
    if may:
        backend._check_may_be_asked(url)
    else:
        with pytest.raises(BackendFailed):
            backend._check_may_be_asked(url)


@pytest.mark.parametrize(
    "url", ["http://delivery.bfl.ai/x", "https://127.0.0.1/x", "https://10.0.0.1/x", "https://[::1]/"]
)
def test_the_real_service_leads_neither_into_private_networks_nor_to_plain_http(
    bfl: BflServer, tmp_path: Path, url: str
) -> None:
    async def story(backend: BflBackend) -> None:
        with pytest.raises(BackendFailed):
            await backend._fetch(url)

    tell(bfl_backend(bfl, tmp_path, endpoint="https://api.bfl.ai", pace=QUICK), story)


def test_the_key_and_the_prompt_are_in_no_log_line_and_no_error(
    bfl: BflServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bfl.polls += ["lost"]
    with caplog.at_level(logging.DEBUG):
        drawn(bfl, tmp_path, prompt="a secret fox")
        errors = []
        faults: tuple[int | str, ...] = (403, 402, 500, "lost")
        for fault in faults:
            bfl.submits += [fault] * 5
            with pytest.raises(SdfleetError) as caught:
                drawn(bfl, tmp_path, prompt="a secret fox")
            bfl.submits.clear()
            errors.append(str(caught.value))
    ours = [
        f"{record.getMessage()} {record.__dict__}" for record in caplog.records if record.name.startswith("sdfleet")
    ]
    assert ours
    assert not [text for text in (*ours, *errors) if KEY in text or "secret" in text]
