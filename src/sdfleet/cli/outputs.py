"""`sdfleet outputs`: the finished pictures that the server keeps."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.compose import Stores
    from sdfleet.domain import Output
    from sdfleet.storage.output_files import Usage

app = typer.Typer(no_args_is_help=True, help="List, prune and measure the pictures of finished jobs.")

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]

DAY_S = 86400
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}


@app.command("list")
def list_outputs(
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List finished pictures and their files."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        settings = console.start()

        async def work() -> list[dict[str, Any]]:
            async with compose.stores(settings) as stores:
                found, _ = await stores.jobs.outputs(limit=limit)
                return [_facts(output, stores) for output in found]

        found = console.run(work())
        if as_json:
            console.say_json({"outputs": found})
            return
        for facts in found:
            size = f"{facts['width']}x{facts['height']}"
            made = f"{datetime.fromtimestamp(facts['created'], UTC):%Y-%m-%d %H:%M}Z"
            console.say(f"{facts['id']:<16} {made} {size:>9} {_mib(facts['n_bytes'])} {facts['file']}")


@app.command("prune")
def prune(
    *,
    older_than: Annotated[str, typer.Option(help="Age, for example 12h, 7d or 4w.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete finished pictures older than an age. Other files are never touched."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        age_s = _parse_age_s(older_than)
        settings = console.start()

        async def work() -> tuple[int, int]:
            async with compose.stores(settings) as stores:
                return await _prune(stores, age_s=age_s, dry_run=dry_run)

        n_files, n_bytes = console.run(work())
        if as_json:
            console.say_json({"n_files": n_files, "n_bytes": n_bytes, "dry_run": dry_run})
            return
        console.say(f"{'would delete' if dry_run else 'deleted'} {n_files} pictures, {_mib(n_bytes)}")


@app.command("du")
def du(*, as_json: AsJson = False) -> None:
    """Say how much the finished pictures take."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        settings = console.start()

        async def work() -> tuple[Usage, str]:
            async with compose.stores(settings) as stores:
                return stores.files.usage(), str(stores.files.folder)

        usage, folder = console.run(work())
        if as_json:
            console.say_json({"folder": folder, "n_files": usage.n_files, "n_bytes": usage.n_bytes})
            return
        console.say(f"{usage.n_files} pictures, {_mib(usage.n_bytes)} in {folder}")


async def _prune(stores: Stores, *, age_s: float, dry_run: bool) -> tuple[int, int]:
    """How many pictures went, and their bytes."""
    if dry_run:
        found = await stores.jobs.expired(outputs_before_s=time.time() - age_s, limit=10**6)
        return len(found.outputs), sum(output.n_bytes for output in found.outputs)
    from sdfleet.jobs.retention import Keep, Retention

    keep = Keep(outputs_days=age_s / DAY_S, jobs_days=None)
    pruned = await Retention(store=stores.jobs, files=stores.files, keep=keep).prune()
    return pruned.n_outputs, pruned.n_bytes


def _parse_age_s(text: str) -> float:
    """`7d` in seconds."""
    from sdfleet.errors import InvalidValue

    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smhdw])", text.strip().lower(), re.ASCII)
    if match is None:
        raise InvalidValue("older-than", f"{text!r} is not an age", hint="use a number and s, m, h, d or w: 7d")
    return float(match[1]) * _UNITS_S[match[2]]


def _facts(output: Output, stores: Stores) -> dict[str, Any]:
    return {
        "id": output.id,
        "job_id": output.job_id,
        "seed": output.seed,
        "width": output.width_px,
        "height": output.height_px,
        "n_bytes": output.n_bytes,
        "created": output.created_s,
        "file": str(stores.files.path(output)),
    }


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
