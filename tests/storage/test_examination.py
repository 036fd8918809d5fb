"""A look at a database changes nothing and sees what the stores wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfleet.errors import StorageError
from sdfleet.storage.examination import look
from tests.storage.conftest import ERROR, Play, Stage


def test_what_the_stores_wrote_is_seen(play: Play[None], url: str) -> None:
    async def story(stage: Stage) -> None:
        await stage.finished(spent_s=7.0)
        for _ in range(2):
            await stage.jobs.fail((await stage.begun()).id, ERROR)
        await stage.begun()
        await stage.keys.create("me")

    play(story)
    seen = look(url, home=Path("unused"), since_s=0.0)
    assert seen is not None
    assert (seen.is_current, seen.n_done, seen.n_failed, seen.n_keys) == (True, 1, 2, 1)
    assert [(failure.code, failure.n, failure.hint) for failure in seen.failures] == [
        ("engine_failed", 2, "stand it up")
    ]
    assert seen.running is not None
    assert (seen.running.model, seen.running.typical_s) == ("toy", 7.0)
    later = look(url, home=Path("unused"), since_s=2e9)
    assert later is not None
    assert (later.n_done, later.n_failed) == (0, 0)


def test_an_empty_database_is_not_filled(url: str) -> None:
    seen = look(url, home=Path("unused"), since_s=0.0)
    if seen is not None:  # a server of PostgreSQL has it, a file is not there yet
        assert (seen.is_current, seen.is_newer, seen.version) == (False, False, None)
    again = look(url, home=Path("unused"), since_s=0.0)
    assert again == seen


def test_a_password_is_in_no_message() -> None:
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    with pytest.raises(StorageError) as caught:
        look("postgresql://me:secret@127.0.0.1:9/none", home=Path("unused"), since_s=0.0)
    assert "secret" not in str(caught.value)
    assert "is the server up" in caught.value.hint
