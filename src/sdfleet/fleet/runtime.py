"""A router's runtime: the same door as on one machine, with the fleet behind it."""

from __future__ import annotations

from collections.abc import Callable

from sdfleet.domain import ImageResult, Progress, SafetyChecker
from sdfleet.fleet.catalog import FleetCatalog
from sdfleet.fleet.remote import FleetBackend
from sdfleet.runtime import Prepared, Runtime


class FleetRuntime(Runtime):
    """Gives the fleet the request behind each drawing: names travel, folders do not."""

    def __init__(self, *, catalog: FleetCatalog, fleet: FleetBackend, safety_checker: SafetyChecker = "on") -> None:
        super().__init__(catalog=catalog, backend=fleet, safety_checker=safety_checker, is_fleet=True)
        self.fleet = fleet

    async def draw(self, prepared: Prepared, *, on_progress: Callable[[Progress], None] | None = None) -> ImageResult:
        self.fleet.expect(prepared)
        return await super().draw(prepared, on_progress=on_progress)
