"""A job that comes back from its rows is equal to the one that went in."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any, get_args

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdfleet.domain import (
    BACKENDS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    Caller,
    Idempotency,
    ImageRequest,
    Job,
    JobId,
    JobState,
    LoraUse,
    Output,
    OutputId,
    OwnerId,
    Picture,
    Submission,
    Webhook,
)
from sdfleet.storage import job_rows
from tests.storage.conftest import Play, Stage, submit

# What a JSON body may hold: NUL and halves of pairs too.
any_text = st.text(st.characters(), max_size=40)
prompts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=200)
seconds = st.floats(min_value=0, max_value=4e9)
sides = st.integers(2, 512).map(lambda n: n * 8)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Picture | None, Picture | None]:
    """An image and its mask, either absent."""
    width_px, height_px = draw(st.integers(1, 9)), draw(st.integers(1, 9))

    def picture(mode: Any) -> Picture:
        n_bytes = width_px * height_px * (3 if mode == "RGB" else 1)
        data = draw(st.binary(min_size=n_bytes, max_size=n_bytes))
        return Picture(width_px=width_px, height_px=height_px, mode=mode, data=data)

    n_given = draw(st.integers(0, 2))
    return picture("RGB") if n_given > 0 else None, picture("L") if n_given > 1 else None


lora_uses = st.builds(
    LoraUse,
    name=st.text("aé<: ", min_size=1, max_size=9).filter(str.strip),
    scale=st.floats(-10, 10),
    text_scale=st.none() | st.floats(-10, 10),
    content=st.none() | any_text,
)


@st.composite
def requests(draw: st.DrawFn) -> ImageRequest:
    """Any request; a field that is added later is drawn by its type."""
    image, mask = draw(pictures())
    width_px, height_px = draw(st.one_of(st.just((None, None)), st.tuples(sides, sides)))
    given = {
        "prompt": prompts.filter(lambda text: text.strip() != ""),
        "negative_prompt": prompts,
        "model": any_text,
        "width_px": st.just(width_px),
        "height_px": st.just(height_px),
        "steps": st.none() | st.integers(1, 1000),
        "guidance": st.none() | st.integers(0, 100) | st.floats(0, 100),
        "seed": st.none() | st.integers(0, MAX_SEED),
        "n_images": st.integers(1, 64),
        "sampler": st.none() | any_text,
        "image": st.just(image),
        "mask": st.just(mask),
        "strength": st.none() | st.floats(0, 1, exclude_min=True),
        "loras": st.lists(lora_uses, max_size=3).map(tuple),
        "backend": st.none() | st.sampled_from(BACKENDS),
    }
    return draw(st.builds(ImageRequest, **{field.name: given.get(field.name, ...) for field in fields(ImageRequest)}))


webhooks = st.builds(Webhook, url=any_text, secret=st.none() | any_text)
submissions = st.builds(
    Submission,
    request=requests(),
    caller=st.builds(
        Caller,
        owner=st.just(OwnerId("key_1")),
        name=any_text,
        scopes=st.frozensets(st.sampled_from(["generate", "manage", "read"])),
        max_queued=st.none() | st.integers(1, 9),
    ),
    dialect=any_text,
    client=any_text,
    priority=st.integers(-100, 100),
    deadline_s=st.none() | seconds | st.just(float("inf")),
    format=st.sampled_from(["png", "jpeg", "webp"]),
    quality=st.none() | st.integers(1, 100),
    idempotency=st.none() | st.builds(Idempotency, key=any_text, fingerprint=any_text),
    webhook=st.none() | webhooks,
    label=any_text,
    tags=st.lists(any_text, max_size=3).map(tuple),
    wants_previews=st.booleans(),
)
outputs = st.builds(
    Output,
    id=st.just(OutputId("a1-0")),
    job_id=st.just(JobId("a1")),
    seed=st.integers(0, MAX_SEED),
    format=st.sampled_from(["png", "jpeg", "webp"]),
)
jobs = st.builds(
    Job,
    id=st.just(JobId("a1")),
    submission=submissions,
    state=st.sampled_from(list(get_args(JobState))),
    created_s=seconds,
    started_s=st.none() | seconds,
    finished_s=st.none() | seconds,
    attempts=st.integers(0, 9),
    outputs=st.lists(outputs, max_size=2).map(tuple),
    warnings=st.lists(any_text, max_size=3).map(tuple),
    error=st.none() | st.dictionaries(any_text, any_text, max_size=3),
    timings_s=st.dictionaries(any_text, seconds, max_size=3),
    device=any_text,
    dtype=any_text,
    rungs=st.lists(any_text, max_size=2).map(tuple),
)


def _back(row: Any, job: Job) -> Job:
    made: list[Any] = [job_rows.output_row(output, owner=job.submission.caller.owner) for output in job.outputs]
    packed: Any = job_rows.pack(job.request)
    return job_rows.job_of(row, outputs=[job_rows.output_of(one) for one in made], pictures=job_rows.unpack(packed))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(jobs)
def test_every_job_comes_back_equal(job: Job) -> None:
    row = job_rows.row_of(job)
    assert _back(row, job) == job
    # Text that every database takes.
    assert [text for text in row.values() if isinstance(text, str) and "\0" in text.encode().decode()] == []


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(submissions.map(lambda one: replace(one, idempotency=None)), min_size=1, max_size=20))
def test_what_was_accepted_comes_back_equal_from_the_database(play: Play[Any], accepted: list[Submission]) -> None:
    async def story(stage: Stage) -> None:
        await stage.jobs.forget_jobs([job.id for job in (await stage.jobs.page(limit=1000))[0]])
        for number, submission in enumerate(accepted):
            job = await stage.accept(submission, job_id=f"a{number}")
            assert await stage.jobs.job(job.id) == job
            await stage.jobs.cancel(job.id, {})
        await stage.jobs.forget_jobs([JobId(f"a{number}") for number in range(len(accepted))])

    play(story)


def test_the_longest_prompt_and_the_largest_seed_come_back(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        asked = submit(prompt="\N{FOX FACE}" * MAX_PROMPT_CHARS, negative_prompt="ß" * MAX_PROMPT_CHARS, seed=MAX_SEED)
        job = await stage.accept(asked)
        assert await stage.jobs.job(job.id) == job

    play(story)


def test_a_field_that_an_older_version_did_not_know_has_its_default() -> None:
    job = Job(id=JobId("a1"), submission=submit(step_cache="strong"), state="queued", created_s=1.0)
    row = job_rows.row_of(job)
    told = json.loads(row["submission"])
    del told["submission"]["request"]["step_cache"]
    del told["submission"]["tags"]
    old = _back({**row, "submission": json.dumps(told)}, job)
    assert old == replace(job, submission=submit())


def test_a_field_of_a_newer_version_is_left_out_and_said_so() -> None:
    job = Job(id=JobId("a1"), submission=submit(), state="queued", created_s=1.0, warnings=("w",))
    row = job_rows.row_of(job)
    told = json.loads(row["submission"])
    told["submission"]["request"]["holodeck"] = True
    told["submission"]["colour"] = 1
    back = _back({**row, "submission": json.dumps(told)}, job)
    assert back == replace(job, warnings=back.warnings)
    assert [("holodeck, colour" in told, told) for told in back.warnings] == [(True, back.warnings[0]), (False, "w")]


def test_every_default_is_written_so_that_a_later_one_changes_no_old_job() -> None:
    row = job_rows.row_of(Job(id=JobId("a1"), submission=submit(), state="queued", created_s=1.0))
    request = json.loads(row["submission"])["submission"]["request"]
    assert set(request) == {one.name for one in fields(ImageRequest)}
