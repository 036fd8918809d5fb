"""Jobs: accepted once, begun by one, ended once, whoever races and whatever is killed in between.

Every change of a state is one UPDATE that names the state it starts from. A method returns when its change is on the
disk. Every method raises StoreUnavailable beside what it names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    Table,
    delete,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from sdfleet.domain import Job, JobId, JobState, Output, OutputId, OwnerId, Submission
from sdfleet.errors import Conflict, InvalidValue, QueueFull
from sdfleet.storage import job_rows, series
from sdfleet.storage.database import Database
from sdfleet.storage.places import Place, Places
from sdfleet.storage.statistics import ImageStats, drawing_s, recent_of, stats_of
from sdfleet.storage.tables import deliveries, jobs, outputs, pictures

STATES: tuple[JobState, ...] = ("queued", "running", "done", "failed", "cancelled")

# Statements with long lists of ids are cut: SQLite before 3.32 takes 999 values in one.
_CHUNK = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """What retention may remove: ended jobs, and finished pictures (delete their files, then forget them)."""

    job_ids: tuple[JobId, ...]
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A job's row with what belongs to it, not yet unpacked."""

    row: RowMapping
    outputs: tuple[Output, ...]
    pictures: tuple[RowMapping, ...] = ()

    def job(self) -> Job:
        return job_rows.job_of(self.row, outputs=self.outputs, pictures=job_rows.unpack(self.pictures))


