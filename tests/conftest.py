"""What every test may lean on: toy checkpoints on disk, and libraries that neither phone nor chatter."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Before anything imports huggingface_hub, which reads these once; child processes inherit them.
os.environ.update(  # noqa: TID251 - tests set the stage
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TQDM_DISABLE="1",
)


def pytest_configure(config: pytest.Config) -> None:
    """No clock decides a test, and a library's own warnings that nobody here can change are no errors."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # Started in the background by a shell: processes that tests start would ignore Ctrl-C too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A busy machine is slow now and then; that is no failure.
    hypothesis.settings.register_profile("sdfleet", deadline=None)
    hypothesis.settings.load_profile("sdfleet")
    # diffusers 0.42.1 hands a torch 2.13 tensor to numpy 2 in the constructor of EulerDiscreteScheduler.
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test has an id of its own: of those that share one, xdist runs one and says nothing of the others."""
    known: set[str] = set()
    for item in items:
        if not item.nodeid.endswith(item.name):  # schemathesis 4.32 names each route; pytest 9.2 asks it for more
            item._id = type(item.id).parse(f"{item.nodeid.rpartition('::')[0]}::{item.name}")
        if item.nodeid in known:
            raise pytest.UsageError(f"two tests have the id {item.nodeid}")
        known.add(item.nodeid)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that runs in this process sets up logging for all of it; the next test must not notice."""
    told = [logging.getLogger(name) for name in ("sdfleet", "py.warnings")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in told]
    yield
    for logger, (handlers, propagates, level) in zip(told, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagates
        logger.setLevel(level)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoints("sd15")` is the folder of that toy checkpoint, written when first asked for; read it only."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        # Imported here: tests that need no checkpoint must not pay for torch and diffusers.
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from tests import tiny

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        path = root / name
        return path if path.exists() else tiny.write(name, root)

    return folder
