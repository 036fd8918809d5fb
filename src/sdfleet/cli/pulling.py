"""`sdfleet models plan|pull|rm|verify|du`: weights come and go, each with a yes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal, Self

import typer

from sdfleet.cli import console, serving

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from sdfleet.catalog.cards import Card
    from sdfleet.catalog.consent import Consent
    from sdfleet.catalog.download import DownloadPlan, PullProgress
    from sdfleet.engine.forecast import Forecast
    from sdfleet.engine.needs import Need
    from sdfleet.settings import Settings

# How long operations may be timed on this machine, the first time that a model is asked about.
_MEASURING_S = 8.0

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
        bool, typer.Option(help="Also say what memory and time a picture takes here; that takes some seconds.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Say what a pull would bring: files, bytes, licence, memory and time needed. Downloads no weights."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.catalog.download import facts_of, plan_download
        from sdfleet.errors import HubOffline, HubUnreachable

        settings = console.start()
        catalog = compose.catalog(settings)
        card = catalog.card(name)
        try:
            found = plan_download(card, compose.hub(settings, source), catalog.weights)
        except (HubOffline, HubUnreachable):
            # What a picture takes here can be told without a hub.
            needed = _forecast(card, settings) if memory and not as_json else None
            for line in () if needed is None else [card.name, *_forecast_lines(card, needed)]:
                console.say(line)
            raise
        needed = _forecast(card, settings) if memory else None
        if as_json:
            console.say_json(facts_of(found) | ({} if needed is None else needed.to_json()))
            return
        _show(found)
        for line in () if needed is None else _forecast_lines(card, needed):
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
    """Delete a downloaded model, a LoRA or an embedding, or forget an imported model, whose folder stays as it is."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.cli.adapters import named

        settings = console.start()
        catalog = compose.catalog(settings)
        adapter = named(catalog, name)
        if adapter is not None:
            if not yes:
                ask(f"delete {adapter.path} ({size(adapter.n_bytes)})?", otherwise=f"sdfleet models rm {name} --yes")
            n_bytes = catalog.adapters.remove(adapter)
            freed = {"name": adapter.name, "n_freed_bytes": n_bytes}
            console.say_json(freed) if as_json else console.say(f"removed {adapter.name}: {size(n_bytes)} freed")
            return
        card = catalog.card(name)
        console.run(_check_is_idle(settings, card.name))
        if card.folder is None:
            space = next((space for space in catalog.weights.usage() if space.name == card.name), None)
            n_bytes = 0 if space is None else space.n_bytes + space.n_unfinished_bytes
            question = f"delete {catalog.weights.path(card.name)} ({size(n_bytes)})?"
        else:
            question = f"forget {card.name}? Its folder {card.folder} stays as it is."
        if not yes:
            ask(question, otherwise=f"sdfleet models rm {card.name} --yes")
        serving.unload(settings, card.name)
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
    """Say what downloaded models, LoRAs and embeddings take on the disk."""
    with console.answering(as_json=as_json):
        from sdfleet import compose
        from sdfleet.catalog.download import free_bytes

        catalog = compose.catalog(console.start())
        weights, adapters = catalog.weights, [*catalog.adapters.all("lora"), *catalog.adapters.all("embedding")]
        spaces, n_free = weights.usage(), free_bytes(weights.folder)
        if as_json:
            facts = [
                {"name": space.name, "n_bytes": space.n_bytes, "n_unfinished_bytes": space.n_unfinished_bytes}
                for space in spaces
            ]
            told = [{"name": one.name, "kind": one.facts.kind, "n_bytes": one.n_bytes} for one in adapters]
            console.say_json({"folder": str(weights.folder), "models": facts, "adapters": told, "n_free_bytes": n_free})
            return
        for space in spaces:
            unfinished = f"  ({size(space.n_unfinished_bytes)} unfinished)" if space.n_unfinished_bytes else ""
            console.say(f"{space.name:<20} {size(space.n_bytes):>10}{unfinished}")
        for adapter in adapters:
            console.say(f"{adapter.name:<20} {size(adapter.n_bytes):>10}  {adapter.facts.kind}")
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
        ask(f"download {size(found.n_left_bytes)}?", otherwise=f"sdfleet models pull {found.name} --yes")
    return Consent(plan_id=found.id, given_by="command line")


def ask(question: str, *, otherwise: str) -> None:
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


def _forecast(card: Card, settings: Settings) -> Forecast | None:
    """What one picture of the card's size takes here; None where nobody described the architecture."""
    from sdfleet import compose
    from sdfleet.engine.forecast import forecast

    question = compose.forecast_question(card, settings, budget_s=_MEASURING_S)
    return None if question is None else forecast(question)


def _forecast_lines(card: Card, found: Forecast) -> list[str]:
    lines = [f"  one picture of {card.width_px}x{card.height_px} here takes"]
    lines += [_need_line(need) for need in found.memory]
    if found.time is not None:
        told = found.time
        lines.append(
            f"    about {told.picture_s:.3g} s in {told.dtype}: {told.steps} steps of {told.step_s:.3g} s, "
            f"decoding {told.decode_s:.3g} s; this machine's speed was measured, the model was not"
        )
        if told.was_busy:
            lines.append(
                "    other programs kept the processors busy meanwhile: likely it takes less; plan again when they rest"
            )
    return lines


def _need_line(need: Need) -> str:
    stored = need.dtype if need.weights is None else f"{need.dtype}, weights in {need.weights}"
    stored += "" if need.with_t5 or not need.may_skip_t5 else ", without T5"
    return f"    {size(need.peak_bytes):>9}  {need.mode:<5} {stored}: {need.why or 'fits'}"
