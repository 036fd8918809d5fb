"""What fits, in which arrangement; decided from bytes before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from sdfleet.engine.memory import MemoryPlan, Weights, plan
from sdfleet.errors import OutOfMemory

GB = 10**9
SDXL = Weights(text=int(1.6 * GB), denoiser=int(5.1 * GB), vae=int(0.17 * GB))


def planned(free_gb: float, **changes: Any) -> MemoryPlan:
    arguments: dict[str, Any] = {"activation_bytes": GB // 2, "decode_bytes": 3 * GB, "mode": "auto"}
    return plan(SDXL, free_bytes=int(free_gb * GB), **{**arguments, **changes})


@pytest.mark.parametrize(
    ("free_gb", "residency", "tile_vae"),
    [(16, "all", False), (9, "all", True), (7, "by_phase", False), (2.5, None, None)],
)
def test_the_fastest_arrangement_that_fits_is_taken(
    *, free_gb: float, residency: str | None, tile_vae: bool | None
) -> None:
    if residency is None:
        with pytest.raises(OutOfMemory, match=r"needs 5\.6 GB"):
            planned(free_gb)
    else:
        chosen = planned(free_gb)
        assert (chosen.residency, chosen.tile_vae) == (residency, tile_vae)
        assert chosen.peak_bytes <= free_gb * GB


def test_eco_takes_the_leanest_even_where_there_is_room() -> None:
    assert planned(100, mode="eco").residency == "by_phase"


def test_fast_refuses_rather_than_swap() -> None:
    with pytest.raises(OutOfMemory):
        planned(7, mode="fast")


def test_more_memory_never_gives_a_slower_arrangement() -> None:
    order = [("by_phase", True), ("by_phase", False), ("all", True), ("all", False)]
    ranks = [order.index((p.residency, p.tile_vae)) for p in (planned(free / 4) for free in range(26, 80))]
    assert ranks == sorted(ranks)
