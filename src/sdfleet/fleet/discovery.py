"""A fleet on the local network says that it is there (mDNS, `_sdfleet._tcp.local.`).

It offers an address, never trust: who follows it still needs a join code, or a person who compares the short codes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import ifaddr
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from sdfleet.errors import StoreUnavailable

log = logging.getLogger(__name__)

SERVICE = "_sdfleet._tcp.local."
LOOK_S = 3.0
_ASK_MS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A router that says it is there. places: `host:port` of its broker. fingerprint: first part, for people to see."""

    name: str
    places: tuple[str, ...]
    version: str
    fingerprint: str


def own_addresses() -> tuple[str, ...]:
    """This machine's addresses that others may reach it by, IPv4 first; loopback where there is no other."""
    found: list[str] = []
    for adapter in ifaddr.get_adapters():
        for each in adapter.ips:
            text = each.ip if isinstance(each.ip, str) else each.ip[0]
            address = ipaddress.ip_address(text)
            if not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified):
                found.append(text)
    return tuple(sorted(dict.fromkeys(found), key=lambda text: ":" in text)) or ("127.0.0.1",)


def place_of(address: str, port: int) -> str:
    """As a join code spells it.

    >>> place_of("10.0.0.2", 4222), place_of("fd00::2", 4222)
    ('10.0.0.2:4222', '[fd00::2]:4222')
    """
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@asynccontextmanager
async def announced(
    *,
    name: str,
    port: int,
    version: str,
    fingerprint: bytes,
    addresses: Sequence[str] | None = None,
    interfaces: Sequence[str] | None = None,
) -> AsyncIterator[None]:
    """Say that a router is here, for the time of the block. Where the network does not carry it, nothing is said.

    port: of the broker. addresses: where it is reached; this machine's when None. interfaces: addresses of those to
    speak on; all when None.
    """
    reached_at = own_addresses() if addresses is None else tuple(addresses)
    label = re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")[:50] or "router"
    info = AsyncServiceInfo(
        SERVICE, f"{label}.{SERVICE}", parsed_addresses=list(reached_at), port=port,
        properties={"version": version, "fingerprint": fingerprint.hex()[:16]}, server=f"{label}.local.",
    )  # fmt: skip
    async with _zeroconf(interfaces) as zeroconf:
        if zeroconf is not None:
            await (await zeroconf.async_register_service(info, allow_name_change=True))
            log.info("the router is announced on the local network", extra={"router": info.name, "port": port})
        yield
        if zeroconf is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await (await zeroconf.async_unregister_service(info))


async def look_around(
    *, within_s: float = LOOK_S, n_enough: int | None = None, interfaces: Sequence[str] | None = None
) -> tuple[Sighting, ...]:
    """Routers that answer on the local network within that time, or the first `n_enough` of them.

    Raises StoreUnavailable where the network carries no multicast.
    """
    names: dict[str, None] = {}
    is_enough = asyncio.Event()

    def noted(*, name: str, state_change: ServiceStateChange, **_: object) -> None:
        if state_change is not ServiceStateChange.Removed:
            names[name] = None
            if len(names) == n_enough:
                is_enough.set()

    async with _zeroconf(interfaces) as zeroconf:
        if zeroconf is None:
            raise StoreUnavailable("this machine cannot look around on its network", hint="join with a code instead")
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[noted])
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await is_enough.wait()
            found = [await _seen(zeroconf.zeroconf, name) for name in names]
        finally:
            await browser.async_cancel()
    return tuple(each for each in found if each is not None)


async def _seen(zeroconf: Zeroconf, name: str) -> Sighting | None:
    info = AsyncServiceInfo(SERVICE, name)
    if not await info.async_request(zeroconf, _ASK_MS) or not info.port:
        return None
    facts = {key: value or "" for key, value in info.decoded_properties.items()}
    addresses = info.parsed_addresses(IPVersion.All)
    return Sighting(
        name=name.removesuffix(f".{SERVICE}"),
        places=tuple(place_of(address, info.port) for address in addresses),
        version=facts.get("version", "")[:40],
        fingerprint=facts.get("fingerprint", "")[:16],
    )


@asynccontextmanager
async def _zeroconf(interfaces: Sequence[str] | None) -> AsyncIterator[AsyncZeroconf | None]:
    """None where the network has no multicast, or none that we may use."""
    try:
        zeroconf = AsyncZeroconf() if interfaces is None else AsyncZeroconf(interfaces=list(interfaces))
    except (OSError, socket.gaierror) as exc:
        log.info("this network carries no announcements (mDNS)", extra={"why": str(exc)})
        yield None
        return
    try:
        yield zeroconf
    finally:
        await zeroconf.async_close()
