"""A job as it stands in the ledger: enough to accept it anew where the router's own store is lost.

Input pictures are not in it (a message takes one megabyte): such a job can only be drawn by a router that has its row.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace

from pydantic import TypeAdapter, ValidationError

from sdfleet.domain import Job, JobId, Submission
from sdfleet.errors import SdfleetError
from sdfleet.fleet.packing import BrokenMessage

VERSION = 1


def pack_entry(job: Job) -> bytes:
    """The body of a job's ledger entry."""
    submission, request = job.submission, job.request
    has_pictures = request.image is not None or request.mask is not None
    bare = replace(submission, request=replace(request, image=None, mask=None))
    body = {
        "v": VERSION,
        "job": job.id,
        "created_s": job.created_s,
        "has_pictures": has_pictures,
        "submission": _adapter().dump_python(bare),
    }
    return json.dumps(body, separators=(",", ":"), default=sorted).encode("ascii")


def unpack_entry(body: bytes) -> tuple[JobId, Submission]:
    """The job's id and what was asked. Raises BrokenMessage where the job cannot be drawn from this alone."""
    try:
        told = json.loads(body)
        if told["v"] != VERSION:
            raise BrokenMessage(f"a ledger entry of version {told['v']}")
        if told["has_pictures"]:
            raise BrokenMessage(f"job {told['job']} has input pictures, which only the store it was accepted in has")
        return JobId(str(told["job"])), _adapter().validate_python(told["submission"])
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError, SdfleetError) as exc:
        raise BrokenMessage(f"a ledger entry makes no sense: {str(exc)[:200]}") from exc


@functools.cache
def _adapter() -> TypeAdapter[Submission]:
    # Made when first used: pydantic looks at every class below Submission for 20 ms.
    return TypeAdapter(Submission)
