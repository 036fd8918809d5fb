"""Jobs as rows and back. What comes back is equal to what went in.

A request is JSON with every field named, so that neither a new field nor a new default of a later version changes what
an older row means. Its pictures are rows of their own: raw pixels, packed with zlib.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import RowMapping

from sdfleet.domain import (
    ImageRequest,
    Job,
    JobId,
    Output,
    OutputId,
    OwnerId,
    Picture,
    Submission,
    Webhook,
    Withheld,
)

# Of the JSON; to be raised when a field changes its meaning. A field that is only added keeps it.
VERSION = 1

# 1024x1024 pixels of blurred noise (3.1 MB) on one core of a Xeon, 2026-11-21: level 1 46 ms and 2.04 MB, level 6 76 ms
# and 1.91 MB; back in 16 ms.
_ZLIB_LEVEL = 1

Row = dict[str, Any]


def pack(request: ImageRequest) -> tuple[Row, ...]:
    """The rows of the request's pictures, without the job's id; 50 ms a megapixel, so not on the event loop."""
    found = {name: getattr(request, name) for name in _names_of(ImageRequest)}
    return tuple(
        {
            "role": role,
            "width_px": value.width_px,
            "height_px": value.height_px,
            "mode": value.mode,
            "coding": "zlib",
            "data": zlib.compress(value.data, _ZLIB_LEVEL),
        }
        for role, value in found.items()
        if isinstance(value, Picture)
    )


def unpack(packed: Iterable[RowMapping]) -> dict[str, Picture]:
    """The pictures by their role; takes a third of `pack`."""
    return {
        one["role"]: Picture(
            width_px=one["width_px"], height_px=one["height_px"], mode=one["mode"], data=zlib.decompress(one["data"])
        )
        for one in packed
    }


def row_of(job: Job) -> Row:
    """The job's row in the table `jobs`, without its number."""
    submission, request = job.submission, job.request
    idempotency = submission.idempotency
    return {
        "id": job.id,
        "owner": submission.caller.owner,
        "state": job.state,
        "priority": submission.priority,
        "attempts": job.attempts,
        "created_s": job.created_s,
        "started_s": job.started_s,
        "finished_s": job.finished_s,
        "idempotency": None if idempotency is None else digest(idempotency.key),
        "fingerprint": None if idempotency is None else digest(idempotency.fingerprint),
        "model": plain(request.model),
        "width_px": request.width_px,
        "height_px": request.height_px,
        "prompt_folded": plain(request.prompt.casefold()),
        "has_webhook": int(submission.webhook is not None),
        "submission": _write_submission(submission),
        "warnings": dump(job.warnings),
        "error": None if job.error is None else dump(dict(job.error)),
        "facts": dump(facts_out(job)),
        "generation_s": None,
        "node": job.node,
    }


def job_of(row: RowMapping, *, outputs: Sequence[Output], pictures: Mapping[str, Picture]) -> Job:
    """The job a row stands for. What only a newer sdfleet understands is left out and named in its warnings."""
    submission, unknown = _read_submission(row["submission"], pictures)
    facts = json.loads(row["facts"])
    told = (f"accepted by a newer sdfleet; not known here and left out: {', '.join(unknown)}",) if unknown else ()
    return Job(
        id=JobId(row["id"]),
        submission=submission,
        state=row["state"],
        created_s=row["created_s"],
        started_s=row["started_s"],
        finished_s=row["finished_s"],
        attempts=row["attempts"],
        outputs=tuple(outputs),
        warnings=told + tuple(json.loads(row["warnings"])),
        error=read_error(row),
        timings_s=facts["timings_s"],
        device=facts["device"],
        dtype=facts["dtype"],
        rungs=tuple(facts["rungs"]),
        # Absent in rows of an older sdfleet, which withheld nothing and knew no other machines.
        withheld=tuple(Withheld(index=one["index"], seed=one["seed"]) for one in facts.get("withheld", ())),
        node=facts.get("node", ""),
        backend=facts.get("backend", ""),
        cost_credits=facts.get("cost_credits"),
    )


def read_error(row: RowMapping) -> dict[str, str] | None:
    """Why the job failed or was cancelled; None if it was not."""
    found: dict[str, str] | None = None if row["error"] is None else json.loads(row["error"])
    return found


def output_row(output: Output, *, owner: OwnerId) -> Row:
    """The row of a finished picture in the table `outputs`, without its number."""
    return {
        "id": output.id,
        "job_id": output.job_id,
        "owner": owner,
        "position": output.index,
        "seed": str(output.seed),
        "width_px": output.width_px,
        "height_px": output.height_px,
        "format": output.format,
        "n_bytes": output.n_bytes,
        "created_s": output.created_s,
        "safety": output.safety,
        "model": output.model,
        "prompt": plain(output.prompt),
        "favourite": int(output.is_favourite),
    }


def output_of(row: RowMapping) -> Output:
    """The finished picture a row stands for."""
    return Output(
        id=OutputId(row["id"]),
        job_id=JobId(row["job_id"]),
        index=row["position"],
        seed=int(row["seed"]),
        width_px=row["width_px"],
        height_px=row["height_px"],
        format=row["format"],
        n_bytes=row["n_bytes"],
        created_s=row["created_s"],
        safety=row["safety"],
        model=row["model"],
        prompt=row["prompt"],
        is_favourite=bool(row["favourite"]),
    )


def facts_out(job: Job) -> Row:
    """What was found out while a job was drawn."""
    kept_back = [{"index": one.index, "seed": one.seed} for one in job.withheld]
    return {
        "timings_s": dict(job.timings_s), "device": job.device, "dtype": job.dtype, "rungs": list(job.rungs),
        "withheld": kept_back, "node": job.node, "backend": job.backend, "cost_credits": job.cost_credits,
    }  # fmt: skip


def webhook_of(submission_json: str) -> Webhook | None:
    """The webhook in the column `submission`."""
    found = json.loads(submission_json)["submission"]["webhook"]
    return None if found is None else Webhook(url=found["url"], secret=found["secret"])


def dump(value: object) -> str:
    """JSON as it stands in a column, a set as a sorted list."""
    # ASCII: NUL and lone surrogates survive in PostgreSQL's text too.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), default=sorted)


def digest(text: str) -> str:
    """SHA-256 of any text, as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def plain(text: str) -> str:
    """The text as any database takes it; only for what is searched or shown, never for what is read back."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _write_submission(submission: Submission) -> str:
    names = _picture_names(submission.request)
    told = _adapter().dump_python(submission, exclude={"request": names} if names else None)
    return dump({"version": VERSION, "submission": told})


def _read_submission(text: str, pictures: Mapping[str, Picture]) -> tuple[Submission, list[str]]:
    """The submission, and the names of what a newer sdfleet wrote into it."""
    told = json.loads(text)["submission"]
    unknown = [name for name in told["request"] if name not in _names_of(ImageRequest)]
    unknown += [name for name in told if name not in _names_of(Submission)]
    told["request"].update(pictures)
    return _adapter().validate_python(told), unknown


def _picture_names(request: ImageRequest) -> set[str]:
    return {name for name in _names_of(ImageRequest) if isinstance(getattr(request, name), Picture)}


@functools.cache
def _names_of(cls: type[ImageRequest | Submission]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


@functools.cache
def _adapter() -> TypeAdapter[Submission]:
    # Made when first used: pydantic looks at every class below Submission for 20 ms.
    return TypeAdapter(Submission)
