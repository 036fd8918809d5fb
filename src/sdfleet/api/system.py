"""What the server says of itself: health, readiness, what it is made of, numbers for Prometheus."""

from __future__ import annotations

from typing import Any

import psutil
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sdfleet import __version__
from sdfleet.api import access
from sdfleet.api.answering import house_of
from sdfleet.api.native import FAULTS

router = APIRouter(tags=["system"], responses=FAULTS)


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether the server is alive, and whether its model is loaded. Needs no key; answers also while it is busy."""
    house = house_of(request)
    backend = house.runtime.capabilities()
    load = house.desk.load()
    is_well = backend.state not in {"unavailable", "closed"}
    return {
        "status": "healthy" if is_well else "unhealthy",
        "model_loaded": house.readiness.is_ready,
        "device": str(backend.facts.get("device", "unknown")),
        "version": __version__,
        "queued": load.n_queued,
        "running": load.n_running,
        "backends": [
            {"id": each.id, "engine": each.engine, "status": each.state, "reason": each.reason}
            for each in house.runtime.backends.standings()
        ],
    }


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """How far loading is: `loaded`, the steps taken, and the error if it failed."""
    readiness = house_of(request).readiness
    return {"loaded": readiness.is_ready, "steps": list(readiness.steps), "error": readiness.error}


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """Version, device and settings, without secrets."""
    house = house_of(request)
    access.check_right(access.caller_of(request), "read")
    settings = house.settings.model_dump(mode="json", exclude={"api_key", "database_url"})
    memory = psutil.virtual_memory()
    return {
        "version": __version__,
        "device": dict(house.runtime.capabilities().facts),
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "settings": settings,
        "models": [entry.card.name for entry in house.catalog.entries()],
    }


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Numbers in Prometheus' text format."""
    house = house_of(request)
    access.check_right(access.caller_of(request), "read")
    return Response(
        house.metrics.expose(load=house.desk.load(), backend=house.runtime.capabilities()),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )
