"""What placement answers: which job goes where now, and why, in numbers and in words.

>>> mini = Candidate(device_id=DeviceId("m"), node_id=NodeId("m"), name="mini", draw_s=5.0)
>>> tower = Candidate(device_id=DeviceId("t"), node_id=NodeId("t"), name="tower", load_s=8.6, draw_s=0.6, price_s=2.0)
>>> sent_text(mini, [tower, mini], n_waiting=3)
'mini: done in 5.0 s. tower would need 9.2 s (8.6 s of it loading; those who wait would lose 2.0 s)'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdfleet.domain import JobId
from sdfleet.fleet.state import DeviceId, NodeId, RunningJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One device for one job. All spans in seconds from `Why.made_s`.

    wait_s: until it could begin. load_s: loading its model, 0 if that is in memory. draw_s: drawing, with the
    neighbours it would have. price_s: by how much later those who wait are done, summed, because it takes this much of
    the device; 0 where nobody else would have used it. neighbours_s: the same for the jobs already there.
    refused: why it cannot have the job, in words ("" if it can); then the numbers are 0.
    """

    device_id: DeviceId
    node_id: NodeId
    name: str
    wait_s: float = 0.0
    load_s: float = 0.0
    draw_s: float = 0.0
    price_s: float = 0.0
    neighbours_s: float = 0.0
    refused: str = ""

    @property
    def finish_s(self) -> float:
        """Until its last picture is drawn."""
        return self.wait_s + self.load_s + self.draw_s

    @property
    def cost_s(self) -> float:
        """What the choice goes by: the sum of all."""
        return self.finish_s + self.price_s + self.neighbours_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Why a job goes where it goes, or does not go yet. candidates: the best first, then those that refuse.

    made_s: on the router's clock. chosen: None while it waits. text: the same in one or two sentences.
    """

    job_id: JobId
    made_s: float
    n_waiting: int
    candidates: tuple[Candidate, ...]
    chosen: DeviceId | None
    text: str

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the sums beside their parts."""
        told = asdict(self)
        told["candidates"] = [
            {**asdict(one), "finish_s": one.finish_s, "cost_s": one.cost_s} for one in self.candidates
        ]
        return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Send this job to this device now. evicts: models that leave its memory for it, in this order.

    running: the job as the device's next snapshots must have it, until its compute ends.
    """

    job_id: JobId
    device_id: DeviceId
    node_id: NodeId
    running: RunningJob
    evicts: tuple[str, ...]
    why: Why


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Where a waiting job would go as things stand, and in how many seconds it would be finished; None: nowhere."""

    job_id: JobId
    device_id: DeviceId | None
    finish_s: float | None


def sent_text(chosen: Candidate, candidates: Sequence[Candidate], *, n_waiting: int, overtakes: str = "") -> str:
    """Why the job goes to `chosen` now. overtakes: the job that was before it there and must load first."""
    text = f"{chosen.name}: {_numbers(chosen, n_waiting=n_waiting)}"
    if overtakes:
        text += f", before job {overtakes}, whose model must be loaded there"
    others = [one for one in candidates if one.device_id != chosen.device_id and not one.refused]
    if others:
        best = min(others, key=lambda one: one.cost_s)
        return f"{text}. {best.name} would need {_rest(best, n_waiting=n_waiting)}"
    refused = [one for one in candidates if one.refused]
    if refused:
        return f"{text}. No other device can take it: {_refusals(refused)}"
    return text


def waiting_text(candidates: Sequence[Candidate], *, n_waiting: int) -> str:
    """Why the job is not sent yet. candidates: the best first."""
    able = [one for one in candidates if not one.refused]
    if not able:
        told = _refusals(candidates)
        return f"no device can take it: {told}" if told else "there is no device"
    best = able[0]
    if best.wait_s <= 0:
        return f"{best.name} has room for it, other jobs come first: {_numbers(best, n_waiting=n_waiting)}"
    text = f"waits {best.wait_s:.1f} s for {best.name}: {_numbers(best, n_waiting=n_waiting)}"
    free = next((one for one in able[1:] if one.wait_s <= 0), None)
    return (
        text if free is None else f"{text}. {free.name} has room now but would need {_rest(free, n_waiting=n_waiting)}"
    )


def _numbers(one: Candidate, *, n_waiting: int) -> str:
    text = f"done in {one.finish_s:.1f} s"
    if one.load_s:
        text += f", {one.load_s:.1f} s of it loading, while {n_waiting} jobs wait"
    return text


def _rest(one: Candidate, *, n_waiting: int) -> str:
    parts = []
    if one.wait_s:
        parts.append(f"{one.wait_s:.1f} s of it waiting")
    if one.load_s:
        parts.append(f"{one.load_s:.1f} s of it loading")
    if one.price_s and n_waiting > 1:
        parts.append(f"those who wait would lose {one.price_s:.1f} s")
    if one.neighbours_s:
        parts.append(f"jobs there would lose {one.neighbours_s:.1f} s")
    return f"{one.finish_s:.1f} s" + (f" ({'; '.join(parts)})" if parts else "")


def _refusals(refused: Sequence[Candidate]) -> str:
    told = "; ".join(f"{one.name}: {one.refused}" for one in refused[:3] if one.refused)
    return told + (f"; and {len(refused) - 3} more" if len(refused) > 3 else "")
