"""`sdfleet jobs`: what the server was asked for, and what became of it.

Works on the store, whether a server runs or not and whatever keys it wants. A running server looks at the store every
two seconds: what is cancelled here stops there, what is tried again here is drawn there.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.compose import Stores
    from sdfleet.domain import Job

app = typer.Typer(no_args_is_help=True, help="List, show, cancel and retry the jobs of the server.")

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]
JobName = Annotated[str, typer.Argument(metavar="ID", help="As `sdfleet jobs list` shows it.", show_default=False)]


@app.command("list")
def list_jobs(
    *,
    state: Annotated[
        list[str] | None,
        typer.Option(help="queued, running, done, failed or cancelled; can be repeated.", show_default="all"),
    ] = None,
    search: Annotated[str | None, typer.Option(help="Only jobs whose prompt has this text.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List jobs of every API and every caller, newest first."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        states = _states(state)
        settings = console.start()

        async def work() -> list[Job]:
            found: list[Job] = []
            before: str | None = None
            async with compose.stores(settings) as stores:
                while len(found) < limit:
                    n = min(100, limit - len(found))
                    page, before = await stores.jobs.page(states=states, before=before, limit=n, search=search)
                    found.extend(page)
                    if before is None:
                        break
            return found

        found = console.run(work())
        if as_json:
            console.say_json({"jobs": [_facts(job) for job in found]})
            return
        for job in found:
            made = f"{datetime.fromtimestamp(job.created_s, UTC):%Y-%m-%d %H:%M}Z"
            console.say(f"{job.id:<14} {job.state:<9} {made} {job.request.model:<16} {_short(job.request.prompt)}")


@app.command("show")
def show_job(*, job_id: JobName, as_json: AsJson = False) -> None:
    """Tell everything about a job, with the files of its pictures."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        settings = console.start()

        async def work() -> dict[str, Any]:
            async with compose.stores(settings) as stores:
                job = await _find(stores, job_id)
                return {**_facts(job), "files": [str(stores.files.path(output)) for output in job.outputs]}

        facts = console.run(work())
        if as_json:
            console.say_json(facts)
            return
        for name, value in facts.items():
            if value not in (None, "", [], {}):
                console.say(f"{name}: {_text(value)}")


@app.command("cancel")
def cancel_job(*, job_id: JobName, as_json: AsJson = False) -> None:
    """Cancel a job that waits or is drawn; a running server stops it within seconds."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.errors import Conflict, JobCancelled

        settings = console.start()

        async def work() -> Job:
            async with compose.stores(settings) as stores:
                job = await _find(stores, job_id)
                error = JobCancelled(f"job {job.id} was cancelled at the command line")
                if not await stores.jobs.cancel(job.id, error.to_wire()):
                    now = await _find(stores, job_id)
                    raise Conflict(f"job {job.id} is {now.state} already")
                return await _find(stores, job_id)

        _answer(console.run(work()), as_json=as_json)


@app.command("retry")
def retry_job(*, job_id: JobName, as_json: AsJson = False) -> None:
    """Draw a failed or cancelled job again, with the same seed and settings: now, or at the server's next start."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.errors import Conflict

        settings = console.start()

        async def work() -> Job:
            async with compose.stores(settings) as stores:
                job = await _find(stores, job_id)
                again = await stores.jobs.requeue(job.id)
                if again is None:
                    now = await _find(stores, job_id)
                    raise Conflict(
                        f"job {job.id} is {now.state}", hint="only a failed or cancelled job can be tried again"
                    )
                return again

        _answer(console.run(work()), as_json=as_json)


async def _find(stores: Stores, job_id: str) -> Job:
    from sdfleet.domain import JobId
    from sdfleet.errors import NotFound

    job = await stores.jobs.job(JobId(job_id))
    if job is None:
        raise NotFound(f"there is no job {job_id[:80]!r}", hint="`sdfleet jobs list` shows which there are")
    return job


def _states(given: list[str] | None) -> frozenset[Any] | None:
    from sdfleet.domain import JobState
    from sdfleet.errors import InvalidValue

    known = get_args(JobState)
    for state in given or ():
        if state not in known:
            raise InvalidValue("state", f"{state[:40]!r} is not one of {', '.join(known)}")
    return frozenset(given) if given else None


def _answer(job: Job, *, as_json: bool) -> None:
    if as_json:
        console.say_json(_facts(job))
    else:
        console.say(f"{job.id} is {job.state}")


def _facts(job: Job) -> dict[str, Any]:
    request, submission = job.request, job.submission
    return {
        "id": job.id,
        "state": job.state,
        "created": job.created_s,
        "started": job.started_s,
        "finished": job.finished_s,
        "attempts": job.attempts,
        "owner": submission.caller.owner,
        "dialect": submission.dialect,
        "priority": submission.priority,
        "model": request.model,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width_px,
        "height": request.height_px,
        "steps": request.steps,
        "guidance": request.guidance,
        "sampler": request.sampler,
        "seed": request.seed,
        "n": request.n_images,
        "outputs": [output.id for output in job.outputs],
        "warnings": list(job.warnings),
        "error": None if job.error is None else dict(job.error),
        "timings_s": dict(job.timings_s),
    }


def _short(prompt: str, *, most: int = 60) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items() if each != "")
    return " ".join(str(value).split())