class JobStore:
    """The jobs of one database. clock: seconds since 1970."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._places = Places(database, clock=clock)

    # ------------------------------------------------------------------------------------------------ the life of a job

    async def accept(
        self, submission: Submission, *, job_id: JobId, max_queued: int, warnings: Sequence[str] = ()
    ) -> tuple[Job, bool]:
        """The new job, queued and on the disk; or the one this owner's Idempotency key named before, and False.

        submission.request has nothing left open. warnings: what its caller should be told already.
        Raises Conflict (the same key with another fingerprint), QueueFull (max_queued jobs wait, or as many of this
        owner as `submission.caller.max_queued`).
        """
        job = Job(id=job_id, submission=submission, state="queued", created_s=self._clock(), warnings=tuple(warnings))
        # In a thread even without pictures: JSON of a long prompt is not for the event loop.
        row, packed = await self._database.off_loop(
            lambda: (job_rows.row_of(job), [{"job_id": job_id, **one} for one in job_rows.pack(submission.request)])
        )

        def work(connection: Connection) -> _Found | QueueFull | Conflict | None:
            found = _same_request(connection, row)
            if found is not None:
                return found
            full = _full(connection, submission, max_queued=max_queued)
            if full is not None:
                return full
            connection.execute(insert(jobs), row)
            if packed:
                connection.execute(insert(pictures), packed)
            return None

        try:
            answer = await self._database.write(work)
        except IntegrityError as exc:
            raise Conflict(f"there is a job {job_id} already", hint="send the request again") from exc
        if isinstance(answer, QueueFull | Conflict):
            raise answer
        return (job, True) if answer is None else (await self._database.off_loop(answer.job), False)

    async def begin(self, job_id: JobId) -> Job | None:
        """The job, now running, with one attempt more; None if it is not queued any more."""
        change = {"state": "running", "attempts": jobs.c.attempts + 1, "started_s": self._clock()}
        return await self._moved(job_id, from_=("queued",), change=change)

    async def finish(self, done: Job) -> bool:
        """Whether the job went from running to done; its pictures are in the store then, and only then.

        done: the job with all that was found out; its warnings also those known when it was accepted.
        """
        change = {
            "warnings": job_rows.dump(list(done.warnings)),
            "facts": job_rows.dump(job_rows.facts_out(done)),
            "generation_s": drawing_s(done.timings_s),
            "node": done.node,
        }
        return await self._end(done.id, "done", from_=("running",), change=change, finished=done.outputs)

    async def fail(self, job_id: JobId, error: Mapping[str, str]) -> bool:
        """Whether the job failed by this call; False if it had ended."""
        return await self._end(job_id, "failed", from_=("queued", "running"), change=_told(error))

    async def cancel(self, job_id: JobId, error: Mapping[str, str]) -> bool:
        """Whether the job was cancelled by this call; False if it had ended."""
        return await self._end(job_id, "cancelled", from_=("queued", "running"), change=_told(error))

    async def release(self, job_id: JobId) -> bool:
        """Whether the job went from running back to queued; its attempts stay counted."""

        def work(connection: Connection) -> bool:
            return _update(connection, job_id, from_=("running",), change={"state": "queued", "started_s": None})

        return await self._database.write(work)

    async def requeue(self, job_id: JobId) -> Job | None:
        """The failed or cancelled job, queued again: same seed and settings, no attempt yet. None if it is neither."""
        change = {"state": "queued", "attempts": 0, "started_s": None, "finished_s": None, "error": None}
        return await self._moved(job_id, from_=("failed", "cancelled"), change=change)

    async def resume(self) -> list[Job]:
        """Every job that waits, in the order in which they are due, without their input pictures.

        For the start: what was running when the last process ended is queued again.
        """

        def work(connection: Connection) -> list[_Found]:
            connection.execute(update(jobs).where(jobs.c.state == "running").values(state="queued", started_s=None))
            waiting = select(jobs).where(jobs.c.state == "queued").order_by(jobs.c.priority.desc(), jobs.c.number)
            return _with_outputs(connection, connection.execute(waiting).mappings().all())

        found = await self._database.write(work)
        return await self._database.off_loop(lambda: [one.job() for one in found])

    # ----------------------------------------------------------------------------------------------- what is remembered

    async def job(self, job_id: JobId, *, owner: OwnerId | None = None) -> Job | None:
        """The job with its pictures; None if there is none, or another owner's. owner None: whoever's."""
        query = select(jobs).where(jobs.c.id == job_id, *_owned(jobs, owner))

        def work(connection: Connection) -> Job | None:
            found = _whole(connection, query)
            return None if found is None else found.job()

        return await self._database.read(work)

    async def page(
        self,
        *,
        owner: OwnerId | None = None,
        states: frozenset[JobState] | None = None,
        before: str | None = None,
        limit: int = 50,
        search: str | None = None,
    ) -> tuple[list[Job], str | None]:
        """Jobs, newest first, without their input pictures, and the cursor of the next page if there may be one.

        before: the cursor of an earlier answer. search: part of the prompt, in whatever case.
        Raises InvalidValue for a cursor of no answer.
        """
        query = select(jobs).where(*_owned(jobs, owner))
        if states is not None:
            query = query.where(jobs.c.state.in_(sorted(states)))
        if search:
            query = query.where(self._contains(jobs.c.prompt_folded, job_rows.plain(search.casefold())))
        query = _cut(query, jobs, before=before, limit=limit)

        def work(connection: Connection) -> tuple[list[Job], str | None]:
            rows, following = _page(connection, query, limit=limit)
            return [found.job() for found in _with_outputs(connection, rows)], following

        return await self._database.read(work)

    async def outputs(
        self,
        *,
        owner: OwnerId | None = None,
        before: str | None = None,
        limit: int = 50,
        search: str | None = None,
        only_favourites: bool = False,
    ) -> tuple[list[Output], str | None]:
        """Finished pictures, newest first, and the cursor of the next page if there may be one. Raises as `page`.

        search: part of the prompt, in whatever case.
        """
        query = select(outputs).where(*_owned(outputs, owner))
        if search:
            query = query.where(self._contains(outputs.c.prompt_folded, job_rows.plain(search.casefold())))
        if only_favourites:
            query = query.where(outputs.c.favourite == 1)
        query = _cut(query, outputs, before=before, limit=limit)

        def work(connection: Connection) -> tuple[list[Output], str | None]:
            rows, following = _page(connection, query, limit=limit)
            return [job_rows.output_of(row) for row in rows], following

        return await self._database.read(work)

    async def mark(self, output_id: OutputId, *, is_favourite: bool) -> None:
        """Make a finished picture a favourite, or one no more; unknown ids are ignored."""
        change = update(outputs).where(outputs.c.id == output_id).values(favourite=int(is_favourite))
        await self._database.write(lambda connection: connection.execute(change).rowcount)

    async def output(self, output_id: OutputId, *, owner: OwnerId | None = None) -> Output | None:
        """The finished picture; None if there is none, or another owner's."""
        query = select(outputs).where(outputs.c.id == output_id, *_owned(outputs, owner))

        def work(connection: Connection) -> Output | None:
            row = connection.execute(query).mappings().first()
            return None if row is None else job_rows.output_of(row)

        return await self._database.read(work)

    # ------------------------------------------------------------------------------------------------------- in numbers

    async def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""

        def work(connection: Connection) -> dict[JobState, int]:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state)).all()
            found: dict[str, int] = {state: n for state, n in rows}  # noqa: C416 - dict() has no type for a Row
            return {state: found.get(state, 0) for state in STATES}

        return await self._database.read(work)

    async def places(self) -> tuple[Place, ...]:
        """Open jobs, and those that ended in the last day, by node and model."""
        return await self._places.now()

    async def open_states(self) -> dict[JobId, JobState]:
        """The state of every job that has not ended."""
        query = select(jobs.c.id, jobs.c.state).where(jobs.c.state.in_(("queued", "running")))

        def work(connection: Connection) -> dict[JobId, JobState]:
            return {JobId(row.id): row.state for row in connection.execute(query)}

        return await self._database.read(work)

    async def open_models(self) -> dict[JobId, str]:
        """The model of every job that has not ended."""
        query = select(jobs.c.id, jobs.c.model).where(jobs.c.state.in_(("queued", "running")))

        def work(connection: Connection) -> dict[JobId, str]:
            return {JobId(row.id): row.model for row in connection.execute(query)}

        return await self._database.read(work)

    async def n_queued(self, owner: OwnerId) -> int:
        """How many jobs of this owner wait."""
        return await self._database.read(lambda connection: _n_queued(connection, owner))

    async def image_stats(self, *, since_s: float, n_recent: int = 50) -> ImageStats:
        """What was done and what failed since then; cancelled jobs are in no number."""
        ended = (jobs.c.finished_s >= since_s, jobs.c.state.in_(("done", "failed")))

        def work(connection: Connection) -> ImageStats:
            told = (jobs.c.state, jobs.c.model, jobs.c.node)
            by_state = select(*told, func.count(), func.sum(jobs.c.generation_s), func.count(jobs.c.generation_s))
            groups = connection.execute(by_state.where(*ended).group_by(*told)).all()
            recent = select(jobs).where(*ended).order_by(jobs.c.finished_s.desc(), jobs.c.number.desc()).limit(n_recent)
            return stats_of(groups, [recent_of(row) for row in connection.execute(recent).mappings()])

        return await self._database.read(work)

    async def series(self, *, start_s: float, width_s: float, n_spans: int) -> series.Series:
        """How drawing went in `n_spans` spans of `width_s` seconds from `start_s` on."""
        is_postgresql = self._database.is_postgresql
        return await self._database.read(
            lambda connection: series.read(
                connection, start_s=start_s, width_s=width_s, n_spans=n_spans, is_postgresql=is_postgresql
            )
        )

    # -------------------------------------------------------------------------------------------------------- retention

    async def expired(
        self, *, jobs_before_s: float | None = None, outputs_before_s: float | None = None, limit: int = 500
    ) -> Expired:
        """At most `limit` jobs that ended before, and as many pictures made before, oldest first. None: none.

        Favourites are no part of it, however old.
        """
        # Nothing is older than minus infinity.
        border_s = -math.inf if jobs_before_s is None else jobs_before_s
        old_jobs = select(jobs.c.id).where(jobs.c.finished_s < border_s).order_by(jobs.c.finished_s).limit(limit)
        border_s = -math.inf if outputs_before_s is None else outputs_before_s
        is_old = (outputs.c.created_s < border_s, outputs.c.favourite == 0)
        old_outputs = select(outputs).where(*is_old).order_by(outputs.c.created_s).limit(limit)

        def work(connection: Connection) -> Expired:
            return Expired(
                job_ids=tuple(map(JobId, connection.scalars(old_jobs))),
                outputs=tuple(map(job_rows.output_of, connection.execute(old_outputs).mappings())),
            )

        return await self._database.read(work)

    async def forget_jobs(self, ids: Sequence[JobId]) -> int:
        """How many of these jobs had ended and are forgotten now; their finished pictures stay."""

        def work(connection: Connection) -> int:
            return sum(
                connection.execute(
                    delete(jobs).where(jobs.c.id.in_(some), jobs.c.state.in_(("done", "failed", "cancelled")))
                ).rowcount
                for some in _chunks(ids)
            )

        return await self._database.write(work)

    async def forget_outputs(self, ids: Sequence[OutputId]) -> None:
        """Forget these finished pictures, whose files are gone."""

        def work(connection: Connection) -> None:
            for some in _chunks(ids):
                connection.execute(delete(outputs).where(outputs.c.id.in_(some)))

        await self._database.write(work)

    # ------------------------------------------------------------------------------------------------------------ parts

    async def _moved(self, job_id: JobId, *, from_: tuple[JobState, ...], change: Mapping[str, Any]) -> Job | None:
        def work(connection: Connection) -> _Found | None:
            if not _update(connection, job_id, from_=from_, change=change):
                return None
            return _whole(connection, select(jobs).where(jobs.c.id == job_id))

        found = await self._database.write(work)
        return None if found is None else await self._database.off_loop(found.job)

    async def _end(
        self,
        job_id: JobId,
        state: JobState,
        *,
        from_: tuple[JobState, ...],
        change: Mapping[str, Any],
        finished: Sequence[Output] = (),
    ) -> bool:
        now_s = self._clock()

        def work(connection: Connection) -> bool:
            if not _update(connection, job_id, from_=from_, change={**change, "state": state, "finished_s": now_s}):
                return False
            if finished:
                asked = select(jobs.c.owner, jobs.c.prompt_folded).where(jobs.c.id == job_id)
                owner, folded = connection.execute(asked).one()
                rows = [job_rows.output_row(one, owner=owner) | {"prompt_folded": folded} for one in finished]
                connection.execute(insert(outputs), rows)
            # In the same transaction: an end that is to be told is told after any kill.
            told = select(jobs.c.id, literal(0), literal(now_s)).where(jobs.c.id == job_id, jobs.c.has_webhook == 1)
            connection.execute(insert(deliveries).from_select(["job_id", "attempts", "due_s"], told))
            return True

        return await self._database.write(work)

    def _contains(self, column: ColumnElement[str], text: str) -> ColumnElement[bool]:
        # Not LIKE: SQLite bounds its patterns, and a prompt may be longer.
        find = func.strpos if self._database.is_postgresql else func.instr
        return find(column, text) > 0


