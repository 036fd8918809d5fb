"""What the store's rows say about how drawing went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import RowMapping

from sdfleet.storage import job_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentImage:
    """One ended job in the statistics; sizes are of the drawn picture."""

    finished_s: float
    model: str
    state: Literal["done", "failed"]
    generation_s: float | None
    width_px: int | None
    height_px: int | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStats:
    """Ended jobs since some time: how many, of which models (name to count, done and failed), and the newest ones."""

    n_done: int
    n_failed: int
    avg_generation_s: float | None
    by_model: Mapping[str, int]
    recent: tuple[RecentImage, ...]


def drawing_s(timings_s: Mapping[str, float]) -> float | None:
    """Seconds of drawing alone: without the wait for the model."""
    phases = [timings_s[phase] for phase in ("encode", "denoise", "decode") if phase in timings_s]
    return sum(phases) if phases else timings_s.get("total")


def recent_of(row: RowMapping) -> RecentImage:
    """An ended job's row as it stands in the statistics."""
    error = job_rows.read_error(row)
    return RecentImage(
        finished_s=row["finished_s"],
        model=row["model"],
        state=row["state"],
        generation_s=row["generation_s"],
        width_px=row["width_px"],
        height_px=row["height_px"],
        error=None if error is None else error.get("message", ""),
    )
