"""What the dashboard asks for: everything live, how it went over time, who asked for what, what is wrong, switches."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, NamedTuple

import psutil
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request

from sdfleet import __version__
from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import house_of
from sdfleet.api.bodies import described, json_body
from sdfleet.api.herd import STATS_WINDOW_S, status_of
from sdfleet.api.jobs import visible_to
from sdfleet.api.nodes import node_id
from sdfleet.api.ollama import FAULTS
from sdfleet.api.snapshots import Snapshots
from sdfleet.compose import House
from sdfleet.doctor.examining import Examined, Examiner
from sdfleet.doctor.machine import Machine
from sdfleet.doctor.table import quick_checks
from sdfleet.domain import JobId, JobStatus
from sdfleet.errors import BadRequest, SdfleetError
from sdfleet.settings import read_surroundings
from sdfleet.storage.series import Series
from sdfleet.storage.statistics import drawing_s
from sdfleet.storage.switches import SwitchBoard

router = APIRouter(tags=["herd"], responses=FAULTS)

# Reading the headers of every model and asking for a dozen files takes tens of milliseconds; a page asks each second.
KEPT_S = 30.0
SEVERITIES = {"fault": "critical", "warning": "warning", "ok": "info"}

HEARTBEAT_S = 15
# A stream ends after so many snapshots and its reader comes again: a revoked key is found out then.
MAX_SNAPSHOTS = 600
# More jobs than these are not drawn at once by anything a person watches job by job.
MAX_RUNNING = 100
SERIES_KEPT_S = 2.0


class _Window(NamedTuple):
    width_s: float
    n_spans: int


Window = Literal["15m", "1h", "6h", "24h", "7d"]
WINDOWS: dict[str, _Window] = {
    "15m": _Window(30, 30),
    "1h": _Window(60, 60),
    "6h": _Window(300, 72),
    "24h": _Window(1800, 48),
    "7d": _Window(10_800, 56),
}


class Vitals(BaseModel):
    """The machine and its jobs of the last 24 hours in numbers."""

    nodes_total: int
    nodes_online: int
    requests_active: int
    requests_waiting: int
    total_requests_24h: int
    image_generations_24h: int
    overall_error_rate_pct: float
    avg_generation_ms: float
    memory_available_gb: float
    health_score: int


class Recommendation(BaseModel):
    """One thing that is wrong, or could be better, and what to do. severity: critical, warning or info."""

    check_id: str
    severity: str
    title: str
    description: str
    fix: str
    node_id: str


class Health(BaseModel):
    """How this machine is. checked_at: seconds since 1970; the answer is kept for half a minute."""

    vitals: Vitals
    recommendations: list[Recommendation]
    checked_at: float


class Checkup:
    """The last examination of a server. One runs at a time; who asks meanwhile gets its answer too."""

    def __init__(self) -> None:
        self._examiner = Examiner()
        self._lock = asyncio.Lock()
        self._found: tuple[Examined, ...] = ()
        self._looked_s: float | None = None
        self.checked_at = 0.0

    async def found(self, house: House) -> tuple[Examined, ...]:
        """What the quick checks found, not longer ago than `KEPT_S`. No hub is asked and no process started."""
        async with self._lock:
            if self._looked_s is None or time.monotonic() - self._looked_s > KEPT_S:
                machine = Machine(
                    settings=house.settings,
                    variables=read_surroundings(),
                    standing=house.runtime.capabilities(),
                    known=house.catalog,
                )
                self._found = await asyncio.to_thread(self._examiner.examine, machine, quick_checks())
                self._looked_s, self.checked_at = time.monotonic(), time.time()
            return self._found


@router.get("/dashboard/api/health")
async def health(request: Request) -> Health:
    """What is wrong with this machine, the worst first, and the command that mends it; quick checks only."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    checkup: Checkup = request.app.state.checkup
    found = await checkup.found(house)
    told = [
        Recommendation(
            check_id=one.entry.id,
            severity=SEVERITIES[one.finding.verdict],
            title=one.entry.title,
            description=one.finding.what,
            fix=one.cure,
            node_id=node_id(),
        )
        for one in found
        if one.finding.verdict in {"fault", "warning"} or (one.finding.verdict == "ok" and one.finding.cure)
    ]
    told.sort(key=lambda one: list(SEVERITIES.values()).index(one.severity))
    return Health(vitals=await _vitals(house, told), recommendations=told, checked_at=checkup.checked_at)


async def _vitals(house: House, told: list[Recommendation]) -> Vitals:
    stats = await house.store.image_stats(since_s=time.time() - STATS_WINDOW_S, n_recent=1)
    n_total = stats.n_done + stats.n_failed
    load, fleet = house.desk.load(), (await status_of(house))["fleet"]
    n_bad = {severity: sum(one.severity == severity for one in told) for severity in SEVERITIES.values()}
    return Vitals(
        nodes_total=fleet["nodes_total"],
        nodes_online=fleet["nodes_online"],
        requests_active=load.n_running,
        requests_waiting=load.n_queued,
        total_requests_24h=n_total,
        image_generations_24h=stats.n_done,
        overall_error_rate_pct=round(100 * stats.n_failed / n_total, 1) if n_total else 0.0,
        avg_generation_ms=round((stats.avg_generation_s or 0.0) * 1000, 1),
        memory_available_gb=round(psutil.virtual_memory().available / 2**30, 2),
        health_score=max(0, 100 - 25 * n_bad["critical"] - 10 * n_bad["warning"]),
    )


