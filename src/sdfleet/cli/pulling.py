"""`sdfleet models plan|pull|rm|verify|du`: weights come and go, each with a yes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from sdfleet.catalog.cards import Card
    from sdfleet.catalog.consent import Consent
    from sdfleet.catalog.download import DownloadPlan, PullProgress
    from sdfleet.engine.needs import Need
    from sdfleet.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]
Model = Annotated[str, typer.Argument(metavar="NAME", help="Name, alias or hub id of a model.", show_default=False)]
From = Annotated[
    Literal["hf", "modelscope"] | None,
    typer.Option("--from", help="Hugging Face or ModelScope.", show_default="as SD_HUB says"),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def plan(
    *,
    name: Model,
    source: From = None,
    memory: Annotated[
        bool, typer.Option(help="Also say what memory it needs here, which loads torch and takes some seconds.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Say what a pull would bring: files, bytes, licence, memory needed. Downloads no weights."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.catalog.download import facts_of, plan_download

        settings = console.start()
        catalog = compose.catalog(settings)
        card = catalog.card(name)
        found = plan_download(card, compose.hub(settings, source), catalog.weights)
        needs = _needs(card, settings) if memory else None
        if as_json:
            console.say_json(facts_of(found) | ({} if needs is None else {"memory": _need_facts(needs)}))
            return
        _show(found)
        for line in () if needs is None else _need_lines(card, needs):
            console.say(line)


def pull(*, name: Model, source: From = None, yes: Yes = False, as_json: AsJson = False) -> None:
    """Download a model from Hugging Face or ModelScope, after a yes. Cut off, it goes on where it stopped."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.catalog.download import fetch, plan_download

        settings = console.start()
        catalog = compose.catalog(settings)
        card = catalog.card(name)
        hub = compose.hub(settings, source)
        found = plan_download(card, hub, catalog.weights)
        if found.is_here:
            _said(found, as_json=as_json, text=f"{card.name} is already here, as it is on the hub now")
            return
        if not as_json:
            _show(found)
        if found.refusal is not None:
            raise found.refusal
        consent = _consent(found, settings, yes=yes)
        with PullBar(found) as bar:
            folder = fetch(found, consent, hub, catalog.weights, on_progress=bar)
        _said(found, as_json=as_json, text=f"pulled {card.name}: {size(found.n_bytes)} in {folder}")


def remove(*, name: Model, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a downloaded model, or forget an imported one, whose folder stays as it is."""
    with console.answering(as_json=as_json):
        from sdfleet import compose

        settings = console.start()
        catalog = compose.catalog(settings)
        card = catalog.card(name)
        console.run(_check_is_idle(settings, card.name))
        if card.folder is None:
            space = next((space for space in catalog.weights.usage() if space.name == card.name), None)
            n_bytes = 0 if space is None else space.n_bytes + space.n_unfinished_bytes
            question = f"delete {catalog.weights.path(card.name)} ({size(n_bytes)})?"
        else:
            question = f"forget {card.name}? Its folder {card.folder} stays as it is."
        if not yes:
            _ask(question, otherwise=f"sdfleet models rm {card.name} --yes")
        n_freed = catalog.forget(card.name)
        if as_json:
            console.say_json({"name": card.name, "n_freed_bytes": n_freed})
            return
        console.say(f"removed {card.name}" + (f": {size(n_freed)} freed" if n_freed else ""))


def verify(*, name: Model, as_json: AsJson = False) -> None:
    """Read every file of a downloaded model and compare it with the hash that the hub announced."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound

        catalog = compose.catalog(console.start())
        entry = catalog.resolve(name)
        if not catalog.is_pulled(entry):
            raise CheckpointNotFound(
                f"{entry.card.name} was not downloaded by sdfleet: nobody told what its files should be",
                hint=f"see `sdfleet models show {entry.card.name}`",
            )
        manifest = catalog.weights.manifest(entry.card.name)
        faults = catalog.weights.verify(entry.card.name)
        if faults:
            raise BrokenCheckpoint(
                f"{entry.card.name}: {'; '.join(faults)}",
                hint=f"get it again: sdfleet models rm {entry.card.name}, then sdfleet models pull {entry.card.name}",
            )
        if as_json:
            console.say_json({"name": entry.card.name, "n_files": len(manifest.files), "n_bytes": manifest.n_bytes})
            return
        console.say(f"{entry.card.name}: {len(manifest.files)} files, {size(manifest.n_bytes)}, all as announced")


def usage(*, as_json: AsJson = False) -> None:
    """Say what downloaded models take on the disk."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.catalog.download import free_bytes

        weights = compose.catalog(console.start()).weights
        spaces, n_free = weights.usage(), free_bytes(weights.folder)
        if as_json:
            facts = [
                {"name": space.name, "n_bytes": space.n_bytes, "n_unfinished_bytes": space.n_unfinished_bytes}
                for space in spaces
            ]
            console.say_json({"folder": str(weights.folder), "models": facts, "n_free_bytes": n_free})
            return
        for space in spaces:
            unfinished = f"  ({size(space.n_unfinished_bytes)} unfinished)" if space.n_unfinished_bytes else ""
            console.say(f"{space.name:<20} {size(space.n_bytes):>10}{unfinished}")
        console.say(f"{'free':<20} {size(n_free):>10}  {weights.folder}")


def size(n_bytes: int) -> str:
    """`512 B`, `3.4 MB`, `5.5 GB`: as hubs and shops count, in thousands."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


class PullBar:
    """A progress bar on stderr for one download; off a terminal one line a file."""

    def __init__(self, found: DownloadPlan) -> None:
        self._plan = found
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._file = ""

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=console.stderr_console(),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._plan.name, total=self._plan.n_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: PullProgress) -> None:
        """Show one chunk. Fits `on_progress`."""
        if self._bar is None or self._task is None:
            if progress.file.path != self._file:
                self._file = progress.file.path
                console.note(f"{self._file} ({size(progress.file.n_bytes)})")
            return
        waits = "" if progress.waits_s is None else f", trying again in {progress.waits_s:.0f} s"
        self._bar.update(self._task, description=f"{progress.file.path}{waits}", completed=progress.n_bytes)


