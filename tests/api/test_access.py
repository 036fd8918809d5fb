from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from starlette.datastructures import Headers

from sdfleet.api.access import ADMIN, Doorkeeper, RateLimit
from sdfleet.domain import LOCAL_OWNER, OwnerId
from sdfleet.errors import NotAllowed, NotAuthenticated, RateLimited
from sdfleet.storage.database import open_database
from sdfleet.storage.keys import KeyStore


@asynccontextmanager
async def _keys(home: Path) -> AsyncIterator[KeyStore]:
    database = await open_database(None, home=home)
    try:
        yield KeyStore(database)
    finally:
        await database.close()


async def _admit(keeper: Doorkeeper, *, method: str = "POST", path: str = "/api/txt2img", **headers: str) -> OwnerId:
    named = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return (await keeper.admit(method=method, path=path, headers=Headers(named))).owner


def test_without_any_key_the_person_at_this_machine_is_let_in(tmp_path: Path) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            keeper = Doorkeeper(keys=keys, admin_key=None)
            assert await _admit(keeper) == LOCAL_OWNER
            # Open WebUI sends an empty header where no key is set.
            assert await _admit(keeper, authorization="") == LOCAL_OWNER

    anyio.run(check)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:7860", ""])
def test_a_name_that_is_not_ours_is_refused_where_no_key_is_asked_for(tmp_path: Path, host: str) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            with pytest.raises(NotAllowed):
                await _admit(Doorkeeper(keys=keys, admin_key=None), method="GET", host=host)

    anyio.run(check)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:7860", "127.0.0.1", "[::1]:7860", "10.0.0.3:7860", "box.lan"])
def test_loopback_addresses_and_allowed_names_are_answered(tmp_path: Path, host: str) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            keeper = Doorkeeper(keys=keys, admin_key=None, hosts=frozenset({"box.lan"}))
            assert await _admit(keeper, host=host) == LOCAL_OWNER

    anyio.run(check)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec_fetch_site": "cross-site"},
    ],
    ids=["other site", "sandboxed page", "other port", "no Origin"],
)
def test_a_page_of_another_site_may_not_post(tmp_path: Path, headers: dict[str, str]) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            keeper = Doorkeeper(keys=keys, admin_key=None)
            with pytest.raises(NotAllowed):
                await _admit(keeper, **headers)

    anyio.run(check)


def test_our_own_page_and_an_allowed_one_may_post(tmp_path: Path) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            keeper = Doorkeeper(keys=keys, admin_key=None, origins=frozenset({"https://chat.example"}))
            assert await _admit(keeper, origin="http://127.0.0.1:7860") == LOCAL_OWNER
            assert await _admit(keeper, origin="https://chat.example") == LOCAL_OWNER

    anyio.run(check)


def test_a_key_is_read_from_wherever_clients_put_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            record, secret = await keys.create("n8n")
            keeper = Doorkeeper(keys=keys, admin_key="master")
            basic = base64.b64encode(f"anyone:{secret}".encode()).decode()
            for headers in (
                {"authorization": f"Bearer {secret}"},
                {"authorization": f"bearer  {secret}"},
                {"authorization": f"Basic {basic}"},
                {"x_api_key": secret},
                {"x_key": secret},
            ):
                assert await _admit(keeper, **headers) == record.owner
            assert await _admit(keeper, authorization="Bearer master") == ADMIN.owner

    anyio.run(check)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic " + base64.b64encode(b"\xff\xfe").decode()},
        {"authorization": "Digest x"},
        {"x_api_key": "sdf_000000000000_" + "A" * 43},
        {"x_api_key": "schlüssel".encode().decode("latin-1")},
    ],
)
def test_without_a_known_key_nobody_gets_in(tmp_path: Path, headers: dict[str, str]) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            await keys.create("somebody")
            with pytest.raises(NotAuthenticated):
                await _admit(Doorkeeper(keys=keys, admin_key=None), **headers)

    anyio.run(check)


def test_a_revoked_key_is_refused_at_once(tmp_path: Path) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            _, secret = await keys.create("old")
            keeper = Doorkeeper(keys=keys, admin_key="master")
            await _admit(keeper, x_api_key=secret)
            await keys.revoke("old")
            with pytest.raises(NotAuthenticated):
                await _admit(keeper, x_api_key=secret)

    anyio.run(check)


def test_a_public_server_asks_for_a_key_even_when_the_last_one_was_revoked(tmp_path: Path) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            with pytest.raises(NotAuthenticated):
                await _admit(Doorkeeper(keys=keys, admin_key=None, is_public=True))

    anyio.run(check)


def test_health_needs_no_key_but_gives_no_rights(tmp_path: Path) -> None:
    async def check() -> None:
        async with _keys(tmp_path) as keys:
            keeper = Doorkeeper(keys=keys, admin_key="master")
            caller = await keeper.admit(method="GET", path="/health", headers=Headers({"host": "x"}))
            assert caller.scopes == frozenset()

    anyio.run(check)


def test_the_rate_of_one_key_does_not_touch_another() -> None:
    limit = RateLimit(per_minute=2)
    for _ in range(2):
        limit.take(OwnerId("a"), now_s=0.0)
    with pytest.raises(RateLimited) as refused:
        limit.take(OwnerId("a"), now_s=0.0)
    assert refused.value.retry_after_s == pytest.approx(30)
    limit.take(OwnerId("b"), now_s=0.0)
    limit.take(OwnerId("a"), now_s=31.0)


def test_a_key_of_its_own_limit_keeps_to_that() -> None:
    limit = RateLimit(per_minute=None)
    limit.take(OwnerId("a"), now_s=0.0, per_minute=1)
    with pytest.raises(RateLimited):
        limit.take(OwnerId("a"), now_s=1.0, per_minute=1)