def _update(connection: Connection, job_id: JobId, *, from_: tuple[JobState, ...], change: Mapping[str, Any]) -> bool:
    where = (jobs.c.id == job_id, jobs.c.state.in_(from_))
    return connection.execute(update(jobs).where(*where).values(**change)).rowcount == 1


def _same_request(connection: Connection, row: job_rows.Row) -> _Found | Conflict | None:
    """The job that this owner's key named before, or why it may not be given."""
    if row["idempotency"] is None:
        return None
    query = select(jobs).where(jobs.c.owner == row["owner"], jobs.c.idempotency == row["idempotency"])
    found = _whole(connection, query)
    if found is not None and found.row["fingerprint"] != row["fingerprint"]:
        return Conflict(
            f"this Idempotency-Key was used for another request (job {found.row['id']})",
            hint="send a new key with a new request",
        )
    return found


def _full(connection: Connection, submission: Submission, *, max_queued: int) -> QueueFull | None:
    """Why no further job may wait; None if it may."""
    n_all = connection.execute(select(func.count()).where(jobs.c.state == "queued")).scalar_one()
    if n_all >= max_queued:
        return QueueFull(f"{n_all} jobs wait already", hint="try again later, or raise SD_MAX_QUEUED")
    caller = submission.caller
    if caller.max_queued is None:
        return None
    n_own = _n_queued(connection, caller.owner)
    if n_own < caller.max_queued:
        return None
    return QueueFull(f"{n_own} jobs of this key wait already, as many as may", hint="try again when one has begun")