# ----------------------------------------------------------------------------------------------------------------- live


@router.get(
    "/dashboard/events",
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def events(request: Request) -> EventSourceResponse:
    """Server-sent events `{"nodes", "queues", "timestamp", ...}`, about one a second; the same for all who read.

    Beside Herd's three: `fleet` as in /fleet/status, `jobs` that are being drawn with their steps, `load`.
    Each event is the whole state: after a lost connection the newest one comes at once, unless `Last-Event-ID` has it.
    """
    check_right(caller_of(request), "read")
    last = request.headers.get("last-event-id", "")
    number = int(last[:18]) if last.isascii() and last.isdigit() else 0
    return EventSourceResponse(_told(request, number), ping=HEARTBEAT_S)


async def _told(request: Request, number: int) -> AsyncIterator[ServerSentEvent]:
    house = house_of(request)
    snapshots: Snapshots = request.app.state.snapshots
    for _ in range(MAX_SNAPSHOTS):
        try:
            snapshot = await snapshots.after(number, lambda: view_of(house))
        except SdfleetError as exc:
            yield ServerSentEvent(json.dumps(exc.to_wire()), event="fault")
            continue
        if snapshot is None:
            return
        number = snapshot.number
        yield ServerSentEvent(snapshot.text, id=str(number))


async def view_of(house: House) -> Mapping[str, Any]:
    """Everything that changes while one looks; no prompt and nobody's name is in it."""
    status = await status_of(house)
    load, nodes = house.desk.load(), _nodes_of_jobs(house)
    running = house.desk.running()
    return {
        **status,
        "jobs": [_running(each, nodes, here=_here(house)) for each in running[:MAX_RUNNING]],
        "load": {
            "queued": load.n_queued,
            "running": load.n_running,
            "wait_ms": None if load.wait_s is None else round(load.wait_s * 1000),
        },
    }


def _nodes_of_jobs(house: House) -> Mapping[JobId, str]:
    """Which node of the fleet has which job."""
    members = () if house.fleet is None else house.fleet.members()
    return {job: member.node for member in members for job in member.sent}


def _here(house: House) -> str:
    """Where a job is of which no node is known: on a single machine there is one."""
    return node_id() if house.fleet is None else ""


def _running(status: JobStatus, nodes: Mapping[JobId, str], *, here: str) -> dict[str, Any]:
    job = status.job
    return {
        "id": job.id,
        "model": job.request.model,
        "node_id": nodes.get(job.id, here),
        "n": job.request.n_images,
        "width": job.request.width_px,
        "height": job.request.height_px,
        "step": status.step,
        "steps": status.n_steps,
        "eta_s": status.eta_s,
        "started": job.started_s,
    }


# ------------------------------------------------------------------------------------------------------------ over time


class SpanAnswer(BaseModel):
    """What ended from `start` on (seconds since 1970), for `width_s`. Percentiles of done jobs; null without any.

    total: from acceptance to the stored pictures. drawing: without waiting and loading.
    """

    start: float
    width_s: float
    done: int
    failed: int
    cancelled: int
    total_p50_ms: float | None
    total_p95_ms: float | None
    drawing_p50_ms: float | None
    drawing_p95_ms: float | None


class ReasonAnswer(BaseModel):
    """Failures with one code, the words of the newest of them, and when that was."""

    code: str
    count: int
    message: str
    hint: str
    model: str
    job_id: str
    last: float


class SeriesAnswer(BaseModel):
    """How drawing went. spans: oldest first, without a gap; the last one is not over yet. failures: the 1000 newest."""

    window: str
    spans: list[SpanAnswer]
    whole: SpanAnswer
    failures: list[ReasonAnswer]


class SeriesShelf:
    """The newest series of each window, made again when somebody asks after `SERIES_KEPT_S`."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._made: dict[Window, tuple[float, SeriesAnswer]] = {}

    async def of(self, house: House, window: Window) -> SeriesAnswer:
        """The series, perhaps a few seconds old."""
        async with self._lock:
            made = self._made.get(window)
            if made is None or time.monotonic() - made[0] > SERIES_KEPT_S:
                width_s, n_spans = WINDOWS[window]
                # Spans begin at round times, so that a point of the curve stays what it is while time goes on.
                start_s = (time.time() // width_s + 1 - n_spans) * width_s
                series = await house.store.series(start_s=start_s, width_s=width_s, n_spans=n_spans)
                made = self._made[window] = time.monotonic(), _series_of(window, series)
            return made[1]


@router.get("/dashboard/api/series")
async def series(
    request: Request, window: Annotated[Window, Query(description="how far back from now")] = "1h"
) -> SeriesAnswer:
    """Throughput and latency over time, and why jobs failed, of all that ended in the window."""
    check_right(caller_of(request), "read")
    shelf: SeriesShelf = request.app.state.series
    return await shelf.of(house_of(request), window)


def _series_of(window: str, found: Series) -> SeriesAnswer:
    spans = [
        SpanAnswer(
            start=span.start_s,
            width_s=span.width_s,
            done=span.n_done,
            failed=span.n_failed,
            cancelled=span.n_cancelled,
            total_p50_ms=_ms(span.total_p50_s),
            total_p95_ms=_ms(span.total_p95_s),
            drawing_p50_ms=_ms(span.drawing_p50_s),
            drawing_p95_ms=_ms(span.drawing_p95_s),
        )
        for span in (*found.spans, found.whole)
    ]
    failures = [
        ReasonAnswer(
            code=one.code,
            count=one.n,
            message=one.message,
            hint=one.hint,
            model=one.model,
            job_id=one.job_id,
            last=one.last_s,
        )
        for one in found.reasons
    ]
    return SeriesAnswer(window=window, spans=spans[:-1], whole=spans[-1], failures=failures)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


# --------------------------------------------------------------------------------------------------------- each request


class Trace(BaseModel):
    """One request, as Herd's clients know it and a little more. timestamp: when it was accepted, seconds since 1970.

    status: completed, failed, cancelled, running or queued. latency_ms: from acceptance to the end; wait_ms of it in
    line. retry_count: how often drawing was begun again. No prompt is in it.
    """

    model_config = ConfigDict(protected_namespaces=())

    request_id: str
    model: str
    node_id: str
    status: str
    latency_ms: float | None
    wait_ms: float | None
    generation_ms: float | None
    retry_count: int
    client_ip: str
    error_message: str | None
    error_code: str | None
    error_hint: str | None
    timestamp: float
    tags: list[str]
    request_type: str = "image"
    dialect: str
    width: int
    height: int
    steps: int
    n: int


class Traces(BaseModel):
    """Requests, newest first."""

    traces: list[Trace]


@router.get("/dashboard/api/traces")
async def traces(request: Request, limit: Annotated[int, Query(ge=1, le=500)] = 50) -> Traces:
    """The newest requests and what became of them: everybody's for a key that may manage, else one's own."""
    check_right(caller_of(request), "read")
    house = house_of(request)
    found, _ = await house.desk.statuses(owner=visible_to(request), limit=limit)
    nodes = _nodes_of_jobs(house)
    here = _here(house)
    return Traces(traces=[_trace(each, node=each.job.node or nodes.get(each.job.id, here)) for each in found])


def _trace(status: JobStatus, *, node: str) -> Trace:
    job, asked = status.job, status.job.request
    error = job.error or {}
    ended_s = job.finished_s
    return Trace(
        request_id=job.id,
        model=asked.model,
        node_id=node,
        status="completed" if job.state == "done" else job.state,
        latency_ms=None if ended_s is None else _ms(ended_s - job.created_s),
        wait_ms=None if job.started_s is None else _ms(max(0.0, job.started_s - job.created_s)),
        generation_ms=_ms(drawing_s(job.timings_s)) if job.state == "done" else None,
        retry_count=max(0, job.attempts - 1),
        client_ip=job.submission.client,
        error_message=error.get("message"),
        error_code=error.get("code"),
        error_hint=error.get("hint"),
        timestamp=job.created_s,
        tags=list(job.submission.tags),
        dialect=job.submission.dialect,
        width=asked.width_px or 0,
        height=asked.height_px or 0,
        steps=asked.steps or 0,
        n=asked.n_images,
    )


# ------------------------------------------------------------------------------------------------------------- switches


class SettingsAsked(BaseModel):
    """What to switch. image_generation: whether new requests for pictures are taken, by any route."""

    model_config = ConfigDict(extra="ignore")

    image_generation: bool | None = None


class SettingsUpdated(BaseModel):
    """What is another now."""

    status: Literal["updated"] = "updated"
    updated: dict[str, bool]


@router.get("/dashboard/api/settings")
async def show_settings(request: Request) -> dict[str, Any]:
    """The switches, and what the caller may do: `may` are the scopes of the key."""
    caller = caller_of(request)
    check_right(caller, "read")
    switches: SwitchBoard = request.app.state.switches
    return {
        "config": {"toggles": asdict(switches.now)},
        "may": sorted(caller.scopes),
        "is_router": house_of(request).fleet is not None,
        "node_id": node_id(),
        "version": __version__,
    }


@router.post("/dashboard/api/settings", dependencies=[needs("manage")], openapi_extra=described(SettingsAsked))
async def change_settings(
    request: Request, asked: Annotated[SettingsAsked, Depends(json_body(SettingsAsked))]
) -> SettingsUpdated:
    """Switch something on or off, for now and after a restart. Jobs that were taken before are still drawn."""
    change = {name: value for name, value in asked.model_dump().items() if value is not None}
    if not change:
        raise BadRequest("no switch of ours is named", hint='send {"image_generation": false}, say')
    switches: SwitchBoard = request.app.state.switches
    now = asdict(await asyncio.to_thread(switches.turn, **change))
    return SettingsUpdated(updated={name: now[name] for name in change})
