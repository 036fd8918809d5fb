"""`sdfleet bench`: how fast pictures come on this machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.bench import Report
    from sdfleet.settings import Settings


def bench(
    *,
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    sizes: Annotated[str | None, typer.Option(help="For example 128x128,256x256; the model's own by default.")] = None,
    steps: Annotated[str | None, typer.Option(help="For example 10,20; the model's own by default.")] = None,
    batch: Annotated[str, typer.Option(help="Pictures per request, for example 1,4,16.")] = "1,4",
    runs: Annotated[int, typer.Option(min=1, max=100, help="Runs of each case; the fastest counts.")] = 2,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, typer.Option(help="Number format of the weights.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, typer.Option(help="Where to draw.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")] = False,
) -> None:
    """Time pictures: every size with every step count and every batch."""
    with console.answering(as_json=as_json):
        settings = console.start(device=device, dtype=dtype)
        report = console.run(
            _measure(
                settings,
                model=model or settings.model,
                sizes=_sizes(sizes),
                steps=_counts(steps, field="steps"),
                batches=_counts(batch, field="batch"),
                n_runs=runs,
            )
        )
        if as_json:
            console.say_json(report.to_json())
        else:
            _print_table(report)


async def _measure(
    settings: Settings,
    *,
    model: str,
    sizes: tuple[tuple[int, int], ...],
    steps: tuple[int, ...],
    batches: tuple[int, ...],
    n_runs: int,
) -> Report:
    from sdfleet import compose
    from sdfleet.bench import Timing, measure

    def tell(timing: Timing) -> None:
        case = timing.case
        console.note(
            f"{case.width_px}x{case.height_px}, {case.steps} steps, {case.n_images} at once: {timing.best_s:.2f} s"
        )

    async with compose.standalone(settings) as runtime:
        return await measure(
            runtime, model=model, sizes=sizes, steps=steps, batches=batches, n_runs=n_runs, on_timing=tell
        )


def _sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    from sdfleet.cli.generate import parse_size

    return () if text is None else tuple(parse_size(part) for part in text.split(","))


def _counts(text: str | None, *, field: str) -> tuple[int, ...]:
    from sdfleet.errors import InvalidValue

    if text is None:
        return ()
    if not re.fullmatch(r"\s*[0-9]{1,6}\s*(,\s*[0-9]{1,6}\s*)*", text):
        raise InvalidValue(field, f"{text[:40]!r} is not a list of numbers", hint="for example 1,4")
    return tuple(int(part) for part in text.split(","))


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from sdfleet.settings import read_terminal

    table = Table(title=f"{report.model} on {report.device} ({report.dtype})")
    for heading in ("size", "steps", "at once", "seconds", "seconds per picture", "steps per second"):
        table.add_column(heading, justify="right")
    for timing in report.timings:
        case = timing.case
        table.add_row(
            f"{case.width_px}x{case.height_px}",
            str(case.steps),
            str(case.n_images),
            f"{timing.best_s:.3f}",
            f"{timing.picture_s:.3f}",
            f"{case.steps * case.n_images / timing.best_s:.1f}",
        )
    screen = Console(no_color=not read_terminal().has_colour)
    screen.print(table)
    screen.print(f"the first picture, with loading, took {report.first_s:.2f} s")
