"""Asks the servers of language models which models they have, once, for however many checks want to know."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx2

    from sdfleet.settings import Settings

CONNECT_S = 2.0
# One that computes on every core of this machine is late with its list, and well.
ANSWER_S = 3.0
MAX_LIST_BYTES = 2**23

# unreachable: nobody listens. late: connected, no answer. broken: a status of 500 or more. strange: no list of models.
Standing = Literal["well", "empty", "unreachable", "late", "locked", "broken", "strange"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A server as it was found. setting: the one that names it. said: what happened, for people."""

    url: str
    setting: Literal["SD_OLLAMA_URL", "SD_LANGUAGE_URLS"]
    standing: Standing
    said: str = ""
    n_models: int = 0

    @property
    def path(self) -> str:
        """Where it lists its models."""
        return _PATHS[self.setting]

    @property
    def is_here(self) -> bool:
        """Whether its address is this machine's own."""
        return urlsplit(self.url).hostname in {"localhost", "127.0.0.1", "::1"}


_PATHS = {"SD_OLLAMA_URL": "/api/tags", "SD_LANGUAGE_URLS": "/v1/models"}
_LISTS = {"SD_OLLAMA_URL": ("models", "name"), "SD_LANGUAGE_URLS": ("data", "id")}


class UpstreamProbe:
    """See the file's first line. The first check that asks waits for all servers, which are asked side by side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: tuple[Upstream, ...] | None = None

    def found(self, settings: Settings) -> tuple[Upstream, ...]:
        """Every server of the settings; the key goes where the server itself sends it."""
        with self._lock:
            if self._found is None:
                self._found = asyncio.run(_look(settings))
            return self._found


async def _look(settings: Settings) -> tuple[Upstream, ...]:
    import httpx2

    key = None if settings.language_key is None else settings.language_key.get_secret_value()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S)
    async with httpx2.AsyncClient(timeout=timeout, trust_env=False) as client:
        asked = [] if settings.ollama_url is None else [_ask(client, settings.ollama_url, "SD_OLLAMA_URL", {})]
        asked += [_ask(client, url, "SD_LANGUAGE_URLS", headers) for url in settings.language_urls]
        return tuple(await asyncio.gather(*asked))


async def _ask(
    client: httpx2.AsyncClient,
    url: str,
    setting: Literal["SD_OLLAMA_URL", "SD_LANGUAGE_URLS"],
    headers: dict[str, str],
) -> Upstream:
    import httpx2

    url = url.rstrip("/").removesuffix("/v1")
    found = bytearray()
    try:
        async with client.stream("GET", url + _PATHS[setting], headers=headers) as answer:
            status = answer.status_code
            async for data in answer.aiter_bytes():
                found += data
                if len(found) > MAX_LIST_BYTES:
                    break
    except (httpx2.ReadTimeout, httpx2.PoolTimeout):
        return Upstream(url=url, setting=setting, standing="late", said=f"no answer within {ANSWER_S:.0f} s")
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as exc:
        said = " ".join(str(exc).split()) or type(exc).__name__
        return Upstream(url=url, setting=setting, standing="unreachable", said=said[:200])
    if status in {401, 403}:
        return Upstream(url=url, setting=setting, standing="locked", said=f"status {status}")
    if status >= 500:
        return Upstream(url=url, setting=setting, standing="broken", said=f"status {status}")
    n_models = None if status != 200 else _n_listed(bytes(found), setting)
    if n_models is None:
        said = f"status {status}" if status != 200 else "something that is no list of models"
        return Upstream(url=url, setting=setting, standing="strange", said=said)
    return Upstream(url=url, setting=setting, standing="well" if n_models else "empty", n_models=n_models)


def _n_listed(data: bytes, setting: str) -> int | None:
    """How many models a list names; None for what is no such list."""
    list_name, id_name = _LISTS[setting]
    try:
        told: Any = json.loads(data)
    except ValueError:
        return None
    listed = told.get(list_name) if isinstance(told, dict) else None
    if not isinstance(listed, list):
        return None
    return sum(isinstance(one, dict) and isinstance(one.get(id_name), str) for one in listed)
