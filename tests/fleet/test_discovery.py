"""Announcements on the local network, over the library's own sockets on loopback."""

from __future__ import annotations

import asyncio
import socket

import pytest

from sdfleet.errors import StoreUnavailable
from sdfleet.fleet import discovery
from sdfleet.fleet.discovery import announced, look_around, own_addresses, place_of
from sdfleet.fleet.join_code import is_place

LOOPBACK = ("127.0.0.1",)


def test_a_router_that_announces_itself_is_found_and_gone_afterwards() -> None:
    async def test() -> None:
        async with announced(
            name="Anna's router!", port=4222, version="1.2", fingerprint=bytes(range(16)), addresses=["10.0.0.7"],
            interfaces=LOOPBACK,
        ):  # fmt: skip
            (found,) = await look_around(within_s=20.0, n_enough=1, interfaces=LOOPBACK)
        assert found.name == "Anna-s-router"
        assert found.places == ("10.0.0.7:4222",)
        assert (found.version, found.fingerprint) == ("1.2", "0001020304050607")
        assert await look_around(within_s=0.5, interfaces=LOOPBACK) == ()

    asyncio.run(test())


def test_a_network_without_multicast_is_no_fault_of_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(discovery, "AsyncZeroconf", refuses)

    async def test() -> None:
        async with announced(name="r", port=1, version="1", fingerprint=b"x", interfaces=LOOPBACK):
            pass
        with pytest.raises(StoreUnavailable, match="join with a code"):
            await look_around(within_s=0.1, interfaces=LOOPBACK)

    asyncio.run(test())


def test_this_machine_s_addresses_can_stand_in_a_code() -> None:
    addresses = own_addresses()
    assert addresses
    for address in addresses:
        socket.getaddrinfo(address, 4222, flags=socket.AI_NUMERICHOST)
        assert is_place(place_of(address, 4222))