def _show(found: DownloadPlan) -> None:
    from sdfleet.catalog.hubs.hub import TITLES

    left = "" if found.n_left_bytes == found.n_bytes else f", {size(found.n_left_bytes)} still to come"
    console.say(f"{found.name} from {TITLES[found.source]}: {found.repo_id} at {found.endpoint}")
    console.say(f"  {len(found.files)} files, {size(found.n_bytes)}{left}; {size(found.n_free_bytes)} free on the disk")
    console.say(f"  into {found.folder}")
    gated = "; it must be accepted there first" if found.is_gated and found.source == "hf" else ""
    console.say(f"  licence: {found.licence or 'see the page of the model'} {found.licence_url or ''}{gated}".rstrip())
    if found.refusal is not None:
        console.say(f"  the hub would refuse it now: {found.refusal}")


def _said(found: DownloadPlan, *, as_json: bool, text: str) -> None:
    from sdfleet.catalog.download import facts_of

    if as_json:
        console.say_json(facts_of(found) | {"is_here": True})
    else:
        console.say(text)


def _consent(found: DownloadPlan, settings: Settings, *, yes: bool) -> Consent:
    """The yes to this plan. Raises ConfirmationRequired where nobody can be asked."""
    from sdfleet.catalog.consent import Consent

    if settings.pull_without_asking and not yes:
        return Consent(plan_id=found.id, given_by="setting")
    if not yes:
        _ask(f"download {size(found.n_left_bytes)}?", otherwise=f"sdfleet models pull {found.name} --yes")
    return Consent(plan_id=found.id, given_by="command line")


def _ask(question: str, *, otherwise: str) -> None:
    """Return when the person says yes; leave the command when not. Raises ConfirmationRequired off a terminal."""
    from sdfleet.errors import ConfirmationRequired

    if not sys.stdin.isatty():
        raise ConfirmationRequired(
            "this needs a yes, and nobody is here to be asked", hint=f"say it with `{otherwise}`"
        )
    if not typer.confirm(question, err=True):
        console.note("nothing was done")
        raise typer.Exit(console.EXIT_FAULT)


async def _check_is_idle(settings: Settings, model: str) -> None:
    """Raise InUse while a job of a server waits for the model or is drawn with it."""
    from sdfleet import compose

    async with compose.stores(settings) as stores:
        await compose.check_is_idle(stores.jobs, model)


def _needs(card: Card, settings: Settings) -> tuple[Need, ...] | None:
    """Memory for one picture of the card's size; None where nobody described the architecture."""
    from sdfleet.bench.random_model import random_folder
    from sdfleet.catalog import architectures
    from sdfleet.domain import Drawing, JobId
    from sdfleet.engine.needs import needs

    name = card.architecture or card.name
    if name not in architectures.names():
        return None
    with random_folder(architectures.load(name)) as (_, folder):
        drawing = Drawing(
            job_id=JobId("plan"), checkpoint=str(folder), family=card.family, prompt="a", negative_prompt="",
            width_px=card.width_px, height_px=card.height_px, steps=card.steps, guidance=card.guidance, seed=0,
            n_images=1, sampler=card.sampler,
        )  # fmt: skip
        return needs(drawing, device=settings.device, dtype=settings.dtype, limit_bytes=settings.memory_limit)


def _need_facts(needs: tuple[Need, ...]) -> list[Mapping[str, Any]]:
    return [
        {
            "mode": need.mode, "dtype": need.dtype, "weights_bytes": need.weights_bytes, "peak_bytes": need.peak_bytes,
            "fits": need.fits,
        }
        for need in needs
    ]  # fmt: skip


def _need_lines(card: Card, needs: tuple[Need, ...]) -> list[str]:
    lines = [f"  memory for one picture of {card.width_px}x{card.height_px} here:"]
    for need in needs:
        verdict = "fits" if need.fits else "does not fit now"
        lines.append(f"    {need.dtype:<9} {need.mode:<5} {size(need.peak_bytes):>9}  {verdict}")
    return lines
