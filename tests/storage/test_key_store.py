"""Keys: shown once, stored as a hash, gone when revoked."""

from __future__ import annotations

import hmac
from typing import Any

import pytest

from sdfleet.errors import Conflict, InvalidValue, NotFound
from sdfleet.storage.tables import keys
from tests.storage.conftest import Play, Stage


def test_a_key_is_found_by_its_text_with_all_that_was_set(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        made, secret = await stage.keys.create("Ännes Laptop", scopes=["read"], rate_per_minute=6, max_queued=2)
        assert secret.startswith("sdf_")
        assert await stage.keys.find(secret) == made
        assert (made.name, sorted(made.scopes), made.rate_per_minute) == ("Ännes Laptop", ["read"], 6)
        assert made.max_queued == 2

    play(story)


def test_the_text_of_a_key_is_nowhere_in_the_database(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        _, secret = await stage.keys.create("laptop")
        rows = await stage.database.read(lambda connection: [tuple(row) for row in connection.execute(keys.select())])
        assert secret.split("_", 2)[2] not in str(rows)

    play(story)


def test_only_the_whole_right_text_finds_a_key(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        _, secret = await stage.keys.create("laptop")
        _, other = await stage.keys.create("phone")
        mixed = other[:17] + secret[17:]
        wrong = [
            secret[:-1], secret + "A", secret.upper(), " " + secret, mixed, "", "sdf_", "x" * 10_000, "\0", "\ud800",
            secret[:17] + "'" + secret[18:], "sdf_%_" + secret[17:],
        ]  # fmt: skip
        assert [text for text in wrong if await stage.keys.find(text) is not None] == []

    play(story)


def test_a_wrong_text_is_compared_as_long_as_a_right_one(play: Play[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    plain = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return plain(a, b)

    monkeypatch.setattr("hmac.compare_digest", compare)

    async def story(stage: Stage) -> None:
        _, secret = await stage.keys.create("laptop")
        for text in (secret, secret[:-3] + "AAA", "sdf_000000000000_" + secret[17:], "nonsense"):
            await stage.keys.find(text)

    play(story)
    assert compared == [(64, 64)] * 4


def test_a_revoked_key_is_found_nowhere(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        _, first = await stage.keys.create("laptop")
        by_id, second = await stage.keys.create("phone")
        assert (await stage.keys.revoke("laptop")).name == "laptop"
        await stage.keys.revoke(by_id.owner)
        assert [await stage.keys.find(secret) for secret in (first, second)] == [None, None]
        assert await stage.keys.list() == ()
        for name in ("laptop", "nobody", "", "\0", "%"):
            with pytest.raises(NotFound, match="there is no key named"):
                await stage.keys.revoke(name)

    play(story)


def test_a_name_is_given_once_and_again_after_it_was_revoked(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        first, _ = await stage.keys.create("laptop")
        with pytest.raises(Conflict, match="there is a key named 'laptop'"):
            await stage.keys.create("laptop")
        await stage.keys.revoke("laptop")
        again, _ = await stage.keys.create("laptop")
        assert again.owner != first.owner

    play(story)


def test_the_use_of_a_key_is_noted_to_the_minute(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        _, secret = await stage.keys.create("laptop")
        begun_s = stage.clock.now_s
        used: list[float | None] = []
        for later_s in (0, 59, 60, 61):
            stage.clock.now_s = begun_s + later_s
            await stage.keys.find(secret)
            used.append((await stage.keys.list())[0].last_used_s)
        assert used == [begun_s, begun_s, begun_s + 60, begun_s + 60]

    play(story)


@pytest.mark.parametrize("name", ["", " ", "a b ", "x" * 65, "a\nb", "a\0b", "\ud800", "../x", "-x"])
def test_a_name_that_could_not_be_typed_again_is_refused(play: Play[Any], name: str) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(InvalidValue, match="name"):
            await stage.keys.create(name)

    play(story)


@pytest.mark.parametrize(
    "limits", [{"scopes": []}, {"scopes": ["root"]}, {"rate_per_minute": 0}, {"max_queued": -1}, {"max_queued": 2**31}]
)
def test_limits_that_make_no_sense_are_refused(play: Play[Any], limits: Any) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(InvalidValue):
            await stage.keys.create("laptop", **limits)
        assert await stage.keys.list() == ()

    play(story)


def test_a_generator_of_scopes_is_read_once(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        scopes: Any = (scope for scope in ("read",))
        made, _ = await stage.keys.create("laptop", scopes=scopes)
        assert made.scopes == {"read"}

    play(story)
