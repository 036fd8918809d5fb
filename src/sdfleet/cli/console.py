"""What every command shares: how it talks to a person, how it answers a fault, how it shows progress.

Only typer and the standard library are imported when this file is: `sdfleet --help` must not wait.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from sdfleet.domain import Progress
    from sdfleet.settings import Settings

T = TypeVar("T")

EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
# 128 + SIGINT, what a shell expects of a program that Ctrl-C ended.
EXIT_INTERRUPTED = 130


def say(text: str) -> None:
    """A line of the answer, to stdout."""
    typer.echo(text)


def note(text: str) -> None:
    """A line beside the answer, to stderr."""
    typer.echo(text, err=True)


def say_json(value: Mapping[str, Any]) -> None:
    """The whole answer as one JSON object, to stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def start(*, default_log_level: str = "warning", for_server: bool = False, **given: object) -> Settings:
    """The settings for this command, with logging as they say. `given` wins over the environment."""
    from sdfleet.observe import start_logging
    from sdfleet.settings import load_settings

    settings = load_settings(for_server=for_server, **given)
    start_logging(settings.log_level or default_log_level, as_json=settings.log_json)
    return settings


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of the work; Ctrl-C cancels it, lets it clean up, and comes out as KeyboardInterrupt."""
    import asyncio

    return asyncio.run(work)


def serve(work: Coroutine[Any, Any, T]) -> T:
    """As `run`, for what serves others: on uvloop where it is installed, as the API's server does by itself."""
    import asyncio

    try:
        from uvloop import new_event_loop
    except ImportError:  # Windows has none
        new_event_loop = None  # type: ignore[assignment]
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


@contextmanager
def answering(*, as_json: bool = False) -> Iterator[None]:
    """Run a command's body and turn its fault into one line on stderr and an exit code.

    2: the caller must change the request or the checkpoint. 1: everything else. 130: Ctrl-C.
    A fault nobody foresaw leaves its traceback in a file and its path on stderr.
    """
    from sdfleet.errors import BadRequest, CheckpointError, SdfleetError

    try:
        yield
    except KeyboardInterrupt:
        _fail({"code": "cancelled", "message": "cancelled", "hint": ""}, as_json=as_json)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except SdfleetError as exc:
        _fail(exc.to_wire(), as_json=as_json)
        is_bad_input = isinstance(exc, BadRequest | CheckpointError)
        raise typer.Exit(EXIT_BAD_INPUT if is_bad_input else EXIT_FAULT) from None
    except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
        raise
    except Exception as exc:  # noqa: BLE001 - the one broad handler here: it keeps the cause and answers the person
        wire = {"code": "internal_error", "message": f"a fault of sdfleet itself: {_one_line(exc)}", "hint": _keep(exc)}
        _fail(wire, as_json=as_json)
        raise typer.Exit(EXIT_FAULT) from None


def _fail(wire: Mapping[str, str], *, as_json: bool) -> None:
    text = "; ".join(part for part in (wire["message"], wire["hint"]) if part)
    note(f"error: {' '.join(text.split())}")
    if as_json:
        say_json({"error": dict(wire)})


def _one_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"


def _keep(exc: BaseException) -> str:
    """Write the traceback into the data folder; what to tell the person about it."""
    from sdfleet.errors import SdfleetError
    from sdfleet.settings import load_settings

    now = datetime.now(UTC)
    try:
        folder = load_settings().logs_folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"fault-{now:%Y%m%d-%H%M%S-%f}.log"
        path.write_text("".join(traceback.format_exception(exc)), encoding="utf-8", errors="backslashreplace")
    except (OSError, SdfleetError) as unsaved:
        return f"its traceback could not be saved ({_one_line(unsaved)})"
    return f"please report it with {path}"


def read_file(path: Path, *, field: str, max_bytes: int) -> bytes:
    """The contents of a file a person named. Raises InvalidValue, or BrokenPicture for a folder or a file too large."""
    from sdfleet.errors import BrokenPicture, InvalidValue

    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except IsADirectoryError as exc:
        raise BrokenPicture(f"{path} is a folder, not a picture") from exc
    except (OSError, ValueError) as exc:
        raise InvalidValue(field, f"{path} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    if len(data) > max_bytes:
        raise BrokenPicture(f"{path} is larger than {max_bytes // 2**20} MiB", hint="make the picture smaller")
    return data


def stderr_console() -> Console:
    """A rich console on stderr that keeps to NO_COLOR and to plain text where nobody watches."""
    from rich.console import Console

    from sdfleet.settings import read_terminal

    return Console(stderr=True, no_color=not read_terminal().has_colour, highlight=False)


class StepBar:
    """A progress bar on stderr for one job: steps of all its pictures and the time left; silent off a terminal."""

    def __init__(self, *, n_images: int, steps: int) -> None:
        self._n_images = n_images
        self._total = n_images * steps
        self._done: dict[int, int] = {}
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=stderr_console(),
                transient=True,
            )
            self._bar.start()
            # Without a total the bar pulses: the model is being loaded and nothing can be counted yet.
            self._task = self._bar.add_task("loading", total=None, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one step. Fits `on_progress`."""
        self._done[progress.image_index] = progress.step
        if self._bar is None or self._task is None:
            return
        which = f"picture {progress.image_index + 1}/{self._n_images}" if self._n_images > 1 else "drawing"
        left = "" if progress.eta_s is None else f"{_clock(progress.eta_s)} left"
        self._bar.update(
            self._task, description=which, total=self._total, completed=sum(self._done.values()), left=left
        )


def _clock(seconds: float) -> str:
    """`8 s`, `2 min 05 s`, `1 h 03 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
