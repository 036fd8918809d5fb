"""A model that is not on this machine, as a checkpoint of random weights in a folder that goes away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sdfleet import compose
from sdfleet.catalog import architectures
from sdfleet.settings import Settings


@contextmanager
def standing_in(name: str, settings: Settings, *, with_text_encoders: bool) -> Iterator[Settings]:
    """Settings under which the architecture `name` is a model of that name, until this is left.

    with_text_encoders: False puts encoders of a few layers in their place: T5 alone takes 9.5 GB. Raises UnknownName.
    """
    architecture = architectures.load(name)
    with random_folder(architecture, with_text_encoders=with_text_encoders) as (home, folder):
        # Another executor would be tried between the pictures that are timed, and its trial kept for nobody.
        executor = "torch" if settings.executor == "auto" else settings.executor
        stand_in = settings.model_copy(update={"home": home, "executor": executor})
        compose.catalog(stand_in).add(folder, name=name)
        yield stand_in


@contextmanager
def random_folder(
    architecture: architectures.Architecture, *, with_text_encoders: bool = True, seed: int = 0
) -> Iterator[tuple[Path, Path]]:
    """(a temporary folder, the checkpoint in it), both gone when this is left."""
    from sdfleet.engine.random_weights import write_checkpoint

    written = architecture if with_text_encoders else architecture.with_light_text_encoders()
    with TemporaryDirectory(prefix="sdfleet-bench-") as home:
        folder = Path(home) / "checkpoint"
        write_checkpoint(written, folder, seed=seed)
        yield Path(home), folder
