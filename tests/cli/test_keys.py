"""`sdfleet keys`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sdfleet.storage.database import open_database
from sdfleet.storage.keys import KeyRecord, KeyStore
from tests.cli.conftest import Run


def _find(home: Path, secret: str) -> KeyRecord | None:
    async def work() -> KeyRecord | None:
        database = await open_database(None, home=home)
        try:
            return await KeyStore(database).find(secret)
        finally:
            await database.close()

    return asyncio.run(work())


def test_a_key_is_printed_once_and_opens_the_server(run: Run, home: Path) -> None:
    answer = run("keys", "create", "laptop", "--scope", "read", "--scope", "manage", "--max-queued", "3")
    secret = answer.out.strip()
    found = _find(home, secret)
    assert found is not None
    assert (found.name, sorted(found.scopes), found.max_queued) == ("laptop", ["manage", "read"], 3)
    assert secret not in answer.err
    listed = run("keys", "list")
    assert "laptop" in listed.out
    assert secret.split("_", 2)[2] not in listed.out + run("keys", "list", "--json").out


def test_a_key_may_draw_and_read_if_nothing_is_said(run: Run) -> None:
    assert run("keys", "create", "laptop", "--json").json["scopes"] == ["generate", "read"]


def test_a_revoked_key_opens_nothing(run: Run, home: Path) -> None:
    made = run("keys", "create", "laptop", "--json").json
    assert run("keys", "revoke", "laptop").out == "revoked laptop\n"
    assert _find(home, made["key"]) is None
    assert run("keys", "list", "--json").json == {"keys": []}


def test_what_cannot_be_is_one_line_and_an_exit_code(run: Run) -> None:
    run("keys", "create", "laptop")
    assert [run("keys", "create", "laptop").code, run("keys", "create", "x", "--scope", "root").code] == [1, 2]
    answer = run("keys", "revoke", "nobody")
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert "sdfleet keys list" in answer.err
