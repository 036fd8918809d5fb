"""How drawing went over time: what ended in each span, how long it took, and why it failed. Counted by the database."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, Row, Select, and_, case, cast, func, literal, select

from sdfleet.storage.tables import jobs

# The newest failures that are sorted by their reason; more would be read for a list that shows a dozen.
MAX_FAILURES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What ended in the `width_s` seconds from `start_s` on (seconds since 1970).

    Percentiles are of done jobs, nearest rank; None where there are none. total: from acceptance to the stored
    pictures. drawing: without waiting and loading, where that was measured, else as total.
    """

    start_s: float
    width_s: float
    n_done: int = 0
    n_failed: int = 0
    n_cancelled: int = 0
    total_p50_s: float | None = None
    total_p95_s: float | None = None
    drawing_p50_s: float | None = None
    drawing_p95_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Failures with one code, the words of the newest of them, and when that was."""

    code: str
    n: int
    message: str
    hint: str
    model: str
    job_id: str
    last_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Spans in their order without a gap, all of them as one, and why jobs failed, the most frequent first."""

    spans: tuple[Span, ...]
    whole: Span
    reasons: tuple[Reason, ...]


def read(connection: Connection, *, start_s: float, width_s: float, n_spans: int, is_postgresql: bool) -> Series:
    """What ended in `n_spans` spans of `width_s` seconds from `start_s` on."""
    end_s = start_s + width_s * n_spans
    is_within = and_(jobs.c.finished_s >= start_s, jobs.c.finished_s < end_s)
    place = (jobs.c.finished_s - literal(start_s)) / literal(width_s)
    # A cast cuts in SQLite and rounds in PostgreSQL; floor() is not in every SQLite.
    number = cast(func.floor(place) if is_postgresql else place, Integer)
    empty = [Span(start_s=start_s + i * width_s, width_s=width_s) for i in range(n_spans)]
    spans = _filled(connection, empty, number, is_within)
    (whole,) = _filled(connection, [Span(start_s=start_s, width_s=width_s * n_spans)], literal(0), is_within)
    failed = (
        select(jobs.c.id, jobs.c.model, jobs.c.error, jobs.c.finished_s)
        .where(is_within, jobs.c.state == "failed")
        .order_by(jobs.c.finished_s.desc(), jobs.c.number.desc())
        .limit(MAX_FAILURES)
    )
    return Series(spans=tuple(spans), whole=whole, reasons=_reasons(connection.execute(failed)))


def _filled(
    connection: Connection, spans: list[Span], number: ColumnElement[int], is_within: ColumnElement[bool]
) -> list[Span]:
    """The spans with what ended in each. number: of the span that a job belongs to."""
    counted = select(number.label("span"), jobs.c.state, func.count()).where(is_within).group_by("span", jobs.c.state)
    for at, state, n in connection.execute(counted):
        match state:
            case "done":
                spans[at] = replace(spans[at], n_done=n)
            case "failed":
                spans[at] = replace(spans[at], n_failed=n)
            case _:
                spans[at] = replace(spans[at], n_cancelled=n)
    for row in connection.execute(_percentiles(number, is_within)):
        spans[row.span] = replace(
            spans[row.span],
            total_p50_s=row.total_p50_s,
            total_p95_s=row.total_p95_s,
            drawing_p50_s=row.drawing_p50_s,
            drawing_p95_s=row.drawing_p95_s,
        )
    return spans


def _percentiles(number: ColumnElement[int], is_within: ColumnElement[bool]) -> Select[Any]:
    total_s = jobs.c.finished_s - jobs.c.created_s
    drawing_s = func.coalesce(jobs.c.generation_s, total_s)
    done = select(number.label("span"), total_s.label("total_s"), drawing_s.label("drawing_s"))
    each = done.where(is_within, jobs.c.state == "done").subquery()

    def rank(of: ColumnElement[float]) -> ColumnElement[int]:
        return func.row_number().over(partition_by=each.c.span, order_by=of)

    ranked = select(
        each,
        rank(each.c.total_s).label("total_rank"),
        rank(each.c.drawing_s).label("drawing_rank"),
        func.count().over(partition_by=each.c.span).label("n"),
    ).subquery()

    def percentile(name: str, percent: int) -> ColumnElement[float]:
        # The smallest value with so many percent of them at or below it.
        wanted = (ranked.c.n * percent + 99) // 100
        return func.max(case((ranked.c[f"{name}_rank"] == wanted, ranked.c[f"{name}_s"]))).label(f"{name}_p{percent}_s")

    figures = [percentile(name, percent) for name in ("total", "drawing") for percent in (50, 95)]
    return select(ranked.c.span, *figures).group_by(ranked.c.span)


def _reasons(failed: Iterable[Row[Any]]) -> tuple[Reason, ...]:
    """By code. failed: the newest first."""
    found: dict[str, Reason] = {}
    for row in failed:
        error = {} if row.error is None else json.loads(row.error)
        code = error.get("code", "unknown")
        if code in found:
            found[code] = replace(found[code], n=found[code].n + 1)
            continue
        found[code] = Reason(
            code=code,
            n=1,
            message=error.get("message", ""),
            hint=error.get("hint", ""),
            model=row.model,
            job_id=row.id,
            last_s=row.finished_s,
        )
    return tuple(sorted(found.values(), key=lambda reason: -reason.n))
