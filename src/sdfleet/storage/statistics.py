"""What the store's rows say about how drawing went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Row, RowMapping

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
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStats:
    """Ended jobs since some time: how many, of which models (name to count, done and failed), and the newest ones.

    by_node: the same by the machine of a fleet that drew them; "" is this one, and failures that no node ended.
    """

    n_done: int
    n_failed: int
    avg_generation_s: float | None
    by_model: Mapping[str, int]
    by_node: Mapping[str, int]
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
        node=row["node"],
    )


def stats_of(groups: Sequence[Row[Any]], recent: Sequence[RecentImage]) -> ImageStats:
    """The statistics in groups of (state, model, node, how many, seconds of drawing, how many of them were timed)."""
    by_state, by_model, by_node = Counter[str](), Counter[str](), Counter[str]()
    total_s, n_timed = 0.0, 0
    for group in groups:
        state, model, node, n, drawn_s, n_drawn = tuple(group)
        by_state[state] += n
        by_model[model] += n
        by_node[node] += n
        total_s, n_timed = total_s + (drawn_s or 0.0), n_timed + n_drawn
    return ImageStats(
        n_done=by_state["done"],
        n_failed=by_state["failed"],
        avg_generation_s=total_s / n_timed if n_timed else None,
        by_model=dict(by_model),
        by_node=dict(by_node),
        recent=tuple(recent),
    )
