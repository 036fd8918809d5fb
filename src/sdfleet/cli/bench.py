"""`sdfleet bench`: how fast pictures come on this machine."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.bench.measure import Limit, Report
    from sdfleet.settings import Settings


def bench(
    model: Annotated[str | None, typer.Argument(help="Name of the model; the default model if left out.")] = None,
    *,
    architecture: Annotated[
        str | None,
        typer.Option(help="A published model by name, on random weights: nothing is downloaded. Try `list`."),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option("--size", "--sizes", help="For example 128x128,256x256; the model's own by default.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="For example 10,20; the model's own by default.")] = None,
    batch: Annotated[
        str, typer.Option("--rows", "--batch", help="Pictures that step together, for example 1,2,4,8.")
    ] = "1,4",
    runs: Annotated[int, typer.Option(min=1, max=100, help="Runs of each case; the fastest counts.")] = 2,
    one_step: Annotated[
        bool, typer.Option("--one-step", help="Draw one step of each case, and estimate the picture from it.")
    ] = False,
    no_text_encoders: Annotated[
        bool,
        typer.Option("--no-text-encoders", help="With --architecture: encoders of a few layers, to save memory."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the curve over the rows to this .svg or .png.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, typer.Option(help="Number format of the weights.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, typer.Option(help="Where to draw.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")] = False,
) -> None:
    """Time pictures: every size with every step count and every number of rows.

    Says seconds per step and per picture, and what share that is of the fastest matrix product this machine does.
    """
    with console.answering(as_json=as_json):
        from sdfleet.bench.plot import check_plot_name, save_plot
        from sdfleet.bench.random_model import standing_in
        from sdfleet.catalog import architectures
        from sdfleet.errors import InvalidValue

        if architecture == "list":
            console.say("\n".join(f"{name:16} {architectures.load(name).title}" for name in architectures.names()))
            return
        if architecture is not None and model is not None:
            raise InvalidValue("architecture", "a model was named too", hint="name a model or an architecture")
        if no_text_encoders and architecture is None:
            raise InvalidValue("no-text-encoders", "a checkpoint has its own", hint="use it with --architecture")
        if plot is not None:
            check_plot_name(plot)
        cases = _Cases(
            sizes=_sizes(sizes),
            steps=_counts(steps, field="steps"),
            rows=_counts(batch, field="rows"),
            runs=runs,
            one_step=one_step,
        )
        settings = console.start(device=device, dtype=dtype)
        stage = (
            nullcontext(settings)
            if architecture is None
            else standing_in(architecture, settings, with_text_encoders=not no_text_encoders)
        )
        with stage as staged:
            limit = _limit(staged)
            report = console.run(_measure(staged, cases, model=architecture or model or staged.model, limit=limit))
        if architecture is not None:
            report = replace(report, weights="random", text_encoders="light" if no_text_encoders else "whole")
        if plot is not None:
            save_plot(report, plot)
        if as_json:
            console.say_json(report.to_json())
        else:
            _print_table(report)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cases:
    """What to time, as the command line said it."""

    sizes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    rows: tuple[int, ...]
    runs: int
    one_step: bool


def _limit(settings: Settings) -> Limit | None:
    """Measured here, on the main thread and before the engine starts: nothing else is running then."""
    if settings.backend != "local":
        return None
    from sdfleet.bench.measure import Limit
    from sdfleet.engine.limits import measure_limit

    return Limit(per_s=measure_limit(settings.device, settings.dtype, n_threads=settings.threads))


async def _measure(settings: Settings, cases: _Cases, *, model: str, limit: Limit | None) -> Report:
    from sdfleet import compose
    from sdfleet.bench.measure import Timing, measure

    def tell(timing: Timing) -> None:
        case = timing.case
        console.note(
            f"{case.width_px}x{case.height_px}, {case.steps} steps, {case.n_images} at once: {timing.best_s:.2f} s"
        )

    async with compose.standalone(settings) as runtime:
        return await measure(
            runtime,
            model=model,
            sizes=cases.sizes,
            steps=cases.steps,
            batches=cases.rows,
            n_runs=cases.runs,
            is_one_step=cases.one_step,
            limit=limit,
            on_timing=tell,
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

    weights = ", random weights" if report.weights == "random" else ""
    light = ", light text encoders" if report.text_encoders == "light" else ""
    table = Table(
        title=f"{report.model} on {report.device} ({report.dtype}{weights}{light})", box=None, padding=(0, 1, 0, 1)
    )
    headings = ["size", "steps", "rows", "encode", "step", "decode", "picture", "images/s"]
    for heading in [*headings, "of limit"] if report.limit else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for timing in report.timings:
        case = timing.case
        cells = [
            f"{case.width_px}x{case.height_px}",
            str(case.steps),
            str(case.n_images),
            f"{timing.phases_s.get('encode', 0.0):.3f}",
            f"{timing.step_s:.4f}",
            f"{timing.phases_s.get('decode', 0.0):.3f}",
            f"{timing.picture_s:.3f}",
            f"{timing.images_per_s:.3f}",
        ]
        if report.limit:
            cells.append("-" if timing.step_share is None else f"{timing.step_share:.0%}")
        table.add_row(*cells)
    screen = Console(no_color=not read_terminal().has_colour)
    screen.print(table)
    screen.print("seconds: encode, step and decode of all rows together, picture for one of them", soft_wrap=True)
    if report.limit:
        limit = f"{report.limit.per_s / 1e12:.3g} TFLOP/s"
        screen.print(f"of limit: what the steps reach of the fastest matrix product here, {limit}", soft_wrap=True)
    for timing in report.timings:
        if timing.estimated_picture_s is not None:
            what = f"{timing.case.width_px}x{timing.case.height_px}, {timing.case.n_images} rows"
            screen.print(
                f"estimated, not measured: {what}, {timing.estimated_steps} steps: "
                f"{timing.estimated_picture_s:.2f} seconds per picture",
                soft_wrap=True,
            )
    screen.print(f"the first picture, with loading, took {report.first_s:.2f} seconds")
