"""Where a URL of a stranger may lead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpcore2
import pytest

from sdfleet.addresses import GuardedNetwork, check_url, is_public
from sdfleet.errors import InvalidValue

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
    "::10.0.0.1", "64:ff9b::10.0.0.1", "2002:a00:1::1", "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_our_own_networks_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/", "file:///etc/passwd", "example.org", "http://", "http:///x", "http://a:0/", "http://a:x/",
        "http://a:99999/", "http://user:word@example.org/", "http://exa mple.org/", "http://example.org/\r\nX: y",
        "http://example.org\\@localhost/", "http://[::1", "http://b\u00fccher.example/", "http://" + "a" * 2000,
        "http://localhost/", "http://127.0.0.1/", "http://[::1]:80/", "http://[fe80::1]/", "http://169.254.169.254/",
    ],
)  # fmt: skip
def test_a_url_that_would_never_be_called_is_refused(url: str) -> None:
    with pytest.raises(InvalidValue, match=r"^webhook"):
        check_url("webhook", url, allow_private=False)


def test_private_urls_are_called_where_they_are_allowed() -> None:
    assert check_url("webhook", "http://127.0.0.1:9/x", allow_private=True).port == 9


async def _answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    await writer.drain()
    writer.close()


def _fetched(addresses: Sequence[str], *, allow_private: bool, host: str = "stranger.example") -> bytes:
    """What is behind a name that has these addresses; a server listens on loopback."""
    n_asked = 0

    async def resolve(name: str, _: int) -> Sequence[str]:
        nonlocal n_asked
        n_asked += 1
        assert name == host
        return addresses

    async def told() -> bytes:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        network = GuardedNetwork(allow_private=allow_private, resolve=resolve)
        async with server, httpcore2.AsyncConnectionPool(network_backend=network) as pool:
            response = await pool.request("GET", f"http://{host}:{port}/")
        assert n_asked == 1, "who asks twice may be answered differently the second time"
        return bytes(response.content)

    return asyncio.run(told())


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:127.0.0.1"], []])
def test_a_name_that_leads_to_our_own_network_is_not_connected_to(addresses: list[str]) -> None:
    with pytest.raises(httpcore2.ConnectError, match="not a public address"):
        _fetched(addresses, allow_private=False)


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    assert _fetched(["127.0.0.1"], allow_private=True) == b"ok"


def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    assert _fetched(["127.0.0.2", "127.0.0.1"], allow_private=True) == b"ok"


def test_a_literal_address_is_checked_like_a_name() -> None:
    with pytest.raises(httpcore2.ConnectError, match="not a public address"):
        _fetched(["127.0.0.1"], allow_private=False, host="127.0.0.1")


def test_a_name_nobody_knows_is_an_error_of_connecting() -> None:
    async def resolve(_: str, __: int) -> Sequence[str]:
        raise OSError(-2, "Name or service not known")

    async def told() -> None:
        async with httpcore2.AsyncConnectionPool(network_backend=GuardedNetwork(resolve=resolve)) as pool:
            await pool.request("GET", "http://nobody.example/")

    with pytest.raises(httpcore2.ConnectError, match="not known"):
        asyncio.run(told())
