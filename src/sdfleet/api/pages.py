"""The page: the files of `web/` as they lie there, under a policy by which a browser runs and loads nothing else.

Every file has the address `/static/<version>/<name>`, where the version is a hash over all of them: files that name
each other stay together, a browser keeps them for as long as it likes, and after an update it sees only new ones.
"""

from __future__ import annotations

import asyncio
import functools
import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sdfleet.api.native import FAULTS
from sdfleet.errors import NotFound

router = APIRouter(tags=["page"], responses=FAULTS)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HTML = "text/html; charset=utf-8"
# Not from the system's tables: those differ from machine to machine, and a browser refuses a module of another type.
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
AS_HTML: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
AS_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {"schema": {"type": "string"}} for kind in MEDIA_TYPES.values()}},
    304: {"description": "The file that the browser has is this one."},
}
_SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_FOR_EVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of the page, as it lies there and packed with gzip."""

    data: bytes
    packed: bytes
    media_type: str
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Web:
    """All files of the page by name. version: another one whenever one of them is."""

    files: Mapping[str, File]
    version: str


@functools.cache
def web() -> Web:
    """The files, read once for each process."""
    found = {name: data for name, data in _walk(resources.files("sdfleet") / "web") if _media_type(name) is not None}
    files = {
        name: File(
            data=data,
            packed=gzip.compress(data, 9, mtime=0),
            media_type=_media_type(name) or "",
            etag=f'"{hashlib.sha256(data).hexdigest()[:32]}"',
        )
        for name, data in found.items()
    }
    whole = "".join(f"{name} {files[name].etag}\n" for name in sorted(files))
    return Web(files=files, version=hashlib.sha256(whole.encode()).hexdigest()[:16])


@router.get("/studio", response_class=Response, responses=AS_HTML)
async def studio() -> Response:
    """The page to make pictures with."""
    return await page("studio")


@router.get("/dashboard", response_class=Response, responses=AS_HTML)
async def dashboard() -> Response:
    """The page to watch machines and jobs with."""
    return await page("dashboard")


@router.get("/static/{version}/{name:path}", response_class=Response, responses=AS_FILE)
async def static(request: Request, version: str, name: str) -> Response:
    """A file of the page."""
    here = await _web()
    file = here.files.get(name)
    if file is None:
        raise NotFound(f"the page has no file {name[:80]!r}", hint="load the page again")
    headers = {
        **_SAFE,
        "ETag": file.etag,
        "Vary": "Accept-Encoding",
        # A page from before an update still finds its files, but nobody keeps them under the old address.
        "Cache-Control": _FOR_EVER if version == here.version else "no-cache",
    }
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return _packed(request, file, headers)


async def page(name: Literal["studio", "dashboard"]) -> Response:
    """The HTML of one of the two pages."""
    here = await _web()
    text = _html()
    headers = {
        **_SAFE,
        "Content-Security-Policy": POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
        "Vary": "Accept",
    }
    filled = text.replace("{static}", f"/static/{here.version}").replace("{page}", name)
    return Response(filled, media_type=HTML, headers=headers)


async def _web() -> Web:
    """The files; of a thread only the first time, so that the page comes also while all threads are busy."""
    if not web.cache_info().currsize:
        await asyncio.to_thread(web)
        await asyncio.to_thread(_html)
    return web()


def wants_page(request: Request) -> bool:
    """Whether this is a browser that shows what comes, and not a program that looks whether somebody is here."""
    return "text/html" in request.headers.get("accept", "")


@functools.cache
def _html() -> str:
    return (resources.files("sdfleet") / "web" / "index.html").read_text(encoding="utf-8")


def _packed(request: Request, file: File, headers: Mapping[str, str]) -> Response:
    if "gzip" in request.headers.get("accept-encoding", "") and len(file.packed) < len(file.data):
        return Response(file.packed, media_type=file.media_type, headers={**headers, "Content-Encoding": "gzip"})
    return Response(file.data, media_type=file.media_type, headers=dict(headers))


def _walk(folder: Traversable, before: str = "") -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        name = before + entry.name
        found += _walk(entry, f"{name}/") if entry.is_dir() else [(name, entry.read_bytes())]
    return found


def _media_type(name: str) -> str | None:
    """Of what belongs to the page; None for what only lies beside it (licences, the list of hashes).

    >>> _media_type("app.js"), _media_type("vendor/LICENSE.htm")
    ('text/javascript', None)
    """
    return next((kind for end, kind in MEDIA_TYPES.items() if name.endswith(end)), None)
