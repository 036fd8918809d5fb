"""Input pictures by URL: only where the server allows it, never from private networks, never more than a picture."""

from __future__ import annotations

import asyncio

import httpcore2

from sdfleet import __version__
from sdfleet.addresses import GuardedNetwork, check_url
from sdfleet.errors import InvalidValue, TooLarge
from sdfleet.settings import Settings
from sdfleet.storage import pictures

FETCH_DEADLINE_S = 20.0
_OK = 200


def is_url(text: str) -> bool:
    """Whether a picture is given by address instead of by its bytes."""
    return text[:8].lower().startswith(("http://", "https://"))


async def fetch_picture(url: str, *, field: str, settings: Settings) -> bytes:
    """The bytes behind a URL. Redirects are not followed. Raises InvalidValue or TooLarge, naming the field."""
    if not settings.allow_image_urls:
        raise InvalidValue(
            field, "this server does not fetch pictures", hint="send the bytes as base64, or set SD_ALLOW_IMAGE_URLS=1"
        )
    check_url(field, url, allow_private=settings.allow_private_urls)
    try:
        async with asyncio.timeout(FETCH_DEADLINE_S):
            return await _read(url, field=field, allow_private=settings.allow_private_urls)
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, TimeoutError) as exc:
        raise InvalidValue(field, "it could not be fetched", hint="check the URL, or send the bytes as base64") from exc


async def _read(url: str, *, field: str, allow_private: bool) -> bytes:
    parts: list[bytes] = []
    n_bytes = 0
    headers = [("User-Agent", f"sdfleet/{__version__}"), ("Accept", "image/*")]
    async with (
        httpcore2.AsyncConnectionPool(network_backend=GuardedNetwork(allow_private=allow_private)) as pool,
        pool.stream("GET", url, headers=headers) as response,
    ):
        if response.status != _OK:
            raise InvalidValue(field, f"its server answered {response.status}", hint="check the URL")
        async for part in response.aiter_stream():
            n_bytes += len(part)
            if n_bytes > pictures.MAX_FILE_BYTES:
                raise TooLarge(f"{field}: the picture behind the URL is larger than {pictures.MAX_FILE_BYTES} bytes")
            parts.append(part)
    return b"".join(parts)