def _n_queued(connection: Connection, owner: OwnerId) -> int:
    query = select(func.count()).where(jobs.c.state == "queued", jobs.c.owner == owner)
    return int(connection.execute(query).scalar_one())


def _whole(connection: Connection, query: Select[Any]) -> _Found | None:
    """The one row of the query with its finished and its input pictures."""
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    packed = connection.execute(select(pictures).where(pictures.c.job_id == row["id"])).mappings().all()
    (found,) = _with_outputs(connection, [row])
    return replace(found, pictures=tuple(packed))


def _with_outputs(connection: Connection, rows: Sequence[RowMapping]) -> list[_Found]:
    by_job: dict[str, list[Output]] = {}
    done = [row["id"] for row in rows if row["state"] == "done"]
    for some in _chunks(done):
        query = select(outputs).where(outputs.c.job_id.in_(some)).order_by(outputs.c.job_id, outputs.c.position)
        for row in connection.execute(query).mappings():
            by_job.setdefault(row["job_id"], []).append(job_rows.output_of(row))
    return [_Found(row, tuple(by_job.get(row["id"], ()))) for row in rows]


def _owned(of: Table, owner: OwnerId | None) -> tuple[ColumnElement[bool], ...]:
    return () if owner is None else (of.c.owner == owner,)


def _cut(query: Select[Any], of: Table, *, before: str | None, limit: int) -> Select[Any]:
    if before is not None:
        if not (before.isascii() and before.isdigit() and len(before) <= 18):
            raise InvalidValue("before", f"{before[:40]!r} is no cursor", hint="use the one an earlier page gave")
        query = query.where(of.c.number < int(before))
    # One more than asked for tells whether there is a next page.
    return query.order_by(of.c.number.desc()).limit(limit + 1)


def _page(connection: Connection, query: Select[Any], *, limit: int) -> tuple[Sequence[RowMapping], str | None]:
    rows = connection.execute(query).mappings().all()
    return rows[:limit], str(rows[limit - 1]["number"]) if len(rows) > limit else None


def _chunks(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[i : i + _CHUNK] for i in range(0, len(ids), _CHUNK))


def _told(error: Mapping[str, str]) -> dict[str, Any]:
    return {"error": job_rows.dump(dict(error))}
