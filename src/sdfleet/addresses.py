"""Connections to addresses that a stranger named: none into our own networks, whatever a name server says.

A name is resolved once, every address it has is checked, and the connection goes to that very address: an answer
that changes between the check and the connection (DNS rebinding) changes nothing.

>>> is_public("93.184.216.34"), is_public("2606:2800:220:1::1")
(True, True)
>>> is_public("10.0.0.1"), is_public("::1"), is_public("::ffff:127.0.0.1"), is_public("64:ff9b::a00:1")
(False, False, False, False)
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from urllib.parse import SplitResult, urlsplit

import httpcore2

from sdfleet.errors import InvalidValue

# (host, port) -> addresses, in the order in which they are tried.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_URL_CHARS = 2000
# IPv6 addresses that carry an IPv4 address in their last 32 bits: mapped, translated (SIIT), NAT64, and the old
# "compatible" form.
_CARRIERS = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "::/96")))
# All the internet there is in IPv6. `is_global` says yes to site-local addresses, a network's own NAT64 and more.
_IPV6_INTERNET = ipaddress.IPv6Network("2000::/3")
# In there, or in IPv4, and still nobody's: documentation, and the relays that were given up.
_NOBODYS = (ipaddress.IPv6Network("3fff::/20"), ipaddress.IPv4Network("192.88.99.0/24"))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet: not private, loopback, link-local, shared or multicast."""
    try:
        found = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return False
    carried = _carried(found)
    is_outside = found.version == 4 or found in _IPV6_INTERNET or any(found in network for network in _CARRIERS)
    return is_outside and all(map(_is_global, carried or (found,)))


def check_url(field: str, url: str, *, allow_private: bool) -> SplitResult:
    """The parts of a URL that may be called. Raises InvalidValue, naming the field.

    A name is not looked up here; `GuardedNetwork` does when it connects.
    """
    if len(url) > MAX_URL_CHARS or not url.isascii() or any(c <= " " or c == "\\" for c in url):
        raise InvalidValue(field, "this is not a URL that can be called", hint="use plain ASCII without spaces")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise InvalidValue(field, f"this is not a URL: {exc}") from exc
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise InvalidValue(field, "this is not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise InvalidValue(field, "a URL with a user name or password is not called")
    if not allow_private and _is_private(parts.hostname.rstrip(".")):
        raise InvalidValue(
            field, f"{parts.hostname} is not a public address", hint="set SD_ALLOW_PRIVATE_URLS=1 to allow it"
        )
    return parts


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, as the machine's resolver says. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses only. For `httpcore2.AsyncConnectionPool(network_backend=...)`."""

    def __init__(self, *, allow_private: bool = False, resolve: Resolve = resolve) -> None:
        self._allow_private = allow_private
        self._resolve = resolve
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the name is httpcore's
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as exc:
            raise httpcore2.ConnectError(f"{host} is not known: {exc}") from exc
        # One private address among public ones is an attempt too.
        if not addresses or not (self._allow_private or all(map(is_public, addresses))):
            raise httpcore2.ConnectError(f"{host} is not a public address")
        fault: Exception | None = None
        for address in addresses[:4]:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout=timeout, local_address=local_address, socket_options=socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as exc:
                fault = exc
        raise httpcore2.ConnectError(f"{host} does not answer: {fault}") from fault

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _is_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    is_nobodys = any(address.version == network.version and address in network for network in _NOBODYS)
    return address.is_global and not address.is_multicast and not is_nobodys


def _carried(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses that an IPv6 address stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found = [address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in _CARRIERS):
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


def _is_private(host: str) -> bool:
    """Whether a host that needs no name server is of our own networks; also 2130706433, 0x7f.1 and 0177.0.0.1."""
    try:
        ipaddress.ip_address(host.split("%", 1)[0])
    except ValueError:
        try:
            host = socket.inet_ntoa(socket.inet_aton(host))
        except OSError:
            return host == "localhost" or host.endswith(".localhost")
    return not is_public(host)
